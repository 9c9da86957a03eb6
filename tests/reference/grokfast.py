"""Grokfast's defaults: a filter of the gradient in front of Adam with beta2 = 0.98."""

from functools import partial

from tests.reference import grokfast_ema, grokfast_ma


def links(*, filter="ema", alpha=0.98, lamb=2.0, window=100, mode="mean", warmup=True):
    if filter == "ema":
        return (partial(grokfast_ema.filtered, alpha=alpha, lamb=lamb),)
    return (partial(grokfast_ma.filtered, window=window, lamb=lamb, mode=mode, warmup=warmup),)
