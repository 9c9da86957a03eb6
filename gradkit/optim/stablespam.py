"""Stable-SPAM: SPAM with limits and norms that adapt. Huang et al. 2025, https://arxiv.org/abs/2502.17055v2"""

import math
from typing import Any, ClassVar

from typing_extensions import Unpack

from ..chain import Chain, chain
from ..ops import where
from ..optimizer import Optimizer
from ..options import FRACTION, STEPS, Number, Options, Range
from ..transform import Stage, derive, rule
from ..transforms.stable import (
    adaclip_scalars,
    adagn_scalars,
    largest_entry,
    norm_of_each,
    shrink_spikes,
    to_target,
)
from .adamw import adam, adam_scalars, amsgrad
from .spam import reset_moments


@rule(uses=("max_exp_avg_sq",), stage=Stage.PRECONDITION)
def reset_maximum(u, max_exp_avg_sq, reset):
    return u, where(reset > 0.5, 0.0, max_exp_avg_sq)


@derive("step", "stat_step")
def stablespam_scalars(betas, gammas, eps, step, stat_step, clock, total_steps, eta_min, reset_every, official_quirks):
    b1, b2 = betas
    g1, g2, g3 = gammas
    if total_steps:  # the authors' cosine comes back up after its end
        t = clock if official_quirks else min(clock, total_steps + 1)
        s = eta_min + (1 - eta_min) * (1 + math.cos(math.pi * t / (total_steps + 1))) / 2
        b1, g1 = b1 * s, g1 * s
    resets = bool(reset_every) and clock % reset_every == 0
    k = 1.0 if resets else step
    n = step if official_quirks else stat_step  # theirs is one counter, set back after the gradient was measured
    measured = {**adaclip_scalars(g3, n), **adagn_scalars((g1, g2), n)}
    count = clock // reset_every if reset_every else 0
    return {**measured, **adam_scalars((b1, b2), eps, k), "reset": resets, "step": k, "resets": count}


class StableSPAM(Optimizer):
    r"""Adam behind a limit for spikes and a norm that adapt, with momentum reset.

        M <- g3 M + (1 - g3) max|g|            g <- g M / max|g|                        where |g| > M; each tensor
        n1 <- g1 n1 + (1 - g1) |g|        n2 <- g2 n2 + (1 - g2) |g|^2        g <- g / |g| n1 / (sqrt(n2) + eps)
        m, v <- 0                              every `reset_every` steps
        p <- (1 - lr weight_decay) p - lr Adam(g)

    M, n1, n2 are bias-corrected, and are not reset. With `total_steps` b1 and g1 fall along a cosine to `eta_min` of
    their values.

    lr: about the change of every weight per step.
    betas: decay of the mean and of the mean square per step.
    eps: floor of the denominators, in units of the gradient.
    gammas: decay per step of the norm, of its square and of the largest entry.
    total_steps: length of the run, for the cosine. eta_min: what is left of b1 and g1 at its end.
    reset_every: steps between resets; None: never.
    official_quirks: the authors' numbers: a reset sets back the counts of the averages too and uses the old moments
        once more, the cosine rises again after `total_steps`, the maximum of `amsgrad` outlives a reset.
    """

    ranges: ClassVar = {
        "gammas": FRACTION,
        "total_steps": STEPS._replace(optional=True),
        "reset_every": STEPS._replace(optional=True),
        "eta_min": Range("a number in [0, 1]", 0, 1.0000001),
    }

    def __init__(
        self,
        params: Any,
        lr: Number = 1e-3,
        betas: tuple[Number, Number] = (0.9, 0.999),
        eps: Number = 1e-8,
        weight_decay: Number = 0.0,
        *,
        gammas: tuple[float, float, float] = (0.7, 0.9, 0.999),
        total_steps: int | None = None,
        eta_min: float = 0.5,
        reset_every: int | None = 1000,
        amsgrad: bool = False,
        official_quirks: bool = False,
        **options: Unpack[Options],
    ):
        own: dict[str, Any] = {"gammas": gammas, "total_steps": total_steps, "eta_min": eta_min}
        own |= {"reset_every": reset_every, "amsgrad": amsgrad, "official_quirks": official_quirks}
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **own, **options)

    def links(self, group: Any) -> Chain:
        reset = [reset_moments] * bool(group["reset_every"])
        largest = [reset_maximum] * bool(group["amsgrad"] and reset and not group["official_quirks"])
        direction = [amsgrad if group["amsgrad"] else adam]
        tail = [*direction, *reset] if group["official_quirks"] else [*reset, *largest, *direction]
        return chain(largest_entry, shrink_spikes, norm_of_each, to_target, *tail, derive=stablespam_scalars)
