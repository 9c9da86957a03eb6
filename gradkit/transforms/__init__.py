"""Transforms of gradients and updates, for any optimizer: `transforms=[clip_by_global_norm(1.0)]`."""

from .agc import adaptive_clip
from .clip import clip_by_global_norm, clip_by_norm, clip_by_value, norm_growth_limit, spike_clip
from .column import column_normalize
from .filter import grokfast_ema, grokfast_ma
from .mask import cautious
from .stable import adaclip, adagn
from .tap import pixelwise_clip
from .zclip import zclip

__all__ = [
    "adaclip",
    "adagn",
    "adaptive_clip",
    "cautious",
    "clip_by_global_norm",
    "clip_by_norm",
    "clip_by_value",
    "column_normalize",
    "grokfast_ema",
    "grokfast_ma",
    "norm_growth_limit",
    "pixelwise_clip",
    "spike_clip",
    "zclip",
]
