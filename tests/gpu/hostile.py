"""Gradients of bad days, sizes at the edges of a block, memory that is not aligned, and more than 2^31 elements."""

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

import gradkit
from gradkit import random
from gradkit.backends.eager import WRITE_STREAM
from tests.cases import CASES, Case
from tests.runs import assert_same_run, ran_on, replay
from tests.scenarios import LR, SCENARIOS, start
from tests.tolerance import assert_equal, tolerance

from .checks import rows
from .parity import LOW
from .place import Place, give

STORED = {"fp32": (torch.float32, {}), **LOW}
MADE = {"AdamW": gradkit.AdamW, "Lion": gradkit.Lion}


@rows({case.name: (case,) for case in CASES})
def test_hostile_gradients_do_what_they_do_in_eager(place: Place, case: Case) -> None:
    relative = 0.0 if case.exact else tolerance("backends", torch.float32, place.backend)
    for name, scenario in SCENARIOS.items():
        histories = []
        for backend in (place.backend, "eager"):
            params = [torch.tensor(x, device=place.device, requires_grad=True) for x in start()]
            optimizer = case.optimizer(params, lr=LR, weight_decay=0.3, backend=backend)
            made = scenario()
            histories.append(replay(optimizer, params, made.gradients, made.lrs, backend))
        ours, theirs = ([[x.cpu() for x in one] for one in history] for history in histories)
        moved = [i for i, one in enumerate(theirs) if not torch.equal(one[0], one[-1])]
        assert moved, name
        try:
            assert_same_run([ours[i] for i in moved], [theirs[i] for i in moved], relative)
        except AssertionError as e:
            raise AssertionError(f"{name}: {e}") from None
        for i in {*range(len(theirs))} - {*moved}:
            assert torch.equal(ours[i][0], ours[i][-1]), f"{name}: parameter {i} moved, and not in eager"


def edges(place: Place) -> list[int]:
    """Sizes around every power of two that may be a tile or a chunk, and the smallest."""
    return [0, 1, 2, 3, *(n + d for n in place.lengths for d in (-1, 0, 1))]


def aligned(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(n, dtype=dtype, device=device)


def shifted(by: int) -> Callable[[int, torch.dtype, torch.device], Tensor]:
    """A view that starts some elements behind an aligned address."""
    return lambda n, dtype, device: torch.empty(n + by, dtype=dtype, device=device)[by:]


def run(backend: str, made: Callable, params: Sequence[Tensor], grads: Sequence[Tensor], **options: object) -> object:
    """Three steps; the gradients' memory stays where it is."""
    optimizer = made(params, lr=LR, weight_decay=0.1, backend=backend, **options)
    for t in range(3):
        give(params, t)
        for p, g in zip(params, grads, strict=True):
            p.grad = g.copy_(p.grad)
        assert t or ran_on(optimizer) == {backend}
        optimizer.step()
    return optimizer


def filled(memory: Callable, sizes: Sequence[int], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(3)
    values = (torch.randn(n, generator=generator, device=device) for n in sizes)
    return [memory(n, dtype, device).copy_(x) for n, x in zip(sizes, values, strict=True)]


def assert_eagers_bits(place: Place, made: Callable, sizes: Sequence[int], memory: Sequence[Callable], stored: tuple):
    """memory: of parameters and of gradients; every parameter and slot has eager's bits."""
    dtype, options = stored
    runs = []
    for backend in (place.backend, "eager"):
        params, grads = (filled(m, sizes, dtype, place.device) for m in memory)
        first = [p.clone() for p in params]
        params = [p.requires_grad_() for p in params]
        runs.append((params, run(backend, made, params, grads, **options)))
    (params, optimizer), (wanted, other) = runs
    for p, q, before in zip(params, wanted, first, strict=True):
        assert_equal(p.detach(), q.detach(), f"{p.numel()} elements")
        assert p.numel() < 64 or not torch.equal(p, before)
        for name, slot in other.state[q].items():
            assert_equal(optimizer.state[p][name], slot, f"{name} of {p.numel()} elements")


@rows({f"{n}, {name}": (made, stored) for n, made in MADE.items() for name, stored in STORED.items()})
def test_sizes_around_every_block_have_eagers_bits(place: Place, made: Callable, stored: tuple) -> None:
    assert_eagers_bits(place, made, edges(place), (aligned, aligned), stored)


@rows(
    {
        f"{n}, {name}, parameters {p} elements off, gradients {g}": (made, stored, p, g)
        for n, made in MADE.items()
        for name, stored in STORED.items()
        for p, g in ((1, 0), (0, 1), (3, 2), (4, 8))
    }
)
def test_memory_that_is_not_aligned_has_eagers_bits(place: Place, made: Callable, stored: tuple, p: int, g: int):
    sizes = [n + 5 for n in place.lengths]
    assert_eagers_bits(place, made, sizes, (shifted(p), shifted(g)), stored)


def test_a_step_writes_nothing_outside_its_parameters(place: Place) -> None:
    """Neighbours in one allocation: what lies between the parameters keeps its bits."""
    sizes, gap = edges(place), 3
    ends = list(accumulate(n + gap for n in sizes))
    whole = torch.full((ends[-1],), 7.0, device=place.device)
    params = [whole[end - gap - n : end - gap].detach().requires_grad_() for n, end in zip(sizes, ends, strict=True)]
    run(place.backend, gradkit.AdamW, params, [torch.zeros_like(p) for p in params])
    between = torch.cat([whole[end - gap : end] for end in ends])
    assert (between == 7.0).all()
    assert all((p != 7.0).any() for p in params if p.numel())


@rows({"nearest": ("nearest",), "stochastic": ("stochastic",)})
def test_more_elements_than_an_int32_counts_are_all_stepped(place: Place, rounding: str) -> None:
    """Lion's first step in bf16, element by element: p - lr sign(g); the momentum is (1 - beta2) g."""
    n, generator = place.beyond, torch.Generator(place.device).manual_seed(4)
    p, g = (torch.empty(n, dtype=torch.bfloat16, device=place.device).normal_(generator=generator) for _ in range(2))
    before = p.clone()
    optimizer = gradkit.Lion([p.requires_grad_()], lr=LR, betas=(0.9, 0.99), backend=place.backend, rounding=rounding)
    p.grad = g
    assert ran_on(optimizer) == {place.backend}
    optimizer.step()
    momentum, seed = optimizer.state[p]["exp_avg"], int(optimizer.param_groups[0]["seed"])
    weight = torch.tensor(1 - 0.99, dtype=torch.float32, device=place.device)
    for first in range(0, n, place.slice):
        part = slice(first, min(n, first + place.slice))
        exact = before[part].float() - LR * g[part].float().sign()
        wanted = exact.bfloat16()
        if rounding == "stochastic":
            element = torch.arange(part.start, part.stop, device=place.device)
            wanted = random.stochastic_round(exact, random.philox(element, 1, 0, seed, WRITE_STREAM), torch.bfloat16)
        assert_equal(p.detach()[part], wanted, f"elements from {first}")
        assert_equal(momentum[part], g[part].float() * weight, f"momentum from {first}")
