"""diffGrad's direction, version 2: the previous gradient is a copy, eps stands on the uncorrected root."""

import numpy as np


def direction(g, state, *, betas=(0.9, 0.999), eps=1e-8):
    beta1, beta2 = betas
    t = state["t"] = state.get("t", 0) + 1
    m = state["m"] = beta1 * state.get("m", 0.0) + (1 - beta1) * g
    v = state["v"] = beta2 * state.get("v", 0.0) + (1 - beta2) * (g * g)
    friction = 1 / (1 + np.exp(-np.abs(state.get("previous", 0.0) - g)))
    state["previous"] = g.copy()
    return (1 - beta2**t) ** 0.5 / (1 - beta1**t) * (friction * m) / (np.sqrt(v) + eps)
