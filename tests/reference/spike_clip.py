"""Entries cut where they exceed the bias-corrected mean square of their own past."""

import numpy as np


def filtered(grads, states, *, threshold=5000.0, beta2=0.999):
    out = []
    for g, state in zip(grads, states, strict=True):
        n, v = state.get("n", 0), state.get("v", np.zeros_like(g))
        if n:
            bound = threshold / (1 - beta2**n) * v
            g = np.where((v > 0) & (g * g > bound), np.sign(g) * np.sqrt(bound), g)
        state["n"] = n + 1
        state["v"] = np.where(np.isfinite(g), beta2 * v + (1 - beta2) * (g * g), v)
        out.append(g)
    return out
