"""Adam's direction, with eps where torch has it."""

import numpy as np


def direction(g, state, *, betas=(0.9, 0.999), eps=1e-8, amsgrad=False):
    beta1, beta2 = betas
    t = state["t"] = state.get("t", 0) + 1
    m = state["m"] = beta1 * state.get("m", 0.0) + (1 - beta1) * g
    v = state["v"] = beta2 * state.get("v", 0.0) + (1 - beta2) * (g * g)
    if amsgrad:
        v = state["v_max"] = np.maximum(state.get("v_max", 0.0), v)
    return m / (1 - beta1**t) / (np.sqrt(v / (1 - beta2**t)) + eps)
