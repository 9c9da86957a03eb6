"""Masks of the update: Cautious Optimizers. Liang et al. 2024, https://arxiv.org/abs/2411.16085"""

from ..chain import Chain, chain
from ..ops import isfinite, maximum, sign, where
from ..transform import Stage, measure, rule


def cautious_gain(kept):
    return 1.0 / maximum(kept, 1e-3)


@measure(scope="tensor", reduce={"kept": "mean"}, gives=("gain",), finish=cautious_gain, stage=Stage.UPDATE)
def agreement(u, g):
    return maximum(sign(u) * sign(g), 0.0)


@rule(stage=Stage.UPDATE)
def keep_agreeing(u, g, gain):
    return where(sign(u) * sign(g) > 0.0, u * gain, where(isfinite(u), 0.0, u))


def cautious(name: str | None = None) -> Chain:
    """Drop the entries of the update that point against the gradient, and scale the rest up to the same mean size.

    u <- u [u g > 0] / max(mean over the tensor of [u g > 0], 0.001)

    An update that is not finite passes: hiding it would freeze the weight in silence.
    """
    return chain(agreement, keep_agreeing, name="cautious").named(name)
