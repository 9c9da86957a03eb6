"""AdamW: Adam with decoupled weight decay. Loshchilov & Hutter 2017, https://arxiv.org/abs/1711.05101"""

from typing import Any

from typing_extensions import Unpack

from ..chain import Chain, chain
from ..ops import lerp, maximum, sqrt
from ..optimizer import Optimizer
from ..options import Number, Options
from ..transform import Stage, derive, rule


@rule(slots=("exp_avg", "exp_avg_sq"), stage=Stage.PRECONDITION)
def adam(u, exp_avg, exp_avg_sq, w1, k2, w2, a, b, e):
    """Mean over root mean square; a and b hold the bias corrections.

    The mean square as k2 v + w2 g^2, not v + w2 (g^2 - v): one infinite square must not become inf - inf.
    """
    exp_avg = lerp(exp_avg, u, w1)
    exp_avg_sq = exp_avg_sq * k2 + w2 * u * u
    return exp_avg * a / (sqrt(exp_avg_sq) * b + e), exp_avg, exp_avg_sq


@rule(slots=("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), stage=Stage.PRECONDITION)
def amsgrad(u, exp_avg, exp_avg_sq, max_exp_avg_sq, w1, k2, w2, a, b, e):
    """Adam whose denominator never falls."""
    exp_avg = lerp(exp_avg, u, w1)
    exp_avg_sq = exp_avg_sq * k2 + w2 * u * u
    max_exp_avg_sq = maximum(max_exp_avg_sq, exp_avg_sq)
    return exp_avg * a / (sqrt(max_exp_avg_sq) * b + e), exp_avg, exp_avg_sq, max_exp_avg_sq


@derive("step")
def adam_scalars(betas, eps, step):
    b1, b2 = betas
    return {"w1": 1 - b1, "k2": b2, "w2": 1 - b2, "a": 1 / (1 - b1**step), "b": (1 - b2**step) ** -0.5, "e": eps}


class AdamW(Optimizer):
    r"""Adam with decoupled weight decay: the numbers of torch.optim.AdamW.

        m <- b1 m + (1 - b1) g            v <- b2 v + (1 - b2) g^2
        p <- (1 - lr weight_decay) p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    lr: about the change of every weight per step.
    betas: decay of the mean and of the mean square per step.
    eps: floor of the denominator, in units of the gradient.
    amsgrad: the denominator uses the largest v so far.
    """

    def __init__(
        self,
        params: Any,
        lr: Number = 1e-3,
        betas: tuple[Number, Number] = (0.9, 0.999),
        eps: Number = 1e-8,
        weight_decay: Number = 1e-2,
        amsgrad: bool = False,
        **options: Unpack[Options],
    ):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad, **options)

    def links(self, group: Any) -> Chain:
        return chain(amsgrad if group["amsgrad"] else adam, derive=adam_scalars)
