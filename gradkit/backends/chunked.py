"""The same calls on slices that stay in the cache: no temporaries of a parameter's size."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from .eager import Eager, Part

if TYPE_CHECKING:
    from ..plan import Pass

CACHED = 1 << 17  # elements on the CPU; 64K to 1M take the same time, 8K twice as long
LAUNCHED = 1 << 24  # elements elsewhere: few launches, and temporaries of 64 MiB


class Chunked(Eager):
    name = "chunked"

    def parts(self, ps: "Pass", t: int) -> Iterator[Part]:
        size = CACHED if self.batch.device.type == "cpu" else LAUNCHED
        for part in super().parts(ps, t):
            yield from part.pieces(size, self.batch.units[t], self.batch.rounding == "stochastic")
