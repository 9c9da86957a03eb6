"""A step: closures, what counts as one, whose gradients are left alone, hooks, compiled models, and what it keeps."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from tests.contract.rows import (
    ALONE,
    SHAPES,
    assert_moved,
    assert_same,
    assert_same_numbers,
    everything,
    gradients,
    parameters,
    train,
    values,
)
from tests.tolerance import assert_equal


def test_a_closure_runs_with_grad_and_its_loss_comes_back(make):
    params, plain = parameters(), parameters()
    optimizer, other = make(params), make(plain)

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = sum((p * p).sum() for p in params)
        loss.backward()
        return loss

    losses = []
    for _ in range(3):
        with torch.no_grad():  # as torch's own: the caller's mode does not matter
            losses.append(optimizer.step(closure))
        other.zero_grad()
        expected = sum((p * p).sum() for p in plain)
        expected.backward()
        assert other.step() is None
        assert torch.equal(losses[-1], expected)
    assert_same(values(params), values(plain))
    assert losses[2] < losses[0]


def test_maximize_is_the_negated_gradient(make):
    up, down, straight = parameters(), parameters(), parameters()
    train(make(up, maximize=True), up, range(4))
    optimizer = make(down)
    for t in range(4):
        for p, g in zip(down, gradients(down, t), strict=True):
            p.grad = -g
        optimizer.step()
    train(make(straight), straight, range(4))
    assert_same(values(up), values(down))
    assert_moved(values(straight), values(up))


def test_without_any_gradient_nothing_happens(make):
    params = parameters()
    optimizer = make(params)
    fresh = everything(optimizer, params)
    assert optimizer.step() is None
    assert_same(everything(optimizer, params), fresh)
    train(optimizer, params, range(2))
    before = everything(optimizer, params)
    optimizer.zero_grad()
    optimizer.step()
    optimizer.step(lambda: None)
    assert_same(everything(optimizer, params), before)


def test_clock_and_counters_count_applied_steps(make):
    params = parameters()
    optimizer = make(params)
    for t in range(6):
        optimizer.zero_grad()
        if t % 2:
            params[0].grad, params[2].grad = gradients(params, t)[0], gradients(params, t)[2]
        if t == 5:
            params[2].grad = None
        optimizer.step()
    assert float(optimizer.param_groups[0]["clock"]) == 3
    for name in make.row.counters:
        assert [float(optimizer.state[p][name]) for p in params] == [3, 0, 2]


@pytest.mark.parametrize("maximize", [False, True])
def test_a_gradient_stays_the_same_object_with_the_same_bits(make, maximize):
    params = parameters()
    optimizer = make(params, maximize=maximize)
    params[2].grad = gradients(params, 0)[2].transpose(0, 1).contiguous().transpose(0, 1)  # another layout
    params[0].grad = gradients(params, 0)[0] * torch.tensor([torch.nan, torch.inf, -0.0])
    params[1].grad = gradients(params, 0)[1]
    given = [p.grad for p in params]
    copies = [(g.clone(), g.stride(), g.data_ptr(), g._version) for g in given]
    for _ in range(2):
        optimizer.step()
    for p, g, (copy, stride, pointer, version) in zip(params, given, copies, strict=True):
        assert p.grad is g and (g.stride(), g.data_ptr(), g._version) == (stride, pointer, version)
        assert_equal(g, copy)


def test_a_gradient_of_another_layout_is_the_same_gradient(make):
    params, plain = parameters(), parameters()
    optimizer, other = make(params), make(plain)
    for t in range(3):
        for p, g in zip(params, gradients(params, t), strict=True):
            p.grad = g.transpose(0, -1).contiguous().transpose(0, -1)
        assert params[0].grad.stride() != params[0].stride()
        if t == 1:
            params[0].grad = torch.zeros(10, 6)[::2, ::2].copy_(gradients(params, t)[0])  # with gaps
        if t == 2:
            params[1].grad = torch.ones(()).expand(SHAPES[1])  # stride 0
            other_grads = [*gradients(plain, t)]
            other_grads[1] = torch.ones(SHAPES[1])
        else:
            other_grads = gradients(plain, t)
        for p, g in zip(plain, other_grads, strict=True):
            p.grad = g
        optimizer.step()
        other.step()
    assert_same_numbers(make.row, values(params), values(plain))


@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad_both_ways(make, to_none):
    params = parameters()
    optimizer = make(params)
    train(optimizer, params, range(1))
    optimizer.zero_grad(set_to_none=to_none)
    assert all((p.grad is None) == to_none for p in params)
    before = values(params)
    optimizer.step()
    assert float(optimizer.param_groups[0]["clock"]) == (1 if to_none else 2)
    moved = [not torch.equal(a, p) for a, p in zip(before, params, strict=True)]
    cautious = make.row.coupled  # which drops a momentum that no gradient agrees with
    assert not any(moved) if to_none else all(moved) or cautious


@pytest.mark.parametrize("make", ALONE, ids=str)
def test_a_frozen_parameter_stays_and_starts_afresh_when_freed(make):
    params, others, alone = parameters(), parameters(), parameters()
    params[1].requires_grad_(False)
    optimizer, company, single = make(params), make([others[0], others[2]]), make(alone[1:2])
    for t in range(6):
        if t == 3:
            params[1].requires_grad_(True)
            single.param_groups[0]["clock"].fill_(t)  # counted in steps of the optimizer
        rows = gradients(params, t)
        for i, p in enumerate(params):
            others[i].grad = alone[i].grad = rows[i].clone()
            p.grad = rows[i] if p.requires_grad else None
        optimizer.step()
        company.step()
        if t < 3:
            assert params[1] not in optimizer.state and torch.equal(params[1], parameters()[1])
        else:
            single.step()
            assert_same(params[1].detach(), alone[1].detach())
    assert_same(values(params[::2]), values(others[::2]))
    assert not torch.equal(params[1], parameters()[1])


def test_hooks_run_around_a_step(make):
    params = parameters()
    optimizer = make(params)
    seen: list[Any] = []
    before = values(params)
    handles = [
        optimizer.register_step_pre_hook(
            lambda o, args, kwargs: seen.append(("pre", o, torch.equal(params[0], before[0])))
        ),
        optimizer.register_step_post_hook(
            lambda o, args, kwargs: seen.append(("post", o, torch.equal(params[0], before[0])))
        ),
        register_optimizer_step_pre_hook(lambda o, args, kwargs: seen.append(("global pre", o, True))),
        register_optimizer_step_post_hook(lambda o, args, kwargs: seen.append(("global post", o, False))),
    ]
    try:
        train(optimizer, params, range(1))
    finally:
        for h in handles:
            h.remove()
    assert {name for name, _, _ in seen} == {"pre", "post", "global pre", "global post"}
    assert all(o is optimizer and untouched == name.endswith("pre") for name, o, untouched in seen)
    train(optimizer, params, range(1))
    assert len(seen) == 4


def test_a_profiler_names_the_step(make):
    params = parameters()
    optimizer = make(params)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(optimizer, params, range(2))
        optimizer.zero_grad()
    counts = {e.key: e.count for e in profile.key_averages()}
    assert counts[f"Optimizer.step#{make.row.cls.__name__}.step"] == 2
    assert counts[f"Optimizer.zero_grad#{make.row.cls.__name__}.zero_grad"] == 1


def small_model() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)), torch.randn(16, 4)


def test_a_compiled_model_trains_and_may_hold_the_step(make):
    """The "eager" backend of torch.compile runs the graph's own calls: whatever is compiled keeps its bits."""
    runs = []
    for compiled in (False, True):
        model, x = small_model()
        optimizer = make(model.parameters())
        forward = torch.compile(model, backend="eager") if compiled else model

        def one(forward: Any = forward, optimizer: Any = optimizer, x: Tensor = x) -> Tensor:
            loss = (forward(x) - x.sum(1, keepdim=True)).square().mean()
            seen = loss.detach()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return seen

        step = torch.compile(one, backend="eager") if compiled else one
        losses = [step() for _ in range(8)]
        assert losses[-1] < losses[0]
        runs.append((torch.stack(losses), values(model.parameters())))
    torch._dynamo.reset()
    assert_same(*runs)


class Made(TorchDispatchMode):
    """Remembers every tensor that torch makes."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.tensors += [
            weakref.ref(x) for x in (out if isinstance(out, tuple | list) else [out]) if isinstance(x, Tensor)
        ]
        return out


def test_a_step_keeps_no_gradient_and_nothing_of_a_parameters_size(make):
    size = 1237
    params = [torch.ones(size, requires_grad=True), torch.ones(size, 3).t().requires_grad_()]
    optimizer = make(params)
    with Made() as made:
        for _ in range(2):
            params[0].grad = torch.randn(size)
            params[1].grad = torch.randn(3, size)  # of another layout: copied for the step
            optimizer.step()
    gone = [weakref.ref(p.grad) for p in params]
    optimizer.zero_grad()
    assert [r() for r in gone] == [None, None]
    kept = [*params, *(s for state in optimizer.state.values() for s in state.values())]
    known = {x.untyped_storage().data_ptr() for x in kept}
    alive = [x for r in made.tensors if (x := r()) is not None and x.untyped_storage().nbytes() >= 2 * size]
    assert [x for x in alive if x.untyped_storage().data_ptr() not in known] == []
    assert alive and len(made.tensors) > len(alive)  # slots, at least, and a temporary
