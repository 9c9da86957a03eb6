"""A chain run beside the optimizer's own: it changes slots alone, and counts nothing."""

import pytest
import torch

import gradkit
from gradkit.ops import absolute, isfinite, where
from gradkit.transform import Stage

BACKENDS = ("eager", "chunked", "native")
FACTOR = 3.0


@gradkit.rule(slots=("seen",), stage=Stage.PRECONDITION)
def keep(u, seen):
    return u + 0.0 * seen, seen


def all_finite(largest):
    return where(isfinite(largest), 1.0, 0.0)


@gradkit.measure(scope="all", reduce={"largest": "max"}, gives=("ok",), finish=all_finite)
def largest(u):
    return absolute(u)


@gradkit.rule(slots=("seen",))
def collect(u, seen, ok, factor):
    return u, where(ok > 0.5, seen + factor * u, seen)


COLLECT = gradkit.chain(largest, collect)


def optimizer_of(backend: str, dtype: torch.dtype = torch.float32, **options):
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(n, generator=generator).to(dtype).requires_grad_() for n in (5, 3)]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(dtype)
    return params, gradkit.Optimizer(params, gradkit.chain(keep), lr=0.1, backend=backend, **options)


@pytest.mark.parametrize("rounding", ["nearest", "kahan", "stochastic"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_it_changes_slots_and_nothing_else(backend, rounding):
    dtype = torch.float32 if rounding == "nearest" else torch.bfloat16
    params, optimizer = optimizer_of(backend, dtype, rounding=rounding, maximize=True)
    before = [p.detach().clone() for p in params]
    given = [torch.full((5,), 2.0), None]  # in another dtype than the parameter
    optimizer.run_beside(COLLECT, given, factor=FACTOR)
    assert optimizer._plans[COLLECT].batches[0].backend.name == backend
    assert torch.equal(optimizer.state[params[0]]["seen"], torch.full((5,), -2.0 * FACTOR))  # maximize
    assert not optimizer.state[params[1]]["seen"].any()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert float(optimizer.param_groups[0]["clock"]) == 0.0
    assert "factor" not in optimizer.param_groups[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_finite_in_one_tensor_stops_all(backend):
    params, optimizer = optimizer_of(backend)
    optimizer.run_beside(COLLECT, [torch.ones(5), torch.tensor([1.0, torch.inf, 1.0])], factor=1.0)
    assert not any(optimizer.state[p]["seen"].any() for p in params)


def test_values_change_without_a_new_plan_and_steps_keep_theirs():
    params, optimizer = optimizer_of("native")
    optimizer.step()
    plan, ones = optimizer._plans["step"], [torch.ones(5), torch.ones(3)]
    for factor in (1.0, 2.0):
        optimizer.run_beside(COLLECT, ones, factor=factor)
    beside = optimizer._plans[COLLECT]
    optimizer.step()
    optimizer.run_beside(COLLECT, ones, factor=4.0)
    assert optimizer._plans == {"step": plan, COLLECT: beside}
    assert torch.equal(optimizer.state[params[0]]["seen"], torch.full((5,), 7.0))


def test_without_any_tensor_nothing_happens():
    params, optimizer = optimizer_of("auto")
    optimizer.run_beside(COLLECT, [None, None], factor=1.0)
    assert not optimizer.state


def test_groups_that_differ_in_numbers_are_one_batch():
    params, _ = optimizer_of("auto")
    optimizer = gradkit.Optimizer([{"params": [p], "lr": 0.1 * i} for i, p in enumerate(params)], gradkit.chain(keep))
    optimizer.run_beside(COLLECT, [torch.ones(5), torch.ones(3)], factor=1.0)
    assert len(optimizer._plans[COLLECT].batches) == 1
