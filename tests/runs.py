"""Running an optimizer on given gradients, and comparing two runs."""

from collections.abc import Sequence
from typing import Any

import torch

import gradkit
from tests.scenarios import LR, draw, start
from tests.tolerance import assert_equal, assert_follows


def ran_on(optimizer: gradkit.Optimizer) -> set[str]:
    """The backends that explain() names, one for each batch."""
    lines = [x.split() for x in optimizer.explain().splitlines() if x.strip().startswith("backend:")]
    assert lines, "explain() names no backend"
    return {words[1] for words in lines}


def replay(
    optimizer: gradkit.Optimizer,
    params: Sequence[torch.Tensor],
    gradients: Sequence[Sequence[Any]],
    lrs: Sequence[float] | None = None,
    backend: str | None = None,
) -> list[list[torch.Tensor]]:
    """Run the optimizer on given gradients -> for each parameter its values, the start first."""
    seen = [[p.detach().clone()] for p in params]
    for t, row in enumerate(gradients):
        for p, g in zip(params, row, strict=True):
            p.grad = None if g is None else torch.as_tensor(g).to(p.device, p.dtype, copy=True)
        if lrs is not None:
            for group in optimizer.param_groups:
                group["lr"] = lrs[t]
        if backend is not None and t == 0:
            assert ran_on(optimizer) == {backend}
        optimizer.step()
        for history, p in zip(seen, params, strict=True):
            history.append(p.detach().clone())
    return seen


def trajectory(make: Any, gradients: Any = None, *, backend: str = "auto", lrs: Any = None, **options: Any) -> list:
    params = [torch.tensor(x, requires_grad=True) for x in start()]
    return replay(make(params, **{"lr": LR, "backend": backend, **options}), params, gradients or draw(), lrs)


def assert_same_run(a: list, b: list, relative: float = 0.0) -> None:
    """Bitwise unless a tolerance is given; and the run moved."""
    for ours, theirs in zip(a, b, strict=True):
        assert not torch.equal(theirs[0], theirs[-1])
        if relative:
            assert_follows([x.numpy() for x in ours], [x.numpy() for x in theirs], relative)
        else:
            for t, (x, y) in enumerate(zip(ours, theirs, strict=True)):
                assert_equal(x, y, f"step {t}")
