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
    except Exception as e:  # also what a broken installation raises
        return f"triton can't be imported: {e}"
    return ""


def why_not(batch: "Batch") -> str:
    """Why Triton can't run this batch; empty if it can, and then its kernels are compiled."""
    if batch.device.type not in ("cuda", "cpu"):
        return f"Triton runs on CUDA and ROCm devices, these parameters are on {batch.device}"
    if reason := missing():
        return reason
    from ..triton_kernels import launch, memory, source

    if memory.INTERPRETED.value != (batch.device.type == "cpu"):
        needed = "the CPU, for TRITON_INTERPRET is set" if memory.INTERPRETED.value else "a GPU or TRITON_INTERPRET=1"
        return f"Triton needs {needed}, these parameters are on {batch.device}"
    try:
        for ps in batch.program.passes:
            write = source.apply if not ps.measure else source.totals if batch.sharded else source.measure
            launch.prepare(batch.kind, ps, write)
    except RuleError as e:
        return str(e)
    except Exception as e:  # the compiler's, the driver's, a C compiler that Triton misses
        return f"{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e).strip() else 'no message'}"
    return ""


class Triton:
    name = "triton"

    def __init__(self, batch: "Batch"):
        from ..triton_kernels import launch

        self.batch, self.kernels = batch, launch.Kernels(batch)

    def begin(self) -> None:
        """Send the step's tables."""
        self.kernels.begin()

    def takes(self, ps: "Pass") -> bool:
        """Whether a measure has a pass of its own: each has."""
        return True

    def reduce(self, ps: "Pass") -> Tensor:
        """The totals of the pass's measure, float64 [tensors, reductions]."""
        return self.kernels.totals(ps)

    def apply(self, ps: "Pass") -> None:
        """Run the whole chain and store the parameters and slots."""
        self.kernels.apply()


def measured(parts: "Sequence[tuple[Batch, Pass]]") -> bool:
    """Reduce a measure and give its results, by one launch a batch, if all run here, and on one device if all count."""
    own = [(b.backend.kernels, ps) for b, ps in parts if isinstance(b.backend, Triton)]
    devices = {b.device for b, _ in parts}
    if len(own) < len(parts) or (len(devices) > 1 and parts[0][1].measure.link.scope == "all"):
        return False
    from ..triton_kernels import launch

    launch.measure(own)
    return True
