"""The chain as one Triton kernel a pass, launched once for all tensors of a batch."""

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from torch import Tensor

from ..language import RuleError

if TYPE_CHECKING:
    from ..plan import Batch, Pass


@cache
def missing() -> str:
    """Why Triton can't be imported; empty if it can."""
    try:
        from .. import triton_kernels  # noqa: F401  # here, for importing gradkit must not import triton
    except ImportError as e:
        return f"triton can't be imported: {e}"
    return ""


def why_not(batch: "Batch") -> str:
    """Why Triton can't run this batch; empty if it can."""
    if batch.device.type not in ("cuda", "cpu"):
        return f"Triton runs on CUDA and ROCm devices, these parameters are on {batch.device}"
    if reason := missing():
        return reason
    from ..triton_kernels import memory, source

    if batch.device.type == "cpu" and not memory.INTERPRETED.value:
        return f"Triton needs a GPU, these parameters are on {batch.device}"
    try:
        for ps in batch.program.passes:
            (source.measure if ps.measure else source.apply)(batch.kind, ps)
    except RuleError as e:
        return str(e)
    return ""


class Triton:
    name = "triton"

    def __init__(self, batch: "Batch"):
        from ..triton_kernels import launch

        self.batch, self.kernels = batch, launch.Kernels(batch)

    def begin(self) -> None:
        """Send the step's tables."""
        self.kernels.begin()

    def reduce(self, ps: "Pass") -> Tensor:
        """The totals of the pass's measure, float64 [tensors, reductions]."""
        return self.kernels.totals(ps)

    def apply(self, ps: "Pass") -> None:
        """Run the whole chain and store the parameters and slots."""
        self.kernels.apply()


def measured(parts: "Sequence[tuple[Batch, Pass]]") -> bool:
    """Reduce a measure and give its results, by one launch a batch, if all are run here and on one device."""
    device = parts[0][0].device
    own = [(b.backend.kernels, ps) for b, ps in parts if isinstance(b.backend, Triton) and b.device == device]
    if len(own) < len(parts):
        return False
    from ..triton_kernels import launch

    launch.measure(own)
    return True
