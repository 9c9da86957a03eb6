"""AdEMAMix: AdamW with a second, slow momentum. Pagliardini et al. 2024, https://arxiv.org/abs/2409.03137"""

import math
from typing import Any, ClassVar

import torch
from typing_extensions import Unpack

from ..chain import Chain, chain
from ..ops import lerp, sqrt
from ..optimizer import Optimizer
from ..options import NOT_NEGATIVE, STEPS, Number, Options
from ..transform import Slot, Stage, derive, rule

SLOW = Slot("exp_avg_slow", dtype=torch.float32)  # bfloat16 would lose increments of 1e-4


@rule(slots=("exp_avg", SLOW, "exp_avg_sq"), stage=Stage.PRECONDITION)
def ademamix(u, exp_avg, exp_avg_slow, exp_avg_sq, w1, k2, w2, w3, alpha_t, a, b, e):
    exp_avg = lerp(exp_avg, u, w1)
    exp_avg_slow = lerp(exp_avg_slow, u, w3)
    exp_avg_sq = exp_avg_sq * k2 + w2 * u * u
    return (exp_avg * a + alpha_t * exp_avg_slow) / (sqrt(exp_avg_sq) * b + e), exp_avg, exp_avg_slow, exp_avg_sq


@rule(slots=(SLOW, "exp_avg_sq"), stage=Stage.PRECONDITION)
def ademamix_without_fast(u, exp_avg_slow, exp_avg_sq, k2, w2, w3, alpha_t, b, e):
    """beta1 = 0: the gradient itself is the fast momentum."""
    exp_avg_slow = lerp(exp_avg_slow, u, w3)
    exp_avg_sq = exp_avg_sq * k2 + w2 * u * u
    return (u + alpha_t * exp_avg_slow) / (sqrt(exp_avg_sq) * b + e), exp_avg_slow, exp_avg_sq


def half_life(beta):
    """Steps until a momentum has forgotten half; the authors' guard makes beta = 0 finite, and must not reach 1."""
    return math.log(0.5) / math.log(beta + 1e-8 if beta + 1e-8 < 1 else beta) - 1


@derive("step")
def ademamix_scalars(betas, alpha, eps, step, alpha_warmup, beta3_warmup):
    b1, b2, b3 = betas
    if alpha_warmup:
        alpha = alpha * min(1.0, step / alpha_warmup)
    if beta3_warmup and step < beta3_warmup:
        done = step / beta3_warmup
        b3 = 0.5 ** (1 / ((1 - done) * half_life(b1) + done * half_life(b3) + 1))
    corrected = {"a": 1 / (1 - b1**step), "b": (1 - b2**step) ** -0.5, "e": eps}
    return {"w1": 1 - b1, "k2": b2, "w2": 1 - b2, "w3": 1 - b3, "alpha_t": alpha, **corrected}


class AdEMAMix(Optimizer):
    r"""AdamW whose numerator mixes a fast and a slow momentum.

        m1 <- b1 m1 + (1 - b1) g        m2 <- b3(t) m2 + (1 - b3(t)) g        v <- b2 v + (1 - b2) g^2
        p <- (1 - lr weight_decay) p - lr (m1 / (1 - b1^t) + alpha(t) m2) / (sqrt(v / (1 - b2^t)) + eps)

    The slow momentum is not bias-corrected and stays float32 whatever `state_dtype`; with b1 = 0 there is no m1.

    lr: as for AdamW; a constant gradient moves a weight by up to (1 + alpha) lr.
    betas: decay per step of the fast momentum, the mean square and the slow momentum.
    alpha: weight of the slow momentum, 4 to 10 for language models.
    alpha_warmup, beta3_warmup: steps until alpha, and the slow momentum's half-life, have their values (linear).
    """

    ranges: ClassVar = {
        "alpha": NOT_NEGATIVE,
        "alpha_warmup": STEPS._replace(optional=True),
        "beta3_warmup": STEPS._replace(optional=True),
    }

    def __init__(
        self,
        params: Any,
        lr: Number = 1e-3,
        betas: tuple[Number, Number, Number] = (0.9, 0.999, 0.9999),
        alpha: Number = 5.0,
        eps: Number = 1e-8,
        weight_decay: Number = 0.0,
        *,
        alpha_warmup: int | None = None,
        beta3_warmup: int | None = None,
        **options: Unpack[Options],
    ):
        own: dict[str, Any] = {"alpha_warmup": alpha_warmup, "beta3_warmup": beta3_warmup}
        super().__init__(params, lr=lr, betas=betas, alpha=alpha, eps=eps, weight_decay=weight_decay, **own, **options)

    def links(self, group: Any) -> Chain:
        return chain(ademamix if group["betas"][0] else ademamix_without_fast, derive=ademamix_scalars)
