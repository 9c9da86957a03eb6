"""Pascanu's regulariser and its gradient, one state of one sequence at a time; `weight` is [out, in]."""

import numpy as np

SLOPES = {
    "tanh": lambda h: 1 - h**2,
    "sigmoid": lambda h: h * (1 - h),
    "relu": lambda h: np.where(h > 0, 1.0, 0.0),
    "linear": lambda h: np.ones_like(h),
}


def penalty(hidden, grads, weight, nonlinearity, squared):
    total, gradient, count = 0.0, np.zeros_like(weight), 0
    for place in np.ndindex(hidden.shape[:-1]):
        delta, back = grads[place], grads[place] * SLOPES[nonlinearity](hidden[place])
        if (delta**2).sum() < 1e-20:
            continue
        x = weight.T @ back
        size, whole = np.sqrt((x**2).sum()), np.sqrt((delta**2).sum())
        ratio = size / whole
        slope = np.outer(back, x) / (size * whole)  # of the ratio by the weight
        if squared:
            ratio, slope = ratio**2, 2 * ratio * slope
        total, gradient, count = total + (ratio - 1) ** 2, gradient + 2 * (ratio - 1) * slope, count + 1
    return total / count, gradient / count
