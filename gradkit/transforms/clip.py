"""Clipping of gradients: all together, each tensor, each value. Pascanu et al. 2013, https://arxiv.org/abs/1211.5063

Spikes of a value over time: Huang et al. 2025, https://arxiv.org/abs/2501.06842
Growth of a norm over time: Chen et al. 2024, https://arxiv.org/abs/2410.01623
"""

import math
from typing import Any

from ..chain import Chain, chain
from ..language import fn
from ..ops import absolute, isfinite, maximum, minimum, sign, sqrt, where
from ..options import FRACTION, LIMIT, Range
from ..transform import Stage, derive, measure, rule

BELOW = {"max_norm": LIMIT}


@rule(counts="clipped")
def scale(u, coef):
    return u * coef


@fn
def cut(u, limit):
    return where(absolute(u) > limit, sign(u) * limit, u)


@rule(counts="clipped")
def clip_value(u, limit):
    return cut(u, limit)


@rule(slots=("spike_sq",), counts="spikes")
def cut_spikes(u, spike_sq, limit, k2, w2):
    bound = limit * spike_sq
    u = where((spike_sq > 0.0) & (u * u > bound), sign(u) * sqrt(bound), u)
    return u, where(isfinite(u), spike_sq * k2 + w2 * u * u, spike_sq)


@derive("spike_step")
def spike_scalars(threshold, beta2, spike_step):
    before = 1 - beta2 ** (spike_step - 1)  # the bias of the mean square before this step
    return {"limit": threshold / before if before else 0.0, "k2": beta2, "w2": 1 - beta2}


def norm_coef(norm, max_norm):
    return minimum(max_norm / (norm + 1e-6), 1.0)


def l2_coef(total, max_norm):
    return minimum(max_norm / (sqrt(total) + 1e-6), 1.0)


@measure(scope="all", reduce={"norm": "sum"}, gives=("coef",), finish=norm_coef)
def magnitudes(u):
    return absolute(u)


@measure(scope="all", reduce={"total": "sum"}, gives=("coef",), finish=l2_coef)
def squares(u):
    return u * u


@measure(scope="all", reduce={"norm": "max"}, gives=("coef",), finish=norm_coef)
def largest(u):
    return absolute(u)


@measure(scope="tensor", reduce={"total": "sum"}, gives=("coef",), finish=l2_coef)
def squares_of_each(u):
    return u * u


def growth_coef(total, norm_before, gamma):
    norm = sqrt(total)
    grown = maximum(norm / (norm_before + 1e-8), gamma) / gamma
    coef = where(norm_before > 0.0, 1.0 / grown, 1.0)
    return coef, where(isfinite(norm), norm * coef, norm_before)


@measure(
    scope="tensor",
    reduce={"total": "sum"},
    state=("norm_before",),
    gives=("coef",),
    finish=growth_coef,
    stage=Stage.UPDATE,
)
def squares_of_updates(u):
    return u * u


def clip_by_global_norm(max_norm: float, norm_type: float = 2, name: str | None = None) -> Chain:
    """Scale all gradients together so that their norm is at most `max_norm`, as torch's `clip_grad_norm_`.

    g <- g min(1, max_norm / (|all g| + 1e-6))

    norm_type: 1, 2 or infinity. A NaN norm makes every gradient NaN, as there.
    """
    kinds = {1.0: magnitudes, 2.0: squares, math.inf: largest}
    if norm_type not in kinds:
        raise ValueError(f"clip_by_global_norm: norm_type={norm_type!r}: use 1, 2 or float('inf')")
    return chain(kinds[norm_type], scale, name="clip_by_global_norm", ranges=BELOW, max_norm=max_norm).named(name)


def clip_by_norm(max_norm: float, name: str | None = None) -> Chain:
    """Scale each tensor's gradient so that its own norm is at most `max_norm`.

    g <- g min(1, max_norm / (|g| + 1e-6))
    """
    return chain(squares_of_each, scale, name="clip_by_norm", ranges=BELOW, max_norm=max_norm).named(name)


def clip_by_value(limit: float, name: str | None = None) -> Chain:
    """Cut each entry of the gradient to [-limit, limit]."""
    return chain(clip_value, name="clip_by_value", ranges={"limit": LIMIT}, limit=limit).named(name)


def spike_clip(threshold: float = 5000.0, beta2: float = 0.999, name: str | None = None) -> Chain:
    """Cut each entry whose square exceeds `threshold` times the mean square of the entry's steps before.

    g <- sign(g) sqrt(threshold v)  where g^2 > threshold v > 0;        v <- beta2 v + (1 - beta2) g^2, bias-corrected

    SPAM's test for any optimizer, with a mean square of its own: one slot. A NaN passes, and is not counted.
    """
    arguments: dict[str, Any] = {"threshold": threshold, "beta2": beta2}
    ranges = {"threshold": LIMIT, "beta2": FRACTION}
    return chain(cut_spikes, derive=spike_scalars, name="spike_clip", ranges=ranges, **arguments).named(name)


def norm_growth_limit(gamma: float = 1.01, name: str | None = None) -> Chain:
    """Let the norm of each tensor's update grow by a factor of `gamma` in a step at most, as Fira does.

    u <- u min(1, gamma n / |u|);        n <- |u|, what is left of it

    The first update, and one behind an update of 0, is free.
    """
    ranges = {"gamma": Range("a number >= 1", 1, endless=True)}
    made = chain(squares_of_updates, scale, name="norm_growth_limit", ranges=ranges, gamma=gamma)
    return made.named(name)
