"""Filters of the gradient over time: Grokfast's two. Lee et al. 2024, https://arxiv.org/abs/2405.20233"""

from typing import Any

import torch

from ..chain import Chain, chain
from ..ops import lerp, where
from ..options import FRACTION, NOT_NEGATIVE, STEPS, check_choice, check_flag
from ..transform import Slot, derive, rule

STARTS = ("first", "zero")
AVERAGES = ("mean", "sum")
RING = Slot("grad_ring", kind="ring", length="window")
HEAD, TAIL = Slot("grad_head", dtype=torch.float32), Slot("grad_tail", dtype=torch.float32)


@rule(slots=("grad_ema",))
def ema_filter(u, grad_ema, w, lamb, first):
    grad_ema = where(first > 0.5, u, lerp(grad_ema, u, w))
    return u + lamb * grad_ema, grad_ema


@derive("filter_step")  # its own count: behind moments taken from another optimizer the filter is still new
def ema_from_first(alpha, filter_step):
    return {"w": 1 - alpha, "first": filter_step == 1}


@derive()
def ema_from_zero(alpha):
    return {"w": 1 - alpha, "first": False}


@rule(slots=(RING, HEAD, TAIL))
def ma_filter(u, grad_ring, grad_head, grad_tail, wrap, factor):
    """head: the sum since the ring last wrapped; tail: what is left of the round before. A running sum would keep one
    spike's rounding error for ever; here nothing stays longer than two windows."""
    grad_tail = where(wrap > 0.5, grad_head, grad_tail) - grad_ring
    grad_head = where(wrap > 0.5, 0.0, grad_head) + u
    return u + factor * (grad_head + grad_tail), u, grad_head, grad_tail


@derive("filter_step")
def ma_scalars(window, lamb, mode, warmup, filter_step):
    check_choice("grokfast_ma", "mode", mode, AVERAGES)  # a group may have been edited
    on = filter_step >= window or not warmup
    count = min(filter_step, window) if mode == "mean" else 1.0
    return {"wrap": (filter_step - 1) % window == 0, "factor": lamb / count if on else 0.0}


def grokfast_ema(alpha: float = 0.98, lamb: float = 2.0, init: str = "first", name: str | None = None) -> Chain:
    """Add the gradient's running average to it: e <- alpha e + (1 - alpha) g, g <- g + lamb e.

    alpha: decay of the average per step.
    lamb: weight of the average.
    init: "first", the average starts at the first gradient (the authors' code), or "zero".
    """
    check_choice("grokfast_ema", "init", init, STARTS)
    start = ema_from_first if init == "first" else ema_from_zero
    ranges = {"alpha": FRACTION, "lamb": NOT_NEGATIVE}
    return chain(ema_filter, derive=start, name="grokfast_ema", ranges=ranges, alpha=alpha, lamb=lamb).named(name)


def grokfast_ma(
    window: int = 100, lamb: float = 5.0, mode: str = "mean", warmup: bool = True, name: str | None = None
) -> Chain:
    """Add the mean (or sum) of the last `window` gradients: g <- g + lamb mean(g). State: `window` + 2 slots.

    warmup: leave the gradient alone until the window is full.
    """
    check_choice("grokfast_ma", "mode", mode, AVERAGES)
    check_flag("grokfast_ma", "warmup", warmup)
    arguments: dict[str, Any] = {"window": window, "lamb": lamb, "mode": mode, "warmup": warmup}
    ranges = {"window": STEPS, "lamb": NOT_NEGATIVE}
    return chain(ma_filter, derive=ma_scalars, name="grokfast_ma", ranges=ranges, **arguments).named(name)
