"""How a pass runs. A backend belongs to a batch: `begin()` a step, `reduce(pass) -> totals` and `apply(pass)`."""

from typing import TYPE_CHECKING

import torch

from . import native, triton
from .chunked import Chunked
from .eager import Eager
from .native import Native
from .triton import Triton

__all__ = ["Chunked", "Eager", "Native", "Triton", "choose"]

if TYPE_CHECKING:
    from ..plan import Batch


def choose(asked: str, batch: "Batch") -> tuple[type[Eager | Native | Triton], str]:
    """The backend of a batch, and why; one that the user named and that can't run raises."""
    if batch.detour:
        return Eager, batch.detour
    if asked in ("eager", "chunked"):
        return Eager if asked == "eager" else Chunked, "asked for"
    wanted = ("native" if batch.device.type == "cpu" else "triton") if asked == "auto" else asked
    reason = native.why_not(batch) if wanted == "native" else triton.why_not(batch)
    if reason and asked != "auto":
        raise RuntimeError(f"backend={asked!r} can't run: {reason}; use backend='auto'")
    if reason:
        return Chunked, reason
    if wanted == "triton" and batch.compute == torch.float64:
        return Eager, "float64, and Triton runs rules in float32"
    return Native if wanted == "native" else Triton, "auto" if asked == "auto" else "asked for"
