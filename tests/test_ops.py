"""Every function of gradkit.ops, eagerly and in C, on the values where formulas go wrong."""

import inspect
import itertools
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from gradkit import ops
from gradkit.backends import ccache

PRELUDE = Path(ccache.__file__).with_name("prelude.h").read_text()
DTYPES = {torch.float32: "float", torch.float64: "double"}
UNARY = [n for n, f in ops.OPS.items() if len(inspect.signature(f).parameters) == 1 and n != "isfinite"]
BINARY = ["minimum", "maximum"]
# ulp; what is not here is exact to the bit. float32: measured on all arguments; float64: libm's, against torch's
ULP = {(name, torch.float32): ulp for name, ulp in {"exp": 1, "log": 1, "tanh": 1.4, "sigmoid": 2.5}.items()}
ULP |= {(name, torch.float64): ulp for name, ulp in {"exp": 2, "log": 2, "tanh": 2, "sigmoid": 4}.items()}
TORCH_ULP = 4  # torch's own float32 functions; its sigmoid also gives 0 where the exact value is denormal

needs_compiler = pytest.mark.skipif(ccache.why_not() is not None, reason=f"no C compiler: {ccache.why_not()}")


def table(dtype):
    """Zeros, denormals, edges of overflow, huge, inf, NaN; both signs."""
    f = torch.finfo(dtype)
    edges = [0.0, f.tiny / 8, f.tiny, f.eps, 1e-3, 0.3, 0.624, 0.626, 0.75, 1.0, 1.5, 3.0, 9.1, 17.0, 87.3, 88.7, 88.8]
    edges += [89.1, 103.0, 103.9, 104.1, 708.0, 709.5, 710.0, 745.0, 746.0, 1e30, f.max / 2, f.max, np.inf, np.nan]
    return torch.tensor(edges + [-x for x in edges], dtype=dtype)


def exactly(name, x):
    """The float64 value; torch's own sigmoid gives 0 where the true one is denormal."""
    x = x.double()
    if name == "sigmoid":
        return torch.where(x < 0, torch.exp(x) / (1 + torch.exp(x)), 1 / (1 + torch.exp(-x)))
    return getattr(torch, name)(x)


def text(dtype, expression):
    """C of a loop out[i] = expression of a[i], b[i], c[i]."""
    body = f"T x = a[i], y = b[i], z = c[i]; (void)y; (void)z; out[i] = {expression};"
    arguments = "const T *restrict a, const T *restrict b, const T *restrict c, T *restrict out, long n"
    call = "loop((T *)job[0], (T *)job[1], (T *)job[2], (T *)job[3], job[4])"
    loop = f"static void loop({arguments}) {{ for (long i = 0; i < n; i++) {{ {body} }} }}"
    return f"typedef {DTYPES[dtype]} T;\n{PRELUDE}\n{loop}\nvoid run(const int64_t *job) {{ {call}; }}"


def in_c(expression, a, b=None, c=None):
    inputs = [t.contiguous() if t is not None else a for t in (a, b, c)]
    out = torch.empty_like(a)
    job = np.array([*(t.data_ptr() for t in inputs), out.data_ptr(), a.numel()], np.int64)
    ccache.build(text(a.dtype, expression)).run(job.ctypes.data)
    return out


def assert_same(got, want):
    """The same bits, but any NaN is a NaN; zeros count with their sign."""
    word = torch.int32 if got.dtype == torch.float32 else torch.int64
    both = got.isnan() & want.isnan()
    wrong = (got.view(word) != want.view(word)) & ~both
    assert not wrong.any(), list(zip(got[wrong].tolist()[:5], want[wrong].tolist()[:5], strict=True))


def assert_within(got, exact, limit):
    """At most `limit` ulp of got's dtype away from the float64 `exact`; inf, NaN and signed zeros as it has them."""
    f, rounded = torch.finfo(got.dtype), exact.to(got.dtype)
    special = rounded.isnan() | rounded.isinf() | (exact == 0)
    assert_same(got[special], rounded[special])
    exponent = torch.frexp(exact[~special].abs().clamp(min=f.tiny))[1].double()
    ulp = f.eps * torch.exp2(exponent - 1)
    error = (got[~special].double() - exact[~special]).abs() / ulp
    assert error.numel() == 0 or error.max() <= limit, (error.max().item(), got[~special][error.argmax()].item())


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", UNARY)
def test_a_function_means_the_same_in_torch_and_in_c(name, dtype):
    x = table(dtype)
    eager, native = ops.OPS[name](x), in_c(f"k_{name}(x)", x)
    if (name, dtype) not in ULP:
        assert_same(native, eager)
        return
    exact = exactly(name, x)
    assert_within(native, exact, ULP[name, dtype])
    alive = exact.abs() >= torch.finfo(dtype).tiny
    assert_within(eager[alive], exact[alive], TORCH_ULP)
    assert torch.equal(eager[~alive].isnan(), exact[~alive].isnan())


@needs_compiler
@pytest.mark.parametrize("name", ["exp", "log", "tanh", "sigmoid"])
def test_the_polynomials_hold_their_accuracy_over_all_of_float32(name):
    patterns = torch.arange(-(2**31), 2**31, 2**13 + 1)  # 2^19 of all bit patterns, in order
    x = patterns.to(torch.int32).view(torch.float32)
    x = torch.cat([x, torch.linspace(-110, 95, 2**18)])
    assert_within(in_c(f"k_{name}(x)", x), exactly(name, x), ULP[name, torch.float32])


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BINARY)
def test_minimum_and_maximum_agree_on_every_pair(name, dtype):
    pairs = torch.tensor(list(itertools.product(table(dtype).tolist(), repeat=2)), dtype=dtype)
    a, b = pairs[:, 0].contiguous(), pairs[:, 1].contiguous()
    eager = ops.OPS[name](a, b)
    assert_same(in_c(f"k_{name}(x, y)", a, b), eager)
    assert torch.equal(eager.nan_to_num(7.0), getattr(torch, name)(a, b).nan_to_num(7.0))
    one_by_one = torch.stack([ops.OPS[name](x, y) for x, y in zip(a, b, strict=True)])
    assert_same(one_by_one, eager)  # torch.minimum(-0, 0) is -0 or 0 by its place in the tensor


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_masks_choose_the_same_in_torch_and_in_c(dtype):
    x = table(dtype)
    assert_same(in_c("k_isfinite(x) ? x : (T)0.5", x), ops.where(ops.isfinite(x), x, 0.5))
    assert torch.equal(ops.isfinite(x), torch.isfinite(x))
    assert_same(in_c("x > (T)0.5 ? y : z", x, -x, x + x), ops.where(x > 0.5, -x, x + x))


def test_float32_square_roots_are_rounded_correctly():
    x = torch.rand(2**16) * 100
    assert_same(ops.sqrt(x), torch.from_numpy(np.sqrt(x.numpy())))


def test_the_sign_of_nan_is_zero():
    assert ops.sign(torch.tensor([np.nan, -np.nan])).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_literals_may_stand_in_any_place_and_keep_the_tensors_dtype(dtype, shape):
    x = torch.full(shape, 0.25, dtype=dtype)
    yes, no = torch.tensor(True), torch.tensor(False)
    cases = [ops.maximum(x, 0.1), ops.maximum(0.1, x), ops.minimum(x, 0.7), ops.minimum(0.7, x)]
    cases += [ops.where(yes, x, 0.1), ops.where(no, 0.1, x), ops.where(x > 0.0, x, 0.1), ops.where(x > 1.0, 0.1, x)]
    for result in cases:
        assert result.dtype == dtype and result.shape == x.shape and torch.equal(result, x)
    assert ops.where(x > 0.0, 0.1, 0.2).double().unique().tolist() == [0.1]  # in full precision, for `finish`


@pytest.mark.parametrize("name", ops.OPS)
def test_an_operation_without_a_tensor_is_refused(name):
    with pytest.raises(TypeError, match=f"{name}: no tensor"):
        ops.OPS[name](*[0.5] * len(inspect.signature(ops.OPS[name]).parameters))


def test_every_operation_has_a_form_in_c():
    assert set(re.findall(r"k_(\w+)\(T ", PRELUDE)) == set(ops.OPS) - {"where"}


@needs_compiler
@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump, which shows the calls, is not installed")
@pytest.mark.parametrize("expression", ["k_exp(x)", "k_sigmoid(x)", "k_log(x)", "k_tanh(x)", "k_sqrt(x)", "expf(x)"])
def test_float_loops_call_nothing_and_so_are_vectorised(expression, tmp_path):
    found = ccache.compiler(os.environ.get("CC", ""), os.environ.get("PATH", ""))
    made = ccache.make(tmp_path, "loop", text(torch.float32, expression), *found)
    assembly = subprocess.run(["objdump", "-d", str(made)], capture_output=True, text=True, check=True).stdout
    calls = re.findall(r"<(?:exp|log|tanh|sqrt)f?(?:@\S+)?>", assembly)
    assert bool(calls) == (expression == "expf(x)"), calls  # the last one shows that a call would be seen
    if expression != "expf(x)" and "x86-64" in assembly:
        assert re.search(r"v?(?:mul|sqrt)ps\b", assembly), "no packed instruction"
