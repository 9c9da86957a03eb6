"""The functions of gradkit/ops.py for Triton, in float32 for rules and in float64 for what finishes a measure.

Triton's own maximum drops NaN; in float32 its sqrt and `/` are approximate and flush denormals, and its exp loses 40
ulp at 80: here stand the polynomials of gradkit/backends/prelude.h. What is finished in float64 is stored as float32.
"""

import triton
import triton.language as tl


@triton.jit
def divide(a, b):
    """What `/` in a rule becomes."""
    if (a + b).dtype == tl.float64:  # either may be a literal
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def sqrt(x):
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def absolute(x):
    return tl.abs(x)


@triton.jit
def sign(x):
    return tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, 0.0))  # 0 for NaN


@triton.jit
def minimum(a, b):
    return tl.where((b < a) | (b != b), b, a)


@triton.jit
def maximum(a, b):
    return tl.where((b > a) | (b != b), b, a)


@triton.jit
def where(mask, yes, no):
    return tl.where(mask, yes, no)


@triton.jit
def isfinite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def exp(x):
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        return exp_f(x)


@triton.jit
def exp_f(x):
    x = tl.where(x > 89.0, 89.0, x)  # e^89 overflows, e^-104 is 0; a NaN passes both
    x = tl.where(x < -104.0, -104.0, x)
    shifted = x * 1.44269504 + 12582912.0  # 1.5 * 2^23: the integer nearest to x / ln 2, in the low bits
    n = shifted - 12582912.0
    r = (x - n * 0.693145752) - n * 1.42860677e-6
    q = 0.00139446591 + r * 0.000197903413
    q = 0.5 + r * (0.166666657 + r * (0.0416662954 + r * (0.00833349675 + r * q)))
    e = shifted.to(tl.int32, bitcast=True) - 0x4B400000
    half = e >> 1
    first = ((half + 127) << 23).to(tl.float32, bitcast=True)
    second = ((e - half + 127) << 23).to(tl.float32, bitcast=True)
    return (1.0 + (r + r * r * q)) * first * second


@triton.jit
def log(x):
    if x.dtype == tl.float64:
        return tl.log(x)
    else:
        return log_f(x)


@triton.jit
def log_f(x):
    small = x < 1.17549435e-38
    u = tl.where(small, x * 33554432.0, x).to(tl.int32, bitcast=True) - 0x3F3504F3  # the bits of sqrt(1/2)
    e = (u >> 23).to(tl.float32) - tl.where(small, 25.0, 0.0)
    f = ((u & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    q = -0.124055892 + f * (0.11888162 + f * (-0.116756521 + f * 0.067466408))
    q = 0.333333135 + f * (-0.250000089 + f * (0.200021192 + f * (-0.166679963 + f * (0.142195523 + f * q))))
    y = (f + (e * 1.42860677e-6 + f * f * (f * q - 0.5))) + e * 0.693145752
    y = tl.where(x < float("inf"), y, x)  # inf and NaN are their own logarithms
    y = tl.where(x < 0.0, float("nan"), y)
    return tl.where(x == 0.0, float("-inf"), y)


@triton.jit
def tanh(x):
    a = tl.abs(x)
    z = a * a
    q = 0.0217007026 + z * (-0.0081773987 + z * 0.00214296184)
    near = a + a * z * (-0.333333313 + z * (0.133332059 + z * (-0.0539467633 + z * q)))
    far = 1.0 - divide(2.0, exp(a + a) + 1.0)
    y = tl.where(a < 0.625, near, far)
    return tl.where(x == 0.0, x, tl.where(x < 0.0, -y, y))  # keeps the sign of a zero


@triton.jit
def sigmoid(x):
    e = exp(-tl.abs(x))  # never overflows: exact also where 1 / (1 + e^-x) underflows
    return divide(tl.where(x < 0.0, e, 1.0), 1.0 + e)
