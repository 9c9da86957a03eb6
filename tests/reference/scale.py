"""SCALE's direction; the role of a parameter goes by its number of axes."""

import numpy as np


def sized(u, axes, norm):
    inputs = np.prod([u.shape[a] for a in axes])
    square = (u * u).astype(np.float64).sum(axes, keepdims=True) / (inputs if norm == "rms" else 1)
    return (u / np.maximum(np.sqrt(square), 1e-8)).astype(u.dtype)


def filtered(flow, states, *, norm="rms"):
    """column_normalize: what gives one output is a slice along the first axis, a vector as a whole."""
    return [sized(u, tuple(range(1, u.ndim)) or (0,), norm) for u in flow]


def links(*, roles, momentum=0.9, norm="rms", vector_betas=(0.9, 0.999), vector_eps=1e-8):
    def direction(u, state):
        role, fan_in = roles.get(u.ndim, ("matrix", 1))
        if role == "vector":
            b1, b2 = vector_betas
            t = state["t"] = state.get("t", 0) + 1
            m = state["m"] = b1 * state.get("m", 0.0) + (1 - b1) * u
            v = state["v"] = b2 * state.get("v", 0.0) + (1 - b2) * u * u
            return np.sqrt(1 - b2**t) / (1 - b1**t) * m / (np.sqrt(v) + vector_eps)
        if role == "last":
            m = state.get("m", 0.0 * u)
            u = state["m"] = m + (1 - momentum) * (u - m)
        return sized(u, tuple(a for a in range(u.ndim) if a != (0 if fan_in else 1)), norm)

    return {"direction": direction}
