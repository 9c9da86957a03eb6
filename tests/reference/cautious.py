"""Cautious Optimizers: keep what agrees in sign with the gradient, and make up for what was dropped."""

import numpy as np


def masked(updates, grads):
    out = []
    for u, g in zip(updates, grads, strict=True):
        agrees = np.sign(u) * np.sign(g) > 0
        out.append(np.where(agrees, u / max(agrees.mean(), 1e-3), np.where(np.isfinite(u), 0.0, u)).astype(u.dtype))
    return out
