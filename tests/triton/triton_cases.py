"""One rule for each operation, and kernels that run a rule on a few numbers."""

import triton
import triton.language as tl

from gradkit import rule
from gradkit.ops import absolute, exp, isfinite, lerp, log, maximum, minimum, sigmoid, sign, sqrt, tanh, where
from gradkit.triton_kernels.memory import narrow, philox, stochastic, widen


@rule
def arithmetic(u, p):
    return (u - p) * -u + p / 0.3 - 3.0


@rule
def quotient(u, p):
    return u / p


@rule
def masks(u, p):
    return where(((u > p) & ~(p < 0.0)) | (u <= -1.0), u, 0.5 * p)


@rule
def root(u, p):
    return sqrt(u)


@rule
def size(u, p):
    return absolute(u)


@rule
def signs(u, p):
    return sign(u)


@rule
def smaller(u, p):
    return minimum(u, p)


@rule
def larger(u, p):
    return maximum(u, p)


@rule
def literals(u, p):
    return where(isfinite(u), minimum(maximum(-2.0, u), 2.0), 0.25)


@rule
def between(u, p):
    return lerp(u, p, 0.3)


@rule
def exponential(u, p):
    return exp(u)


@rule
def logarithm(u, p):
    return log(u)


@rule
def hyperbolic(u, p):
    return tanh(u)


@rule
def logistic(u, p):
    return sigmoid(u)


EXACT = (arithmetic, quotient, masks, root, size, signs, smaller, larger, literals, between)
ROUNDED = {"exp": exponential, "log": logarithm, "tanh": hyperbolic, "sigmoid": logistic}


@triton.jit
def pair_kernel(u, p, out, n, RULE: tl.constexpr, TILE: tl.constexpr):
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = at < n
    tl.store(out + at, RULE(tl.load(u + at, mask=inside), tl.load(p + at, mask=inside)), mask=inside)


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
def finish_kernel(x, y, out, FINISH: tl.constexpr):
    """One element a program, as scalars."""
    i = tl.program_id(0)
    tl.store(out + i, FINISH(tl.load(x + i), tl.load(y)))


@triton.jit
def philox_kernel(words, out, TILE: tl.constexpr):
    at = tl.arange(0, TILE)
    step, index, key = tl.load(words + 1), tl.load(words + 2), tl.load(words + 3)
    tl.store(out + at, philox(tl.load(words) + at, step, index, key).to(tl.int32, bitcast=True))


@triton.jit
def rounding_kernel(x, bits, nearest, drawn, n, TILE: tl.constexpr):
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    value, random = tl.load(x + at, mask=at < n), tl.load(bits + at, mask=at < n).to(tl.uint32, bitcast=True)
    tl.store(nearest + at, narrow(value, nearest.dtype.element_ty), mask=at < n)
    tl.store(drawn + at, stochastic(value, random, drawn.dtype.element_ty), mask=at < n)


@triton.jit
def widening_kernel(x, out, n, TILE: tl.constexpr):
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    tl.store(out + at, widen(tl.load(x + at, mask=at < n)), mask=at < n)
