"""The five meanings of weight decay, and the write."""

import numpy as np


def into_gradient(g, p, *, weight_decay, mode):
    return g + weight_decay * p if mode == "l2" else g


def written(p, u, *, lr, lr_ref, weight_decay, mode):
    if mode == "decoupled":
        p = p * (1 - lr * weight_decay)
    elif mode == "independent":
        p = p * (1 - lr / lr_ref * weight_decay)
    elif mode == "cautious":
        p = np.where(np.sign(u) * np.sign(p) > 0, p * (1 - lr * weight_decay), p)
    return p - lr * u
