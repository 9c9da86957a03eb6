"""SPAM's direction: reset, cut, Adam with eps on the uncorrected root, and the warm-up after a reset."""

import numpy as np


def direction(g, state, *, betas=(0.9, 0.999), eps=1e-6, threshold=5000, reset_every=500, warmup_after_reset=150,
              clip_free_steps=20, correct_bias=True, reset_bias_correction=False, zero_variance=False):  # fmt: skip
    beta1, beta2 = betas
    t = state["clock"]
    since = t % reset_every
    if since == 0:
        state["m"] = state["v"] = np.zeros_like(g)
        if reset_bias_correction:
            state["k"] = 0
    k = state["k"] = state.get("k", 0) + 1
    v = state.get("v", np.zeros_like(g))
    if threshold and since >= clip_free_steps:
        spikes = g * g > threshold * v
        if not zero_variance:
            spikes &= v > 0
        g = np.where(spikes, np.sign(g) * np.sqrt(threshold * v), g)
    m = state["m"] = beta1 * state.get("m", 0.0) + (1 - beta1) * g
    v = state["v"] = beta2 * v + (1 - beta2) * (g * g)
    s = 1.0
    if t >= reset_every and since < warmup_after_reset:
        s = 1 - 0.99 * (1 + np.cos(np.pi * since / (warmup_after_reset + 1))) / 2
    if correct_bias:
        s *= (1 - beta2**k) ** 0.5 / (1 - beta1**k)
    return s * m / (np.sqrt(v) + eps)
