"""Between memory and registers: loads and stores of a tile, rounding to what memory holds, and the ends of reductions.

A tile is TILE elements of one tensor from `at` on; FULL says that all of them exist, 16-byte aligned.
"""

import triton
import triton.language as tl

from .ops import maximum

INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)  # its casts to bfloat16 truncate


@triton.jit
def widen(x):
    if INTERPRETED and x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """To the nearest value that DTYPE has, ties to even."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        u = x.to(tl.uint32, bitcast=True)
        near = (u + 0x7FFF + ((u >> 16) & 1)) >> 16
        return tl.where(x != x, 0x7FC0, near).to(tl.uint16).to(DTYPE, bitcast=True)
    else:
        return x.to(DTYPE)


@triton.jit
def stochastic(x, bits, DTYPE: tl.constexpr):
    """To one of the two neighbours, with odds by distance; the bits of gradkit/random.py."""
    u = x.to(tl.uint32, bitcast=True)
    a = u & 0x7FFFFFFF
    if DTYPE == tl.bfloat16:
        near = (a + (bits & 0xFFFF)) >> 16
        nan = 0x7FC0
    else:
        normal = (a - 0x38000000 + (bits & 0x1FFF)) >> 13
        tiny = tl.where(a < 0x38800000, a, 0x38800000).to(tl.float32, bitcast=True)
        subnormal = ((tiny * 1099511627776.0).to(tl.uint32) + (bits & 0xFFFF)) >> 16  # units of 2^-40
        near = tl.where(a < 0x38800000, subnormal, tl.where(a < 0x47800000, normal, 0x7C00))
        nan = 0x7E00
    return tl.where(x != x, nan, near | ((u >> 16) & 0x8000)).to(tl.uint16).to(DTYPE, bitcast=True)


@triton.jit
def philox(element, step, index, key):
    """32 random bits for each element; key: the seed, and the stream above it."""
    low, high = element.to(tl.uint32), (element >> 32).to(tl.uint32)
    bits, _, _, _ = tl.philox(key, low, high, step.to(tl.uint32), index.to(tl.uint32), 7)
    return bits


@triton.jit
def load(P, at, left, FULL: tl.constexpr, TILE: tl.constexpr):
    """In float32; beyond the end zeros."""
    lane = tl.arange(0, TILE)
    if FULL:
        return widen(tl.load(tl.multiple_of(P + at, 16) + lane))  # the hint counts on a sum that is made here
    else:
        return widen(tl.load(P + at + lane, mask=at + lane < left, other=0.0))


@triton.jit
def store(P, at, left, x, FULL: tl.constexpr, TILE: tl.constexpr):
    lane = tl.arange(0, TILE)
    if FULL:
        tl.store(tl.multiple_of(P + at, 16) + lane, x)
    else:
        tl.store(P + at + lane, x, mask=at + lane < left)


@triton.jit
def inside(x, at, left, FULL: tl.constexpr, TILE: tl.constexpr):
    """What a reduction may count: zero beyond the end."""
    if FULL:
        return x
    else:
        return tl.where(at + tl.arange(0, TILE) < left, x, 0.0)


@triton.jit
def ones(x):
    """How many bits are set: the sum that compilers know as one instruction."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    return ((x + (x >> 4)) & 0x0F0F0F0F) * 0x01010101 >> 24


@triton.jit
def selected(marks, at, left, FULL: tl.constexpr, TILE: tl.constexpr):
    """Which elements of a tile a split selects, and the place of each among those of the tile.

    A word for each 16 elements: a bit each, and above these how many of the tile are selected before. A scan of the
    bits would make the warps wait for each other.
    """
    lane = tl.arange(0, TILE)
    if FULL:
        word = tl.load(marks + at // 16 + lane // 16)
    else:
        word = tl.load(marks + at // 16 + lane // 16, mask=at + lane < left, other=0)
    bit = lane % 16
    before = ones((word & ((1 << bit) - 1)).to(tl.uint32))
    return (word >> bit) & 1 != 0, (word >> 16) + before.to(tl.int32)


@triton.jit
def load_selected(P, first, place, chosen):
    """In float32, for the selected elements of a tile, which lie side by side from `first` on; zeros for the others."""
    return widen(tl.load(P + first + place, mask=chosen, other=0.0))


@triton.jit
def store_selected(P, first, place, chosen, x):
    tl.store(P + first + place, x, mask=chosen)


@triton.jit
def number(word):
    """A float64 among the words of a table."""
    return tl.load(word).to(tl.float64, bitcast=True)


@triton.jit
def spread(x, TILE: tl.constexpr):
    """A scalar as a tile: the interpreter combines masks of one shape only, and compiled it costs nothing."""
    return tl.full([TILE], x.to(tl.float32), tl.float32)


@triton.jit
def load_box(P, here, line, lane, skip, ok, FULL: tl.constexpr):
    """Of lines that lie `skip` elements apart. FULL: all are there, and start at multiples of 4 elements."""
    if FULL:
        return widen(tl.load(tl.multiple_of(P + here, 16) + (line * (skip // 4 * 4) + lane)))
    else:
        return widen(tl.load(P + here + (line * skip + lane), mask=ok, other=0.0))


@triton.jit
def store_box(P, here, line, lane, skip, ok, x, FULL: tl.constexpr):
    if FULL:
        tl.store(tl.multiple_of(P + here, 16) + (line * (skip // 4 * 4) + lane), x)
    else:
        tl.store(P + here + (line * skip + lane), x, mask=ok)


@triton.jit
def only(x, ok, FULL: tl.constexpr):
    if FULL:
        return x
    else:
        return tl.where(ok, x, 0.0)


@triton.jit
def rank(x):
    """Bits in the order of what is not negative. Triton's own maximum drops NaN, whose bits are above infinity's."""
    return tl.where(x != x, float("nan"), x).to(tl.float64).to(tl.int64, bitcast=True)


@triton.jit
def totals(x, cells, STEP: tl.constexpr, side, units, TILE: tl.constexpr, WIDE: tl.constexpr):
    """Store the sums of each unit: units lie across lanes (side 1) or lines."""
    box = tl.reshape(x.to(tl.float64), [TILE // WIDE, WIDE])
    if side > 0:
        j = tl.arange(0, WIDE)
        tl.store(cells + j * STEP, tl.sum(box, 0), mask=j < units)
    else:
        k = tl.arange(0, TILE // WIDE)
        tl.store(cells + k * STEP, tl.sum(box, 1), mask=k < units)


@triton.jit
def peaks(x, cells, STEP: tl.constexpr, side, units, TILE: tl.constexpr, WIDE: tl.constexpr):
    box = tl.reshape(rank(x), [TILE // WIDE, WIDE])
    if side > 0:
        j = tl.arange(0, WIDE)
        tl.store(cells + j * STEP, tl.max(box, 0).to(tl.float64, bitcast=True), mask=j < units)
    else:
        k = tl.arange(0, TILE // WIDE)
        tl.store(cells + k * STEP, tl.max(box, 1).to(tl.float64, bitcast=True), mask=k < units)


@triton.jit
def sum_of_units(partials, units, chunks, STEP: tl.constexpr, WIDE: tl.constexpr):
    """Of each unit, in the order of the chunks."""
    j = tl.arange(0, WIDE)
    acc = tl.zeros([WIDE], tl.float64)
    at = 0
    while at < chunks:
        acc += tl.load(partials + (at * units + j) * STEP, mask=j < units, other=0.0, cache_modifier=".cg")
        at += 1
    return acc


@triton.jit
def most_of_units(partials, units, chunks, STEP: tl.constexpr, WIDE: tl.constexpr):
    j = tl.arange(0, WIDE)
    acc = tl.zeros([WIDE], tl.float64)
    at = 0
    while at < chunks:
        acc = maximum(acc, tl.load(partials + (at * units + j) * STEP, mask=j < units, other=0.0, cache_modifier=".cg"))
        at += 1
    return acc


@triton.jit
def total(x):
    return tl.sum(x.to(tl.float64), 0)


@triton.jit
def peak(x):
    """The largest of what is not negative."""
    return tl.max(rank(x), 0).to(tl.float64, bitcast=True)


@triton.jit
def is_last(counter, blocks):
    """Whether all other blocks have stored their partial results; what they stored may be read."""
    tl.debug_barrier()  # every thread's stores are before the count
    return tl.atomic_add(counter, 1, sem="acq_rel") == blocks - 1


@triton.jit
def sum_of(partials, at, end, STEP: tl.constexpr, TILE: tl.constexpr):
    """In the order of the blocks, whichever came last; read past the L1 cache, which may hold an old line."""
    lane = tl.arange(0, TILE)
    acc = tl.zeros([TILE], tl.float64)
    while at < end:
        acc += tl.load(partials + (at + lane) * STEP, mask=at + lane < end, other=0.0, cache_modifier=".cg")
        at += TILE
    return total(acc)


@triton.jit
def max_of(partials, at, end, STEP: tl.constexpr, TILE: tl.constexpr):
    lane = tl.arange(0, TILE)
    acc = tl.zeros([TILE], tl.float64)
    while at < end:
        acc = maximum(
            acc, tl.load(partials + (at + lane) * STEP, mask=at + lane < end, other=0.0, cache_modifier=".cg")
        )
        at += TILE
    return peak(acc)


@triton.jit
def give(cells, count, value, DTYPE: tl.constexpr, TILE: tl.constexpr):
    """Store a value at each of so many addresses."""
    lane = tl.arange(0, TILE)
    at = 0
    while at < count:
        here = at + lane < count
        tl.store(tl.load(cells + at + lane, mask=here, other=0).to(tl.pointer_type(DTYPE)), value.to(DTYPE), mask=here)
        at += TILE
