"""The rules through Triton's interpreter, beside the same rules called on torch tensors."""

import itertools
import os

if os.environ.get("TRITON_INTERPRET") != "1":  # an error of its own, and not a wrong mode found later
    raise RuntimeError("tests/triton/test_interpreter.py needs TRITON_INTERPRET=1; `make test` sets it")

import pytest
import torch
import triton
from triton.runtime.interpreter import InterpretedFunction
from triton_cases import EXACT, ROUNDED, adam_kernel, lion_kernel, masks, pair_kernel, quotient

from gradkit import ops
from gradkit.optim.adamw import adam, adam_scalars
from gradkit.optim.lion import lion, lion_scalars
from gradkit.triton_kernels import as_jit
from tests.test_ops import ULP, assert_within, exactly, in_c, needs_compiler, table
from tests.tolerance import assert_equal

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about the overflows that are wanted here

TILE = 2048
TABLE = table(torch.float32)
PAIRS = torch.tensor(list(itertools.product(TABLE.tolist(), repeat=2))).T.contiguous()  # every value with every other


def run(kernel, rule, inputs, scalars, outputs):
    """What the kernel stores; fails unless the interpreter ran the rule."""
    n = inputs[0].numel()
    out = [torch.full_like(inputs[0], 7e7) for _ in range(outputs)]
    row = [torch.tensor(scalars)] if scalars else []
    InterpretedFunction.rewritten_fn.pop(as_jit(rule).fn, None)
    kernel[(triton.cdiv(n, TILE),)](*inputs, *row, *out, n, RULE=as_jit(rule), TILE=TILE)
    assert isinstance(kernel, InterpretedFunction) and as_jit(rule).fn in InterpretedFunction.rewritten_fn
    assert not any((x == 7e7).any() for x in out), "an element that nothing was stored to"
    return out


def hostile(count):
    """`count` tensors: every pair of the table among the first two, mixed values of every size in all."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(count, 3000, generator=generator) * torch.logspace(-30, 15, 3000)
    rest = TABLE[torch.randint(len(TABLE), (count - 2, PAIRS.shape[1]), generator=generator)]
    return [x.contiguous() for x in torch.cat([torch.cat([PAIRS, rest]), mixed], dim=1)]


def test_lion_in_triton_is_lion_in_torch():
    u, exp_avg = hostile(2)
    scalars = list(lion_scalars((0.9, 0.99)).values())
    got = run(lion_kernel, lion, (u, exp_avg), scalars, 2)
    for ours, wanted in zip(got, lion(u, exp_avg, *torch.tensor(scalars)), strict=True):
        assert_equal(ours, wanted)


@pytest.mark.parametrize("step", [1, 1000])
def test_adam_in_triton_is_adam_in_torch(step):
    u, exp_avg, exp_avg_sq = hostile(3)
    scalars = list(adam_scalars((0.9, 0.999), 1e-8, step).values())
    got = run(adam_kernel, adam, (u, exp_avg, exp_avg_sq), scalars, 3)
    for ours, wanted in zip(got, adam(u, exp_avg, exp_avg_sq, *torch.tensor(scalars)), strict=True):
        assert_equal(ours, wanted)


@pytest.mark.parametrize("rule", EXACT, ids=lambda rule: rule.name)
def test_an_operation_gives_torchs_bits_on_every_pair(rule):
    u, p = hostile(2)
    (got,) = run(pair_kernel, rule, (u, p), (), 1)
    assert_equal(got, rule(u, p))


@pytest.mark.parametrize("name", ROUNDED)
def test_a_polynomial_is_as_close_as_in_c(name):
    x = torch.cat([TABLE, torch.linspace(-110, 95, 2**14)])
    (got,) = run(pair_kernel, ROUNDED[name], (x, x), (), 1)
    assert_within(got, exactly(name, x), ULP[name, torch.float32])


@needs_compiler
@pytest.mark.parametrize("name", ROUNDED)
def test_a_polynomial_has_the_bits_of_the_c_loop(name):
    x = torch.cat([TABLE, torch.arange(-(2**31), 2**31, 2**18 + 1).to(torch.int32).view(torch.float32)])
    (got,) = run(pair_kernel, ROUNDED[name], (x, x), (), 1)
    assert_equal(got, in_c(f"k_{name}(x)", x))


def test_the_cases_call_every_operation():
    rules = [*EXACT, *ROUNDED.values()]
    used = {name for rule in rules for name in rule.fn.__code__.co_names}
    assert used == {*ops.OPS, "lerp"} and {masks, quotient} <= set(rules)


def test_a_rules_own_module_keeps_its_functions():
    run(lion_kernel, lion, hostile(2), (0.1, 0.01), 2)
    module = lion.fn.__globals__
    assert module["sign"] is ops.sign and module["lerp"] is ops.lerp and "tl" not in module
