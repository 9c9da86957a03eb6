"""Splits through Triton's interpreter: what is selected has its state side by side, and its place in every tile."""

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("tests/triton/test_split.py needs TRITON_INTERPRET=1; `make test` sets it")

from typing import Any

import numpy as np
import pytest
import torch

import gradkit
from gradkit import chain, measure, rule
from gradkit.ops import absolute, minimum
from gradkit.selection import Choice, split
from gradkit.triton_kernels import launch
from tests.runs import ran_on
from tests.test_backends import BF16, FP16, Storage, hostile, run
from tests.tolerance import assert_equal, tolerance

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about overflows that are wanted here

TILE, CHUNK = (launch.options(launch.shape().apply)[name] for name in ("TILE", "CHUNK"))
BLOCKS = (5, CHUNK // 5 + 1)  # three tiles: a block, and part of another
LINES = (3, TILE)  # of these rows one tile is selected, and two are not
KINDS = ("columns", "rows", "randk")


@rule(slots=("level",))
def smoothed(u, level):
    level = 0.5 * level + u
    return level, level


@rule
def halved(u, p):
    return 0.5 * u + 0.1 * p


def frugal(params: Any, **options: Any) -> gradkit.Optimizer:
    return gradkit.FRUGAL([{"params": params, "role": "matrix"}], **{"density": 0.4, "update_gap": 2} | options)


def of_a_user(params: Any, kind: str, **options: Any) -> gradkit.Optimizer:
    sides = split(kind, chain(smoothed), chain(halved), density=0.4, update_gap=2)
    return gradkit.Optimizer(params, sides, **options)


def drawn(shapes: Any, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(s).to(dtype) for s in shapes]


def assert_triton_is_eager(
    make: Any, start: list[torch.Tensor], steps: int, gradient: Any = hostile, **options: Any
) -> None:
    """Parameters and all state, in every bit."""
    grads = [[gradient(p, t) for p in start] for t in range(steps)]
    theirs, ours = (run(make, start, grads, backend, **options) for backend in ("eager", "triton"))
    assert ours.keys() == theirs.keys()
    for what, value in ours.items():
        assert_equal(value, theirs[what], what)


@pytest.mark.parametrize("kind", KINDS)
def test_a_split_is_eager_in_every_bit(kind):
    """Over two selections; beside it tensors that are selected whole, or not at all."""
    start = drawn((BLOCKS, LINES, (2, 1), (7,), (6, 5, 3, 1)))
    explained = of_a_user([p.clone().requires_grad_() for p in start], kind).explain()
    assert explained.count("  chain:") == 3 and f"  split: {kind}, " in explained
    assert_triton_is_eager(of_a_user, start, 3, kind=kind, weight_decay=0.3, maximize=True)


LOW = (
    Storage(BF16, {"rounding": "kahan"}),
    Storage(BF16, {"rounding": "stochastic", "state_dtype": BF16, "seed": 7}),
    Storage(FP16),
)


@pytest.mark.parametrize("storage", LOW, ids=str)
def test_every_storage_is_eager_in_every_bit(storage):
    start = drawn((BLOCKS, (17, 30)), storage.dtype)
    assert_triton_is_eager(frugal, start, 3, split="randk", weight_decay=0.3, **storage.options)


def test_memory_that_is_not_aligned_has_eagers_bits():
    def views(params: Any, **options: Any) -> gradkit.Optimizer:
        with torch.no_grad():
            for p in params:
                p.set_(torch.cat([p.new_zeros(1), p.flatten()])[1:].view(p.shape))
        assert all(p.data_ptr() % 16 == 4 for p in params)
        return frugal(params, **options)

    assert_triton_is_eager(views, drawn(((3, 700),)), 2, split="randk")


def itself(most):
    return most


@measure(scope="tensor", reduce={"most": "max"}, gives=("top",), finish=itself)
def largest(u):
    return absolute(u)


@measure(scope="tensor", reduce={"most": "max"}, gives=("change",), finish=itself)
def largest_change(u, before):
    return absolute(u - before)


@rule
def over_top(u, top):
    return u / top


@rule
def over_change(u, change):
    return u / change


@pytest.mark.parametrize("behind", [(), (halved,)], ids=["right behind", "behind a rule"])
def test_measures_before_and_behind_are_eager_in_every_bit(behind):
    """Maxima: no order of a sum. What the one behind compares with is what the split, or the rule behind, was given."""

    def make(params: Any, **options: Any) -> gradkit.Optimizer:
        sides = split("randk", chain(smoothed), chain(halved), density=0.4, update_gap=2)
        links = chain(largest, over_top, sides, *behind, largest_change, over_change)
        return gradkit.Optimizer(params, links, **options)

    start = drawn((BLOCKS, (5, 6)))
    assert_triton_is_eager(make, start, 3, lambda p, t: torch.randn(p.shape), weight_decay=0.3)


@rule(counts="clipped")
def cut(u):
    return minimum(u, 0.5)


def test_sums_and_what_is_counted_behind_a_split_are_eagers():
    seen = []
    for backend in ("triton", "eager"):
        (p,) = (p.requires_grad_() for p in drawn((BLOCKS,)))
        sides = split("rows", chain(smoothed), density=0.4)
        optimizer = gradkit.Optimizer([p], chain(sides, cut), backend=backend)
        optimizer.stats(every=1)
        for t in range(2):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(t))
            optimizer.step()
        assert ran_on(optimizer) == {backend}
        seen.append(optimizer.stats()["0"])
    ours, theirs = seen
    assert 0.1 < theirs["cut.clipped"] < 0.2, "a third of what is selected, and nothing of the rest"
    assert ours == pytest.approx(theirs, rel=tolerance("backends", torch.float32, "triton"))


def test_a_step_is_one_launch_and_one_upload(monkeypatch):
    params = [p.requires_grad_() for p in drawn(((3, 4), (5, 6)))]
    optimizer = frugal(params, split="columns", update_gap=4, backend="triton")
    calls: list[str] = []
    for name in ("launch", "send"):
        real = getattr(launch, name)
        monkeypatch.setattr(launch, name, lambda *a, name=name, real=real, **k: calls.append(name) or real(*a, **k))
    for _ in range(3):
        calls.clear()
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert calls == ["send", "launch"]


@pytest.mark.parametrize("tile", [64, 512])
@pytest.mark.parametrize("share", [0.01, 0.5, 1.0])
def test_marks_say_what_is_selected_and_what_is_before(tile, share):
    mask = np.random.default_rng(0).random(3 * tile + 21) < share
    marks, counts = launch.marks(Choice("randk", np.flatnonzero(mask), torch.Size([1, len(mask)])), tile)
    before = np.cumsum(mask) - mask
    bit, mine = np.arange(len(mask)) % 16, marks[np.arange(len(mask)) // 16]
    assert ((mine >> bit & 1) == mask).all()
    assert (counts == before[::tile]).all()
    within = (mine >> 16) + [bin(int(word) & (1 << int(b)) - 1).count("1") for word, b in zip(mine, bit, strict=True)]
    assert (within + np.repeat(counts, tile)[: len(mask)] == before).all()
