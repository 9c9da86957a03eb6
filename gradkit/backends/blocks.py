"""How tensors are cut into blocks, which threads or a GPU's multiprocessors take."""

from collections.abc import Sequence

import numpy as np


def blocks_of(sizes: Sequence[int] | np.ndarray, chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (tensor, number of its chunk), and how many each tensor has."""
    counts = -(-np.array(sizes, np.int64) // chunk)
    tensor = np.repeat(np.arange(len(counts)), counts)
    return np.ascontiguousarray(np.stack([tensor, steps(counts)], 1).astype(np.int32)), counts


def steps(counts: np.ndarray) -> np.ndarray:
    """0, 1, ... for each count, one after the other."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
