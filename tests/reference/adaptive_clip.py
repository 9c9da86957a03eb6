"""Adaptive gradient clipping: each row's norm beside its parameter's; a vector is one row."""

import numpy as np


def filtered(grads, states, *, clip=0.01, eps=1e-3):
    out = []
    for g, state in zip(grads, states, strict=True):
        rows, weights = (x.reshape(len(x) if x.ndim > 1 else 1, -1) for x in (g, state["p"]))
        norms = np.sqrt((rows * rows).astype(np.float64).sum(1, keepdims=True))
        most = clip * np.maximum(np.sqrt((weights * weights).astype(np.float64).sum(1, keepdims=True)), eps)
        clipped = np.where(norms >= most, rows * (most / np.maximum(norms, 1e-6)), rows)
        out.append(clipped.reshape(g.shape).astype(g.dtype))
    return out
