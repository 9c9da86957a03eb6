"""Whole steps through Triton's interpreter, beside the same steps on eager."""

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("tests/triton/test_steps.py needs TRITON_INTERPRET=1; `make test` sets it")

from typing import Any

import pytest
import torch

import gradkit
from gradkit import Slot, backends, chain, derive, rule
from gradkit import transforms as tx
from gradkit.ops import absolute, lerp, maximum, sign, sqrt, where
from gradkit.triton_kernels import launch
from gradkit.triton_kernels.memory import INTERPRETED
from tests import test_attach, test_golden
from tests.cases import BY_NAME, CASES
from tests.runs import ran_on, replay
from tests.test_backends import EXACT, INEXACT, SMALL, STORAGES, Storage, channels_last, hostile, run
from tests.tolerance import assert_equal, assert_follows, tolerance

# numpy's, about overflows that are wanted here, and in lanes beyond the end
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

assert INTERPRETED.value
TILE, CHUNK = (launch.options(launch.shape().apply)[name] for name in ("TILE", "CHUNK"))
AROUND_A_BLOCK = ((TILE - 1,), (TILE,), (TILE + 1,), (CHUNK - 1,), (CHUNK,), (CHUNK + 1,))
LOW = [s for s in STORAGES if s.dtype != torch.float64]


def assert_triton_is_eager(make: Any, start: list[torch.Tensor], steps: int, **options: Any) -> None:
    """Parameters and all state, in every bit."""
    grads = [[hostile(p, t) for p in start] for t in range(steps)]
    theirs = run(make, start, grads, "eager", **options)
    ours = run(make, start, grads, "triton", **options)
    assert all(theirs[f"parameter {i} {tuple(p.shape)}"].ne(p).any() for i, p in enumerate(start) if p.numel() > 1)
    assert ours.keys() == theirs.keys()
    for what, value in ours.items():
        assert_equal(value, theirs[what], what)


def drawn(shapes: Any, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [*(torch.randn(s).to(dtype) for s in shapes), channels_last((2, 3, 5, 4), dtype)]


@pytest.mark.parametrize("name", EXACT)
def test_a_chain_without_sums_and_polynomials_is_eager_in_every_bit(name):
    start = drawn(SMALL, torch.float32)
    assert_triton_is_eager(BY_NAME[name].optimizer, start, 3, decay="cautious", weight_decay=0.3)


@pytest.mark.parametrize("storage", LOW, ids=str)
@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_every_storage_is_eager_in_every_bit(name, storage):
    start = drawn(SMALL, storage.dtype)
    assert_triton_is_eager(BY_NAME[name].optimizer, start, 3, decay="l2", weight_decay=0.3, **storage.options)


@pytest.mark.parametrize("storage", [LOW[0], *LOW[2:5]], ids=str)
def test_tensors_that_do_not_fill_their_last_tile_are_eager_in_every_bit(storage):
    start = drawn(AROUND_A_BLOCK, storage.dtype)
    assert_triton_is_eager(gradkit.AdamW, start, 2, **storage.options)


@pytest.mark.parametrize("storage", [Storage(torch.float32), Storage(torch.bfloat16)], ids=str)
@pytest.mark.parametrize("name", INEXACT)
def test_sums_and_polynomials_stay_within_the_table(name, storage):
    start = drawn(((1,), (65,), (2 * CHUNK + 1,), (0,)), storage.dtype)
    grads = [[torch.randn(p.shape).to(p.dtype) for p in start] for _ in range(3)]
    histories = []
    for backend in ("triton", "eager"):
        params = [p.clone().requires_grad_() for p in start]
        made = BY_NAME[name].optimizer(params, lr=0.05, backend=backend, decay="l2", weight_decay=0.3)
        histories.append(replay(made, params, grads, backend=backend))
    for ours, theirs in zip(*histories, strict=True):
        ours, theirs = ([x.double().numpy() for x in one] for one in (ours, theirs))
        assert_follows(ours, theirs, tolerance("backends", storage.dtype, "triton"))


def test_every_case_is_run():
    assert {*EXACT, *INEXACT} == {case.name for case in CASES}


@pytest.mark.parametrize(("name", "file"), test_golden.RUNS)
def test_a_golden_run_is_followed_in_triton(name, file):
    test_golden.test_a_golden_run_is_followed(name, file, "triton")


@pytest.mark.parametrize(("name", "file"), test_golden.CLIPS)
def test_clipping_in_triton_is_torchs(name, file):
    test_golden.test_clipping_by_global_norm_is_torchs(name, file, "triton")


@pytest.mark.parametrize(("name", "file"), test_golden.ZCLIPS)
def test_zclip_in_triton_cuts_and_remembers_as_the_authors_do(name, file):
    test_golden.test_zclip_cuts_and_remembers_as_the_authors_do(name, file, "triton")


def test_adaptive_clip_in_triton_cuts_as_the_authors_do():
    test_golden.test_adaptive_clip_cuts_as_the_authors_do("triton")


@pytest.mark.parametrize("name", ["clip_by_value", "grokfast_ma", "zclip", "adaptive_clip"])
def test_what_is_attached_leaves_in_the_gradient_what_an_own_step_takes(name):
    test_attach.test_behind_it_sgd_moves_each_parameter_by_minus_the_transformed_gradient(name, "triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_low_precision_gradient_is_rounded_once(dtype):
    test_attach.test_what_a_low_precision_gradient_becomes_is_rounded_once(dtype, "triton")


def test_a_gradient_of_another_layout_gets_its_values():
    test_attach.test_a_gradient_of_another_layout_gets_its_values("transposed", "triton")


@rule(slots=("level",), stage=gradkit.Stage.GRAD)
def centre(u, level, w):
    level = lerp(level, u, w)
    return u - level, level


@rule(slots=(Slot("old", kind="ring", length="window"),))
def differ(u, old):
    return u - 0.5 * old, u


@rule(slots=("scale",), stage=gradkit.Stage.PRECONDITION)
def divide(u, scale, w):
    scale = maximum(absolute(u), lerp(scale, absolute(u), w))
    return u / (scale + 1e-3), scale


@rule(uses=("scale",), stage=gradkit.Stage.UPDATE)
def hold(u, g, scale, first):
    return where((g * u > 0.0) & (first < 0.5), u, u * 0.25), scale


@rule
def bend(u, p):
    return sign(u) * sqrt(absolute(u)) + 0.01 * p


@derive("step")
def of_a_user(beta, step):
    return {"w": 1 - beta**step, "first": step == 1}


def users_chain(params: Any, **options: Any) -> gradkit.Optimizer:
    """Five links: slots owned and borrowed, a ring, a gate beside a mask, g and p asked for."""
    links = chain(centre, differ, divide, hold, bend, derive=of_a_user, name="mine", beta=0.9, window=2)
    return gradkit.Optimizer(params, links, **options)


def views(sizes: Any, offset: int) -> list[torch.Tensor]:
    """Parameters that start so many elements behind an aligned address."""
    torch.manual_seed(1)
    made = [torch.randn(n + offset)[offset:].requires_grad_() for n in sizes]
    assert all(p.data_ptr() % 16 == offset * 4 % 16 for p in made if p.numel())
    return made


@pytest.mark.parametrize("offset", [0, 1, 4], ids=["aligned", "unaligned", "aligned view"])
def test_a_users_chain_over_groups_views_and_late_parameters_is_eager(offset):
    sizes, left = (3, TILE + 5, 1, 257, 0), []
    for backend in ("eager", "triton"):
        params = views(sizes, offset)
        groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.3, "mine.window": 3, "weight_decay": 0.0}]
        optimizer = users_chain(groups, lr=0.1, backend=backend, weight_decay=0.1, decay="cautious", maximize=True)
        generator = torch.Generator().manual_seed(2)
        for t in range(5):
            for i, p in enumerate(params):
                g = torch.randn(p.numel() + offset, generator=generator)[offset:]
                p.grad = None if i in (1, 3) and t < 2 else g
            assert t or ran_on(optimizer) == {backend}
            optimizer.step()
        left.append([x for p in params for x in (p.detach(), *optimizer.state[p].values())])
    for ours, theirs in zip(*left, strict=True):
        assert_equal(ours, theirs)


@pytest.mark.parametrize(("offset", "fast"), [(0, 2), (4, 2), (1, 0)], ids=["aligned", "aligned view", "unaligned"])
@pytest.mark.parametrize("moved", ["parameter", "gradient", "slot"])
def test_only_full_aligned_tiles_go_the_fast_way(offset, fast, moved, monkeypatch):
    """In the interpreter an unaligned access is only slow; on a GPU it stops the program."""
    offsets = {name: offset * (name == moved) for name in ("parameter", "gradient", "slot")}
    (p,) = views([2 * TILE + 5], offsets["parameter"])
    optimizer = gradkit.Lion([p], backend="triton")
    optimizer.init_state()
    optimizer.state[p]["exp_avg"] = torch.zeros(p.numel() + offsets["slot"])[offsets["slot"] :]
    p.grad = torch.ones(p.numel() + offsets["gradient"])[offsets["gradient"] :]
    optimizer.step()
    kernel, seen = optimizer._plans["step"].batches[0].backend.kernels.last, []
    scope = kernel.run.fn.__globals__
    tile = scope["tile"]
    monkeypatch.setitem(scope, "tile", lambda *given: seen.append(given[-2]) or tile(*given))
    optimizer.step()
    assert seen == [True] * fast + [False] * (3 - fast)


@pytest.mark.parametrize("count", [3, 300])
def test_as_many_launches_as_explain_says(count, monkeypatch):
    params = [torch.ones(5, requires_grad=True) for _ in range(count)]
    transforms = [tx.clip_by_global_norm(1.0), tx.clip_by_norm(0.5)]
    optimizer = gradkit.AdamW(params, transforms=transforms, backend="triton")
    for p in params:
        p.grad = torch.ones_like(p)
    assert "  launches: 3; " in optimizer.explain() and ran_on(optimizer) == {"triton"}
    grids: list[int] = []
    monkeypatch.setattr(launch, "launch", lambda run, blocks, *more, **given: grids.append(blocks))
    for _ in range(2):
        optimizer.step()
    assert grids == [count] * 6  # a block for each tensor


def test_one_upload_a_step(monkeypatch):
    params = [torch.ones(5, requires_grad=True) for _ in range(4)]
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.1}]
    transforms = [tx.clip_by_global_norm(1.0), tx.clip_by_norm(0.5)]
    optimizer = gradkit.Grokfast(groups, filter="ma", transforms=transforms, backend="triton")
    sent: list[Any] = []
    send = launch.send
    for t in range(3):
        for p in params:
            p.grad = torch.ones_like(p)
        if t == 1:  # the tables that last are there
            monkeypatch.setattr(launch, "send", lambda *given: sent.append(given) or send(*given))
        optimizer.step()
    assert len(sent) == 2


def test_float64_goes_through_eager_and_says_so():
    params = [torch.ones(3, dtype=d, requires_grad=True) for d in (torch.float32, torch.float64)]
    optimizer = gradkit.Lion(params, backend="triton")
    assert "backend: triton (asked for)" in optimizer.explain()
    assert "backend: eager (float64, and Triton runs rules in float32)" in optimizer.explain()


def test_auto_on_the_cpu_stays_native_under_the_interpreter():
    assert ran_on(gradkit.Lion([torch.ones(3, requires_grad=True)])) <= {"native", "chunked"}


def test_a_rule_without_source_is_refused_before_anything_has_changed():
    scope: dict[str, Any] = {}
    exec("def typed(u): return u + 1.0", scope)
    p = torch.ones(3, requires_grad=True)
    p.grad = torch.ones(3)
    optimizer = gradkit.Optimizer([p], chain(rule(scope["typed"])), lr=1.0, backend="triton")
    with pytest.raises(RuntimeError, match="backend='triton' can't run: .*the source of typed can't be read"):
        optimizer.step()
    assert torch.equal(p, torch.ones(3)) and not optimizer.state


def test_trace_under_triton_ends_in_the_step():
    p = torch.linspace(-1, 1, 7).requires_grad_()
    p.grad = torch.linspace(2, -3, 7)
    optimizer = gradkit.AdamW([p], transforms=[tx.clip_by_global_norm(1.0)], backend="triton")
    (_, after) = optimizer.trace(p)[-1]
    optimizer.step()
    assert_equal(p.detach(), after)


def test_the_interpreter_is_not_given_addresses_on_a_gpu():
    p = torch.ones(3, requires_grad=True)
    (batch,) = gradkit.AdamW([p]).batches([p])
    batch.device = torch.device("cuda", 0)
    backend, why = backends.choose("auto", batch)
    assert backend is backends.Chunked and "Triton needs the CPU, for TRITON_INTERPRET is set" in why
