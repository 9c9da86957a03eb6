"""AdEMAMix's direction, with the warm-ups of the authors' torch file: beta3 is linear in its half-life."""

import math

import numpy as np


def half_life(beta):
    return math.log(0.5) / math.log(beta + 1e-8) - 1


def direction(g, state, *, betas=(0.9, 0.999, 0.9999), alpha=5.0, eps=1e-8, alpha_warmup=None, beta3_warmup=None):
    beta1, beta2, beta3 = betas
    t = state["t"] = state.get("t", 0) + 1
    if alpha_warmup is not None and t < alpha_warmup:
        alpha = alpha * t / alpha_warmup
    if beta3_warmup is not None and t < beta3_warmup:
        share = t / beta3_warmup
        beta3 = 0.5 ** (1 / ((1 - share) * half_life(beta1) + share * half_life(beta3) + 1))
    fast = state["fast"] = beta1 * state.get("fast", 0.0) + (1 - beta1) * g
    slow = state["slow"] = beta3 * state.get("slow", 0.0) + (1 - beta3) * g
    v = state["v"] = beta2 * state.get("v", 0.0) + (1 - beta2) * (g * g)
    return (fast / (1 - beta1**t) + alpha * slow) / (np.sqrt(v) / (1 - beta2**t) ** 0.5 + eps)
