"""How a pass runs. A backend belongs to a batch and has two functions: `reduce(pass) -> totals` and `apply(pass)`."""

from typing import TYPE_CHECKING

from .chunked import Chunked
from .eager import Eager
from .native import Native, why_not

__all__ = ["Chunked", "Eager", "Native", "choose"]

if TYPE_CHECKING:
    from ..plan import Batch


def choose(asked: str, batch: "Batch") -> tuple[type[Eager | Native], str]:
    """The backend of a batch, and why; one that the user named and that can't run raises."""
    if asked == "triton":
        where = "needs a GPU, and these are" if batch.device.type == "cpu" else "is not in this version for parameters"
        raise RuntimeError(f"backend='triton' {where} on {batch.device}; use backend='auto'")
    if batch.detour:
        return Eager, batch.detour
    if asked == "eager":
        return Eager, "asked for"
    reason = "asked for"
    if asked != "chunked":
        reason = why_not(batch)
        if not reason:
            return Native, asked if asked == "auto" else "asked for"
        if asked == "native":
            raise RuntimeError(f"backend='native' can't run: {reason}; use backend='auto'")
    return Chunked, reason
