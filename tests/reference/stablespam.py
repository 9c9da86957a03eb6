"""Stable-SPAM's direction, as corrected or with the authors' quirks; and its two clips alone."""

import numpy as np


def clipped(g, state, n, gamma):
    largest = np.abs(g).max() if g.size else 0.0
    if np.isfinite(largest):
        state["M"] = gamma * state.get("M", 0.0) + (1 - gamma) * largest
    limit = state.get("M", 0.0) / (1 - gamma**n)
    return np.where(np.abs(g) > limit, g / largest * limit, g) if largest > 0 else g


def normed(g, state, n, g1, g2, eps):
    norm = np.sqrt((g * g).astype(np.float64).sum())
    if np.isfinite(norm):
        state["n1"] = g1 * state.get("n1", 0.0) + (1 - g1) * norm
        state["n2"] = g2 * state.get("n2", 0.0) + (1 - g2) * norm**2
    target = state.get("n1", 0.0) / (1 - g1**n) / (np.sqrt(state.get("n2", 0.0) / (1 - g2**n)) + eps)
    return (g * (target / norm)).astype(g.dtype) if norm > 0 else g


def adaclip(grads, states, *, gamma=0.999):
    for state in states:
        state["n"] = state.get("n", 0) + 1
    return [clipped(g, state, state["n"], gamma) for g, state in zip(grads, states, strict=True)]


def adagn(grads, states, *, gammas=(0.7, 0.9)):
    for state in states:
        state["n"] = state.get("n", 0) + 1
    return [normed(g, state, state["n"], *gammas, 1e-8) for g, state in zip(grads, states, strict=True)]


def cosine(t, total_steps, eta_min, official_quirks):
    if not total_steps:
        return 1.0
    at = t if official_quirks else min(t, total_steps + 1)
    return eta_min + (1 - eta_min) * (1 + np.cos(np.pi * at / (total_steps + 1))) / 2


def links(*, betas=(0.9, 0.999), eps=1e-8, gammas=(0.7, 0.9, 0.999), total_steps=None, eta_min=0.5, reset_every=1000,
          amsgrad=False, official_quirks=False):  # fmt: skip
    (beta1, beta2), (g1, g2, g3) = betas, gammas

    def filtered(grads, states):
        out = []
        for g, state in zip(grads, states, strict=True):
            t = state["clock"]
            n = state["n"] = state.get("n", 0) + 1
            s = cosine(t, total_steps, eta_min, official_quirks)
            out.append(normed(clipped(g, state, n, g3), state, n, g1 * s, g2, eps))
            if official_quirks and reset_every and t % reset_every == 0:
                state["n"] = 1
        return out

    def direction(g, state):
        t = state["clock"]
        b1 = beta1 * cosine(t, total_steps, eta_min, official_quirks)
        resets = reset_every and t % reset_every == 0
        k = state["k"] = 1 if resets else state.get("k", 0) + 1
        if resets and not official_quirks:
            state["m"] = state["v"] = state["v_max"] = np.zeros_like(g)
        m = state["m"] = b1 * state.get("m", 0.0) + (1 - b1) * g
        v = state["v"] = beta2 * state.get("v", 0.0) + (1 - beta2) * (g * g)
        if amsgrad:
            v = state["v_max"] = np.maximum(state.get("v_max", 0.0), v)
        if resets and official_quirks:
            state["m"] = state["v"] = np.zeros_like(g)
        return m / (1 - b1**k) / (np.sqrt(v / (1 - beta2**k)) + eps)

    return {"direction": direction, "filters": (filtered,)}
