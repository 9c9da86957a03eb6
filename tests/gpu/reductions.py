"""Sums over tensors: torch's clipping beside ours, and the same bits however blocks and streams race."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import gradkit
from bench.shapes import GPT2, RESNET50, Shape
from gradkit import measure, rule
from gradkit.ops import where
from gradkit.transforms import cautious, clip_by_global_norm, clip_by_norm
from tests.runs import ran_on
from tests.tolerance import tolerance

from .checks import rows
from .place import Place, give

NORMS = (1.0, 2.0, float("inf"))


def clipped(params: list[Tensor], max_norm: float, norm_type: float, backend: str) -> gradkit.Optimizer:
    """Stepped from zero at lr 1, a parameter becomes its clipped gradient, negated."""
    return gradkit.Optimizer(
        params, gradkit.chain(clip_by_global_norm(max_norm, norm_type=norm_type)), lr=1.0, backend=backend
    )


@rows({f"{m.title}, norm {norm:g}": (m, norm) for m in (RESNET50, GPT2) for norm in NORMS})
def test_a_global_clip_is_torchs_clip_grad_norm(place: Place, model: Shape, norm_type: float) -> None:
    """Torch's in float64: its float32 sums of a hundred million squares are not exact enough to judge ours."""
    shapes = place.shapes(model)
    params = [torch.zeros(s, device=place.device, requires_grad=True) for s in shapes]
    give(params, 0)
    exact = [torch.zeros_like(p, dtype=torch.float64) for p in params]
    for q, p in zip(exact, params, strict=True):
        q.grad = p.grad.double()
    total = torch.nn.utils.get_total_norm([q.grad for q in exact], norm_type)
    max_norm = 0.3 * float(total)
    torch.nn.utils.clip_grad_norm_(exact, max_norm, norm_type)
    optimizer = clipped(params, max_norm, norm_type, place.backend)
    assert ran_on(optimizer) == {place.backend}
    optimizer.step()
    relative = tolerance("backends", torch.float32, place.backend)
    for i, (p, q) in enumerate(zip(params, exact, strict=True)):
        apart = (p.detach() + q.grad).abs()
        assert (apart <= relative * q.grad.abs()).all(), f"parameter {i}: up to {float(apart.max()):.3g} apart"


@rows({str(x): (x,) for x in (float("nan"), float("inf"))})
def test_one_bad_element_among_all_is_seen_by_every_norm(place: Place, bad: float) -> None:
    for norm_type in NORMS:
        params = [torch.zeros(s, device=place.device, requires_grad=True) for s in place.shapes(RESNET50)]
        give(params, 0)
        wanted = [torch.zeros_like(p) for p in params]
        params[-2].grad.view(-1)[-1] = bad
        for q, p in zip(wanted, params, strict=True):
            q.grad = p.grad.clone()
        torch.nn.utils.clip_grad_norm_(wanted, 1.0, norm_type)
        clipped(params, 1.0, norm_type, place.backend).step()
        for p, q in zip(params, wanted, strict=True):
            assert torch.equal(p.isnan(), q.grad.isnan()) and torch.equal(p == 0.0, q.grad == 0.0)


def product(count: Any, share: Any, largest: Any) -> Any:
    return count * share * largest


REDUCED = {"count": "sum", "share": "mean", "largest": "max"}  # of ones: all elements, 1 and 1


@measure(scope="all", reduce=REDUCED, gives=("elements",), finish=product)
def ones_of_all(u):
    one = where(u < u, u, 1.0)
    return one, one, one


@measure(scope="tensor", reduce=REDUCED, gives=("elements",), finish=product)
def ones_of_each(u):
    one = where(u < u, u, 1.0)
    return one, one, one


@rule
def instead(u, elements):
    return 0.0 * u + elements


@rows({f"{m.title}, {ones.name}": (m, ones) for m in (RESNET50, GPT2) for ones in (ones_of_all, ones_of_each)})
def test_every_element_counts_once(place: Place, model: Shape, ones: Any) -> None:
    """More of them than float32 can count one by one; what is loaded beyond a tensor's end is nobody's."""
    params = [torch.zeros(s, device=place.device, requires_grad=True) for s in place.shapes(model)]
    give(params, 0)
    optimizer = gradkit.Optimizer(params, gradkit.chain(ones, instead), lr=1.0, backend=place.backend)
    assert ran_on(optimizer) == {place.backend}
    optimizer.step()
    elements = sum(p.numel() for p in params)
    for p in params:
        wanted = -float(elements if ones is ones_of_all else p.numel())
        assert (p == wanted).all(), f"{p.flatten()[0].item()} and not {wanted}"


class Raced:
    """An optimizer whose parameters lie in one tensor: back to zero, a step, and the bits beside a new optimizer's.

    Two sets of gradients take turns: a result that is left from the step before is wrong.
    """

    def __init__(self, place: Place, make: Callable[[list[Tensor], str], gradkit.Optimizer], seed: int):
        sizes = place.raced
        self.flat = torch.zeros(sum(sizes), device=place.device)
        self.params = [x.detach().requires_grad_() for x in self.flat.split(sizes)]
        self.turns = []
        for k in (0, 1):
            give(self.params, 2 * seed + k)
            grads = [p.grad for p in self.params]
            self.flat.zero_()
            make(self.params, place.backend).step()
            self.turns.append((grads, self.flat.clone()))
        self.optimizer = make(self.params, place.backend)
        assert ran_on(self.optimizer) == {place.backend}
        self.first, other = (bits for _, bits in self.turns)
        assert self.first.count_nonzero() > 0.1 * len(self.flat) and not torch.equal(self.first, other)
        self.wrong = torch.zeros((), dtype=torch.int64, device=place.device)

    def again(self) -> None:
        grads, wanted = self.turns[0]
        self.turns.reverse()
        for p, g in zip(self.params, grads, strict=True):
            p.grad = g
        self.flat.zero_()
        self.optimizer.step()
        self.wrong += (self.flat != wanted).sum()


def over_all(params: list[Tensor], backend: str) -> gradkit.Optimizer:
    return clipped(params, 0.5, 2.0, backend)


def each_tensor(params: list[Tensor], backend: str) -> gradkit.Optimizer:
    return gradkit.Optimizer(params, gradkit.chain(clip_by_norm(0.5)), lr=1.0, backend=backend)


def both(params: list[Tensor], backend: str) -> gradkit.Optimizer:
    links = gradkit.chain(clip_by_global_norm(0.5), clip_by_norm(0.01), cautious())
    return gradkit.Optimizer(params, links, lr=1.0, backend=backend)


SCOPES = {"over all": (over_all,), "of each tensor": (each_tensor,), "one behind another": (both,)}


@rows(SCOPES)
def test_a_reduction_gives_the_same_bits_however_its_blocks_race(place: Place, make: Callable) -> None:
    """Many streams at once: every block's order of arrival is another, and the last of them is another one."""
    raced = [Raced(place, make, seed) for seed in range(place.many)]
    place.settle()
    streams = place.streams(place.many)
    for r in range(place.repetitions):
        if r % 10 == 0:
            place.hold(streams)
        for stream, one in zip(streams, raced, strict=True):
            with stream:
                one.again()
    place.settle()
    assert [int(one.wrong) for one in raced] == [0] * place.many
    assert len({int(one.first.view(torch.int32).long().sum()) for one in raced}) == place.many


def test_parameters_of_two_dtypes_are_clipped_by_one_norm(place: Place) -> None:
    kinds = [(s, d) for s in place.shapes(RESNET50) for d in (torch.float32, torch.bfloat16)]
    params = [torch.zeros(s, dtype=d, device=place.device, requires_grad=True) for s, d in kinds]
    give(params, 0)
    exact = [torch.zeros_like(p, dtype=torch.float64) for p in params]
    for q, p in zip(exact, params, strict=True):
        q.grad = p.grad.double()
    max_norm = 0.3 * float(torch.nn.utils.get_total_norm([q.grad for q in exact]))
    torch.nn.utils.clip_grad_norm_(exact, max_norm)
    optimizer = clipped(params, max_norm, 2.0, place.backend)
    assert ran_on(optimizer) == {place.backend}
    optimizer.step()
    for p, q in zip(params, exact, strict=True):
        relative = tolerance("backends", p.dtype, place.backend)
        assert ((p.detach() + q.grad).abs() <= relative * q.grad.abs()).all()
