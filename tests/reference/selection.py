"""What a split selects, in Python's own integers; and the generator behind it, from the paper's picture of a round."""

import zlib
from functools import lru_cache
from itertools import groupby

import numpy as np


def philox(element, step, index, seed, stream):
    """Philox-4x32-7: four words."""
    left, right, key = [element % 2**32, step], [element // 2**32, index], [seed, stream]
    for _ in range(7):
        products = [0xD2511F53 * left[0], 0xCD9E8D57 * left[1]]
        high, low = [x // 2**32 for x in products], [x % 2**32 for x in products]
        left, right = [high[1] ^ right[0] ^ key[0], high[0] ^ right[1] ^ key[1]], [low[1], low[0]]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return left[0], right[0], left[1], right[1]


def smallest(kind, number, index, count, k, seed=0):
    """The k of `count` with the smallest random numbers."""
    stream = zlib.crc32(kind.encode())
    keys = [philox(i // 4, number, index, seed, stream)[i % 4] for i in range(count)]
    return sorted(sorted(range(count), key=lambda i: keys[i])[:k])


def blocks(order, number, group, count, density, seed=0):
    """Which tensors of a group."""
    k = round(count * density)
    if order == "random":
        return smallest("blocks", number, group, count, k, seed)
    if order == "mirror":
        return [i for j in range(k // 2) for p in [(number * (k // 2) + j) % (count // 2)] for i in (p, count - 1 - p)]
    up = [(number * k + j) % count for j in range(k)]
    return up if order == "ascending" else [count - 1 - i for i in up]


@lru_cache
def selected(kind, number, at, shapes, density, order="random", seed=0):
    """Where the parameter `at` is selected; groups are runs of parameters with, and without, two axes or more."""
    shape = shapes[at]
    if len(shape) < 2:
        return np.ones(shape, bool)
    if kind == "blocks":
        runs = [[i for i, _ in run] for _, run in groupby(enumerate(shapes), lambda x: len(x[1]) > 1)]
        group = next(n for n, run in enumerate(runs) if at in run)
        mine = [runs[group][j] for j in blocks(order, number, group, len(runs[group]), density, seed)]
        return np.full(shape, at in mine)
    lines, length = shape[0], int(np.prod(shape[1:]))
    count = {"columns": length, "rows": lines, "randk": lines * length}[kind]
    picks = smallest(kind, number, at, count, int(count * density), seed)
    chosen = np.zeros(count, bool)
    chosen[picks] = True
    grid = chosen.reshape({"columns": (1, -1), "rows": (-1, 1), "randk": (lines, length)}[kind])
    return np.broadcast_to(grid, (lines, length)).reshape(shape)
