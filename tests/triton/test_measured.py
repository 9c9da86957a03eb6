"""Measures that Triton reduces and finishes itself, and the bits that it draws, in the interpreter."""

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("tests/triton/test_measured.py needs TRITON_INTERPRET=1; `make test` sets it")

import math
from typing import Any

import pytest
import torch
import triton
from triton_cases import ROUNDED, finish_kernel, philox_kernel, rounding_kernel, widening_kernel

import gradkit
from gradkit import backends, chain, measure, random, rule
from gradkit import transforms as tx
from gradkit.language import Code
from gradkit.ops import absolute, exp, log, minimum, sigmoid, sqrt, tanh, where
from gradkit.transforms import clip
from gradkit.triton_kernels import as_jit, launch
from gradkit.triton_kernels.memory import INTERPRETED
from tests import test_measures, test_rows, test_stats
from tests.runs import ran_on
from tests.test_beside import COLLECT, FACTOR, optimizer_of
from tests.test_random import any_floats, int64, same_bits
from tests.tolerance import assert_equal, tolerance

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about overflows that are wanted here

assert INTERPRETED.value
CHUNK = launch.options(launch.shape().reduce)["CHUNK"]
CLOSE = {"rtol": tolerance("backends", torch.float32, "triton"), "atol": 1e-7}
BF16 = torch.bfloat16


def test_a_measure_covers_the_tensors_whose_chain_holds_it():
    test_measures.test_a_measure_covers_the_tensors_whose_chain_holds_it("triton")


def test_measures_run_in_an_order_that_suits_every_group():
    test_measures.test_measures_run_in_an_order_that_suits_every_group("triton")


def test_a_measure_may_reduce_and_give_several_values():
    test_measures.test_a_measure_may_reduce_and_give_several_values("triton")


def finish(total, mean, top, floor):
    """Some of each: arithmetic among scalars, every operation, a gate."""
    size = sqrt(total) / (mean * mean + floor) + exp(-mean) * log(top + 2.0)
    return where((top > floor) & (mean > floor), size + tanh(mean) + sigmoid(top), minimum(1.0 / total, 1.0)), mean, top


REDUCE = {"total": "sum", "mean": "mean", "top": "max"}


@measure(scope="tensor", reduce=REDUCE, gives=("size", "mean", "top"), finish=finish)
def of_each(u, p):
    return u * u, absolute(u - p) + 1.0, u * u


@measure(scope="all", reduce=REDUCE, gives=("size", "mean", "top"), finish=finish)
def of_all(u, p):
    return u * u, absolute(u - p) + 1.0, u * u


@rule
def shrink(u, size, mean, top):
    return (u * size + mean) / (absolute(u) + top)


@rule
def half(u):
    return 0.5 * u


def stepped(start: list[torch.Tensor], grads: list[torch.Tensor], backend: str, links: Any) -> list[torch.Tensor]:
    params = [p.clone().requires_grad_() for p in start]
    optimizer = gradkit.Optimizer(params, links, lr=0.1, backend=backend, rounding="kahan")  # of those in bfloat16
    for scale in (1.0, 0.3):  # twice: the counters start from zero again
        for p, g in zip(params, grads, strict=True):
            p.grad = (scale * g).to(p.dtype)
        optimizer.step()
    eager = {"eager"} if any(p.dtype == torch.float64 for p in params) else set()
    assert ran_on(optimizer) == {backend} | eager
    return [p.detach() for p in params]


def assert_measured_alike(start: list[torch.Tensor], grads: list[torch.Tensor], links: Any) -> list[torch.Tensor]:
    ours, theirs = (stepped(start, grads, backend, links) for backend in ("triton", "eager"))
    assert not any(torch.equal(a, b) for a, b in zip(ours, start, strict=True) if a.numel())
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, **(CLOSE if a.dtype != BF16 else {}))
    return ours


SIZES = (5, 0, 3 * CHUNK + 7, 1, CHUNK)
DTYPES = {
    "one batch": (torch.float32,) * 5,
    "two batches": (torch.float32, torch.float32, BF16, BF16, torch.float32),
    "an empty batch": (torch.float32, BF16, torch.float32, torch.float32, torch.float32),
    "beside eager": (torch.float32, torch.float32, torch.float32, torch.float64, BF16),
}


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("link", [of_each, of_all], ids=["tensor", "all"])
def test_sums_means_and_maxima_in_one_pass_are_eagers(link, dtypes):
    """Each result through `finish`: "beside eager" by torch's, the others by the kernel's own."""
    torch.manual_seed(3)
    start = [torch.randn(n).to(d) for n, d in zip(SIZES, dtypes, strict=True)]
    grads = [torch.randn(n).to(d) * 3 for n, d in zip(SIZES, dtypes, strict=True)]
    assert_measured_alike(start, grads, chain(half, link, shrink, name="measured", floor=1e-9))


def itself(top):
    return top


@measure(scope="tensor", reduce={"top": "max"}, gives=("top",), finish=itself)
def peak_of_each(u):
    return u


@measure(scope="all", reduce={"top": "max"}, gives=("top",), finish=itself)
def peak_of_all(u):
    return u


@rule
def below(u, top):
    return u / top


@pytest.mark.parametrize("at", [0, CHUNK - 1, CHUNK, 2 * CHUNK + 6], ids=["first", "end", "next", "last"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("link", [peak_of_each, peak_of_all], ids=["tensor", "all"])
def test_no_maximum_loses_a_nan(link, sign, at):
    start, grads = [torch.zeros(2 * CHUNK + 7), torch.zeros(3)], [torch.ones(2 * CHUNK + 7), torch.ones(3)]
    grads[0][at] = math.copysign(math.nan, sign)
    ours = assert_measured_alike(start, grads, chain(link, below))
    assert ours[0].isnan().all() and ours[1].isnan().all() == (link is peak_of_all)


def test_the_result_does_not_depend_on_which_block_comes_last():
    """The interpreter's blocks come in order: here the counter starts one short, so that the one before finishes."""
    p = torch.zeros(3 * CHUNK, requires_grad=True)
    optimizer = gradkit.Optimizer([p], chain(tx.clip_by_global_norm(1.0)), lr=1.0, backend="triton")
    p.grad = torch.full_like(p, 2.0)
    optimizer.step()
    clipped = -p.detach()[0]
    torch.testing.assert_close(clipped, torch.tensor(1 / math.sqrt(3 * CHUNK)), **CLOSE)
    joint = optimizer._plans["step"].batches[0].backend.kernels.joints[0]
    assert joint.counters.tolist() == [0] and joint.partials.flatten().tolist() == [4.0 * CHUNK] * 3
    joint.counters += 1  # what the last block has stored in the step before still stands
    optimizer.step()
    assert_equal(-p.detach()[0], 2 * clipped)
    assert joint.counters.tolist() == [1]


TOTALS = torch.cat([torch.logspace(-300, 300, 601, dtype=torch.float64), torch.tensor([0.0, math.inf, math.nan])])


@pytest.mark.parametrize("finish", [clip.norm_coef, clip.l2_coef])
def test_what_finishes_runs_in_float64(finish):
    """Also its literals: as float32, 1e-6 would be off in the eighth digit."""
    got, limit = torch.zeros_like(TOTALS), torch.tensor([0.1], dtype=torch.float64)
    finish_kernel[(len(TOTALS),)](TOTALS, limit, got, FINISH=as_jit(Code(finish, lambda name: False, scalar_math=True)))
    assert_equal(got, finish(TOTALS, limit))


@pytest.mark.parametrize("name", ROUNDED)
def test_functions_of_what_is_finished_are_within_a_float32(name):
    x = torch.cat([torch.linspace(-80, 80, 161, dtype=torch.float64), TOTALS])
    got = torch.zeros_like(x)
    finish_kernel[(len(x),)](x, x, got, FINISH=as_jit(ROUNDED[name]))
    torch.testing.assert_close(got, getattr(torch, name)(x), rtol=2e-7, atol=0, equal_nan=True)


@pytest.mark.parametrize("element", [0, 2**32 - 700, 2**40 + 5])
def test_the_generator_has_torchs_bits(element):
    for step, index, seed in ((1, 0, 0), (70_000, 3, 2**32 - 1)):
        stream = random.stream("write")
        words = torch.tensor([element, step, index, int64(seed | stream << 32)])
        got = torch.zeros(1024, dtype=torch.int32)
        philox_kernel[(1,)](words, got, TILE=1024)
        wanted = random.philox(torch.arange(element, element + 1024), step, index, seed, stream)
        assert torch.equal(got, wanted.to(torch.int32))


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_rounding_has_torchs_bits(dtype):
    nans = torch.tensor([0x7FFFFFFF, 0x7F800001, -1], dtype=torch.int32).view(torch.float32)  # rounding would lose them
    x = torch.cat([any_floats(1 << 15), nans])
    bits = torch.randint(-(2**31), 2**31, x.shape, generator=torch.Generator().manual_seed(4)).to(torch.int32)
    nearest, drawn = (torch.zeros(len(x), dtype=dtype) for _ in range(2))
    rounding_kernel[(triton.cdiv(len(x), 4096),)](x, bits, nearest, drawn, len(x), TILE=4096)
    assert same_bits(nearest, x.to(dtype))
    assert same_bits(drawn, random.stochastic_round(x, bits.long() & 0xFFFFFFFF, dtype))
    back = torch.zeros_like(x)
    widening_kernel[(triton.cdiv(len(x), 4096),)](drawn, back, len(x), TILE=4096)
    assert same_bits(back, drawn.float())


def test_a_measure_that_was_interrupted_leaves_nothing_behind(monkeypatch):
    """A batch has counted its blocks when the next one's launch fails: the next step starts at zero again."""
    params = [torch.zeros(3 * CHUNK, dtype=d, requires_grad=True) for d in (torch.float32, torch.bfloat16)]
    optimizer = gradkit.Optimizer(params, chain(tx.clip_by_global_norm(1.0)), lr=1.0, backend="triton")
    started, launched = [], launch.launch

    def second_fails(*given: Any, **options: Any) -> None:
        started.append(given)
        if len(started) == 2:
            raise KeyboardInterrupt
        launched(*given, **options)

    def step() -> float:
        for p in params:
            p.grad = torch.ones_like(p)
            p.data.zero_()
        optimizer.step()
        return -params[0][0].item()

    wanted = step()
    monkeypatch.setattr(launch, "launch", second_fails)
    with pytest.raises(KeyboardInterrupt):
        step()
    assert len(started) == 2
    monkeypatch.undo()
    assert [step(), step()] == [wanted, wanted] and wanted == pytest.approx(1 / math.sqrt(6 * CHUNK))


def test_other_backends_in_a_measure_get_totals():
    """float64 parameters run on eager: one norm over both, finished by torch."""
    params = [torch.zeros(5000, dtype=d, requires_grad=True) for d in (torch.float32, torch.float64)]
    for p in params:
        p.grad = torch.full_like(p, 2.0)
    optimizer = gradkit.Optimizer(params, chain(tx.clip_by_global_norm(1.0)), lr=1.0, backend="triton")
    optimizer.step()
    assert {b.backend.name for b in optimizer._plans["step"].batches} == {"triton", "eager"}
    for p in params:
        torch.testing.assert_close(-p.detach(), torch.full_like(p, 1 / math.sqrt(10_000)), **CLOSE)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan"])
def test_a_chain_beside_the_steps_changes_slots_alone(rounding):
    params, optimizer = optimizer_of("triton", torch.bfloat16, rounding=rounding)
    before = [p.detach().clone() for p in params]
    optimizer.run_beside(COLLECT, [torch.full((5,), 2.0), None], factor=FACTOR)
    assert optimizer._plans[COLLECT].batches[0].backend.name == "triton"
    assert torch.equal(optimizer.state[params[0]]["seen"], torch.full((5,), 2.0 * FACTOR))
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    optimizer.run_beside(COLLECT, [torch.full((5,), torch.nan), torch.ones(3)], factor=FACTOR)
    assert not optimizer.state[params[1]]["seen"].any()


# of thousands of blocks, which the interpreter takes one by one
THOUSANDS = ("long columns", "many columns", "a long vector", "channels_last rows")


@pytest.mark.parametrize("scope", test_rows.BOTH)
@pytest.mark.parametrize("kind", [k for k in (*test_rows.KINDS, *test_rows.LONG) if k not in THOUSANDS])
def test_rows_and_columns_are_slices_of_a_dimension(kind, scope):
    test_rows.test_rows_and_columns_are_slices_of_a_dimension(kind, torch.float32, scope, "triton")


@pytest.mark.parametrize("scope", test_rows.BOTH)
def test_tensors_of_a_batch_keep_their_rows_apart(scope, monkeypatch):
    monkeypatch.setattr(test_rows, "LONG", ("transposed convolution",))
    test_rows.test_tensors_of_a_batch_keep_their_rows_apart(scope, "triton")


@pytest.mark.parametrize("scope", test_rows.BOTH)
@pytest.mark.parametrize("rounding", ["nearest", "kahan", "stochastic"])
def test_bf16_rows(rounding, scope):
    test_rows.test_bf16_rows(rounding, scope, "triton")


def test_adaptive_clip_leaves_excluded_parameters_alone():
    test_rows.test_adaptive_clip_leaves_excluded_parameters_alone("triton")


def test_rows_of_float64_run_on_eager():
    for dtype in (torch.float32, torch.float64):
        optimizer, (p,), (x,) = test_rows.stepped("triton", "row", ["matrix"], dtype)
        torch.testing.assert_close(p.detach().double(), x, rtol=2e-5, atol=2e-5)
        assert ran_on(optimizer) == {"triton" if dtype == torch.float32 else "eager"}


@pytest.mark.parametrize("scope", test_rows.BOTH)
def test_totals_of_rows_for_a_finish_elsewhere(scope):
    """As with sharded parameters: the last block leaves the totals of its units."""
    optimizer, _, _ = test_rows.stepped("triton", scope, ["matrix", "vector", "cube"], torch.float32)
    (batch,) = optimizer._plans["step"].batches
    eager = backends.Eager(batch)
    eager.begin()
    batch.bind([p.grad for p in optimizer.param_groups[0]["params"]])
    batch.backend.begin()
    for ps in (batch.program.passes[0], batch.program.passes[2]):
        for _ in range(2):  # the counters are at zero again
            torch.testing.assert_close(batch.backend.reduce(ps), eager.reduce(ps), rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("name", test_stats.MAKERS)
def test_counting_changes_no_bit_and_plans_twice(name):
    test_stats.test_counting_changes_no_bit_and_plans_twice(name, "triton")


def test_norms_and_shares_are_those_of_the_step():
    test_stats.test_norms_and_shares_are_those_of_the_step("triton")
