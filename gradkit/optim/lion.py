"""Lion: the sign of an interpolated momentum. Chen et al. 2023, https://arxiv.org/abs/2302.06675"""

from typing import Any

from typing_extensions import Unpack

from ..chain import Chain, chain
from ..ops import lerp, sign
from ..optimizer import Optimizer
from ..options import Number, Options
from ..transform import Stage, derive, rule


@rule(slots=("exp_avg",), stage=Stage.PRECONDITION)
def lion(u, exp_avg, w1, w2):
    """Sign of the momentum seen through beta1; the momentum itself moves by beta2."""
    return sign(lerp(exp_avg, u, w1)), lerp(exp_avg, u, w2)


@derive()
def lion_scalars(betas):
    return {"w1": 1 - betas[0], "w2": 1 - betas[1]}


class Lion(Optimizer):
    r"""EvoLved Sign Momentum.

        c = b1 m + (1 - b1) g        p <- (1 - lr weight_decay) p - lr sign(c)        m <- b2 m + (1 - b2) g

    sign(0) = 0, and sign(NaN) = 0 as in torch: a NaN gradient freezes its weight.

    lr: the change of every weight per step; 3 to 10 times smaller than for AdamW.
    betas: how much of the momentum is in the direction, and its decay per step.
    weight_decay: 3 to 10 times larger than for AdamW, so that lr * weight_decay stays.
    """

    def __init__(
        self,
        params: Any,
        lr: Number = 1e-4,
        betas: tuple[Number, Number] = (0.9, 0.99),
        weight_decay: Number = 0.0,
        **options: Unpack[Options],
    ):
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay, **options)

    def links(self, group: Any) -> Chain:
        return chain(lion, derive=lion_scalars)
