"""Kernels that run one rule, or one op, on a few numbers."""

import triton
import triton.language as tl


@triton.jit
def lion_kernel(u, exp_avg, scalars, out, new_exp_avg, n, RULE: tl.constexpr, TILE: tl.constexpr):
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = at < n
    w1, w2 = tl.load(scalars), tl.load(scalars + 1)
    r, m = RULE(tl.load(u + at, mask=inside), tl.load(exp_avg + at, mask=inside), w1, w2)
    tl.store(out + at, r, mask=inside)
    tl.store(new_exp_avg + at, m, mask=inside)


@triton.jit
def adam_kernel(u, exp_avg, exp_avg_sq, scalars, out, new_m, new_v, n, RULE: tl.constexpr, TILE: tl.constexpr):
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = at < n
    w1, k2, w2 = tl.load(scalars), tl.load(scalars + 1), tl.load(scalars + 2)
    a, b, e = tl.load(scalars + 3), tl.load(scalars + 4), tl.load(scalars + 5)
    m, v = tl.load(exp_avg + at, mask=inside), tl.load(exp_avg_sq + at, mask=inside)
    r, m, v = RULE(tl.load(u + at, mask=inside), m, v, w1, k2, w2, a, b, e)
    tl.store(out + at, r, mask=inside)
    tl.store(new_m + at, m, mask=inside)
    tl.store(new_v + at, v, mask=inside)


@triton.jit
def two_kernel(u, v, out, n, RULE: tl.constexpr, TILE: tl.constexpr):
    """A rule of two values."""
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = at < n
    tl.store(out + at, RULE(tl.load(u + at, mask=inside), tl.load(v + at, mask=inside)), mask=inside)
