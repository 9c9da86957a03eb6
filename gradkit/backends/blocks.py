"""How tensors are cut into blocks, which threads or a GPU's multiprocessors take."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ..plan import Units
    from ..selection import Choice


def blocks_of(sizes: Sequence[int] | np.ndarray, chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (tensor, number of its chunk), and how many each tensor has."""
    counts = -(-np.array(sizes, np.int64) // chunk)
    tensor = np.repeat(np.arange(len(counts)), counts)
    return np.ascontiguousarray(np.stack([tensor, steps(counts)], 1).astype(np.int32)), counts


def steps(counts: np.ndarray) -> np.ndarray:
    """0, 1, ... for each count, one after the other."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1).astype(np.int64)  # of each byte


def first_selected(choices: "Sequence[Choice]", chunk: int) -> np.ndarray:
    """How many elements of its tensor are selected before each chunk."""
    first = []
    for x in choices:
        counts = np.add.reduceat(ONES[x.bits], np.arange(0, x.shape.numel(), chunk) // 8)
        first.append(np.cumsum(counts) - counts)
    return np.concatenate(first)


STRIP = 512  # elements side by side in a box that takes the same units from many lines


def box_of(units: "Units", size: int) -> tuple[int, int, int]:
    """The shape (outer, units, inner) of boxes of about `size` elements, into which a tensor's units are cut."""
    inner = max(1, min(units.inner, size))
    wide = max(1, size // inner if units.outer == 1 else min(size, STRIP) // inner)
    count = max(1, min(units.number, wide))
    return max(1, min(units.outer, size // (count * inner))), count, inner


def corners(units: "Units", box: tuple[int, int, int]) -> Iterator[tuple[int, int, int]]:
    """Where its boxes begin: those of the same units one after the other."""
    o, u, i = box
    for unit in range(0, units.number, u):
        for outer in range(0, units.outer, o):
            yield from ((outer, unit, inner) for inner in range(0, units.inner, i))
