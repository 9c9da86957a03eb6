"""Lion's direction; the momentum moves after the update, by the other beta."""

import numpy as np


def direction(g, state, *, betas=(0.9, 0.99)):
    m = state.get("m", 0.0)
    state["m"] = betas[1] * m + (1 - betas[1]) * g
    c = betas[0] * m + (1 - betas[0]) * g
    return np.where(np.isnan(c), c.dtype.type(0), np.sign(c))  # the sign of NaN is 0, as in torch
