"""PCGrad and CAGrad as the papers have them, on flat gradients [tasks, elements] in float64, one task at a time."""

import itertools

import numpy as np


def pcgrad(grads, order, reduction="mean"):
    projected = grads.copy()
    for i, v in enumerate(projected):
        for j in order[i]:
            dot = v @ grads[j]
            if j != i and dot < 0:
                v -= dot / (grads[j] @ grads[j]) * grads[j]
    return projected.mean(0) if reduction == "mean" else projected.sum(0)


def cagrad(grads, c, rescale):
    """Downhill over the simplex in steps that are halved where none helps; what is minimised is convex."""
    mean = grads.mean(0)
    radius = c * np.linalg.norm(mean)

    def cost(w):
        return w @ grads @ mean + radius * np.linalg.norm(w @ grads)

    w, step = np.full(len(grads), 1 / len(grads)), 0.25
    moves = [np.array(m) for m in itertools.product((-1, 0, 1), repeat=len(grads)) if sum(m) == 0 and any(m)]
    while step > 1e-9:
        near = [w + step * m for m in moves if (w + step * m >= 0).all()]
        best = min(near, key=cost, default=w)
        if cost(best) < cost(w):
            w = best
        else:
            step /= 2
    worst = w @ grads
    return (mean + radius / np.linalg.norm(worst) * worst) / (1, 1 + c**2, 1 + c)[rescale]
