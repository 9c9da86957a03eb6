"""SPAM: Adam that cuts spikes of the gradient and forgets its momentum. Huang et al. 2025, https://arxiv.org/abs/2501.06842"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import Unpack

from ..chain import Chain, Split, chain
from ..ops import sign, sqrt, where
from ..optimizer import Optimizer
from ..options import COUNT, NOT_NEGATIVE, STEPS, Number, Options
from ..selection import SHARE, nothing, scattered
from ..transform import Stage, derive, rule
from .adamw import adam


@rule(uses=("exp_avg", "exp_avg_sq"), stage=Stage.PRECONDITION)
def reset_moments(u, exp_avg, exp_avg_sq, reset):
    return u, where(reset > 0.5, 0.0, exp_avg), where(reset > 0.5, 0.0, exp_avg_sq)


@rule(uses=("exp_avg_sq",), stage=Stage.PRECONDITION, counts="spikes")
def clip_spikes(u, exp_avg_sq, threshold, clipping, floor):
    """Cut what exceeds the mean square of the steps before, where there is one."""
    limit = threshold * exp_avg_sq
    spike = (clipping > 0.5) & (exp_avg_sq > floor) & (u * u > limit)
    return where(spike, sign(u) * sqrt(limit), u), exp_avg_sq


@derive("step")
def spam_scalars(
    betas, eps, lr, weight_decay, decay, step, clock, threshold, reset_every, warmup_after_reset, clip_free_steps,
    correct_bias, reset_bias_correction, clip_zero_variance, official_quirks,
):  # fmt: skip
    b1, b2 = betas
    since = clock % reset_every if reset_every else clock  # the last reset, or the start
    resets = bool(reset_every) and since == 0
    k = 1.0 if resets and reset_bias_correction else step
    a = (1 - b2**k) ** 0.5 / (1 - b1**k) if correct_bias else 1.0
    if since < clock and since < warmup_after_reset:  # not after the start
        a *= 1 - 0.99 * (1 + math.cos(math.pi * since / (warmup_after_reset + 1))) / 2
    if official_quirks and decay == "decoupled":  # they decay what they have updated, the update included
        a *= 1 - lr * weight_decay
    return {
        "w1": 1 - b1, "k2": b2, "w2": 1 - b2, "a": a, "b": 1.0, "e": eps,
        "reset": resets, "threshold": threshold or 0.0, "clipping": since >= clip_free_steps,
        "floor": -1.0 if clip_zero_variance or official_quirks else 0.0,
        "step": k, "resets": clock // reset_every if reset_every else 0,
    }  # fmt: skip


@derive()
def with_reset(reset_every, clock):
    return {"refresh": clock // reset_every if reset_every else 0}


class SPAM(Optimizer):
    r"""Spike-aware Adam with momentum reset.

        m, v <- 0                                  every `reset_every` steps
        g <- sign(g) sqrt(threshold v)             where g^2 > threshold v > 0, not in the steps right after a reset
        m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
        p <- (1 - lr weight_decay) p - lr s sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps)

    s rises from 0.01 to 1 along a cosine after each reset, and is 1 before the first. t is not reset, as in the
    authors' code, so that steps after a reset are up to 6.5 times Adam's before s damps them: over 500 steps 1.5 to
    1.9 times Adam's in the mean. Compare with Adam at such a learning rate, or set `reset_bias_correction`.

    lr: about the change of every weight per step.
    betas: decay of the mean and of the mean square per step.
    eps: floor of the uncorrected denominator, in units of the gradient.
    threshold: a spike's square over the mean square before it; None: nothing is cut.
    reset_every: steps between resets; None: never.
    warmup_after_reset: steps until s is 1. clip_free_steps: steps without a cut at the start and after each reset.
    density: the share of the entries of each matrix that is trained, with state for them alone; another at each reset.
        None: all. Decay is of all entries. Tensors of one axis are trained whole.
    clip_zero_variance: also cut where v = 0, which freezes weights whose gradients were 0 until then.
    official_quirks: the authors' numbers: that, decay after the update, and with a density none, and after the first
        reset as many entries as chance gives.
    """

    ranges: ClassVar = {
        "threshold": NOT_NEGATIVE._replace(optional=True),
        "reset_every": STEPS._replace(optional=True),
        "warmup_after_reset": COUNT,
        "clip_free_steps": COUNT,
        "density": SHARE._replace(optional=True),
    }

    def __init__(
        self,
        params: Any,
        lr: Number = 1e-3,
        betas: tuple[Number, Number] = (0.9, 0.999),
        eps: Number = 1e-6,
        weight_decay: Number = 0.0,
        *,
        threshold: float | None = 5000.0,
        reset_every: int | None = 500,
        warmup_after_reset: int = 150,
        clip_free_steps: int = 20,
        correct_bias: bool = True,
        reset_bias_correction: bool = False,
        density: float | None = None,
        clip_zero_variance: bool = False,
        official_quirks: bool = False,
        **options: Unpack[Options],
    ):
        own: dict[str, Any] = {"threshold": threshold, "reset_every": reset_every}
        own |= {"warmup_after_reset": warmup_after_reset, "clip_free_steps": clip_free_steps}
        own |= {"correct_bias": correct_bias, "reset_bias_correction": reset_bias_correction, "density": density}
        own |= {"clip_zero_variance": clip_zero_variance, "official_quirks": official_quirks}
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **own, **options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict):
            group = {**self.defaults, **param_group}
            if group["official_quirks"] and group["density"] is not None:
                param_group["decay"] = "none"
        super().add_param_group(param_group)

    def check_parameter(self, p: Tensor, group: Mapping[str, Any]) -> None:
        if group["density"] is not None and (how := scattered(p)):
            raise ValueError(
                f"{type(self).__name__}: a parameter of shape {tuple(p.shape)} is {how}, and density="
                f"{group['density']} takes single entries of whole tensors: use density=None in its group"
            )

    def links(self, group: Any) -> Chain:
        before = [reset_moments] * bool(group["reset_every"]) + [clip_spikes] * bool(group["threshold"])
        whole = chain(*before, adam, derive=spam_scalars)
        if group["density"] is None:
            return whole
        order = "bernoulli" if group["official_quirks"] else "random"
        return chain(Split("randk", whole, chain(nothing), order, keep="counts"), derive=with_reset)
