"""torch's clip_grad_norm_: the norm of the tensors' norms, and a coefficient that is always multiplied."""

import numpy as np


def filtered(grads, states, *, max_norm, norm_type=2):
    norms = np.array([np.linalg.norm(g.ravel(), norm_type) for g in grads], grads[0].dtype)
    coefficient = np.minimum(1.0, max_norm / (np.linalg.norm(norms, norm_type) + 1e-6))
    return [(g * coefficient).astype(g.dtype) for g in grads]
