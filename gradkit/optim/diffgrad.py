"""diffGrad: Adam that slows down where the gradient stops changing. Dubey et al. 2019, https://arxiv.org/abs/1909.11015"""

from typing import Any

from typing_extensions import Unpack

from ..chain import Chain, chain
from ..ops import absolute, lerp, sigmoid, sqrt
from ..optimizer import Optimizer
from ..options import Number, Options
from ..transform import Stage, derive, rule


@rule(slots=("exp_avg", "exp_avg_sq", "previous_grad"), stage=Stage.PRECONDITION)
def diffgrad(u, exp_avg, exp_avg_sq, previous_grad, w1, k2, w2, a, e):
    """Adam's direction times a friction between 1/2 (the gradient stands still) and 1."""
    exp_avg = lerp(exp_avg, u, w1)
    exp_avg_sq = exp_avg_sq * k2 + w2 * u * u
    friction = sigmoid(absolute(previous_grad - u))
    return friction * exp_avg * a / (sqrt(exp_avg_sq) + e), exp_avg, exp_avg_sq, u


@derive("step")
def diffgrad_scalars(betas, eps, step):
    b1, b2 = betas
    return {"w1": 1 - b1, "k2": b2, "w2": 1 - b2, "a": (1 - b2**step) ** 0.5 / (1 - b1**step), "e": eps}


class DiffGrad(Optimizer):
    r"""Adam with a friction from the change of the gradient, as the authors' diffGrad_v2.

        m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2        x = sigmoid(|g_before - g|)
        p <- p - lr sqrt(1 - b2^t) / (1 - b1^t) x m / (sqrt(v) + eps)

    The authors' first file let g_before alias g, so that x was 1/2 from the second step on, in their published runs
    too. `decay` is "l2" as in their code, and g_before then includes it. The friction depends on the gradient's scale:
    where gradients are tiny, x is 1/2 everywhere.

    lr: about the change of every weight per step, before the friction.
    betas: decay of the mean and of the mean square per step.
    eps: floor of the uncorrected denominator, in units of the gradient.
    """

    def __init__(
        self,
        params: Any,
        lr: Number = 1e-3,
        betas: tuple[Number, Number] = (0.9, 0.999),
        eps: Number = 1e-8,
        weight_decay: Number = 0.0,
        **options: Unpack[Options],
    ):
        options.setdefault("decay", "l2")
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **options)

    def links(self, group: Any) -> Chain:
        return chain(diffgrad, derive=diffgrad_scalars)
