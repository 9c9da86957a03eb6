"""What a chain makes of given gradients."""

from typing import Any

import torch
from torch import Tensor

import gradkit
from tests.runs import ran_on

G = [[1.0, -2.0], [3.0, 0.5]]


def moves(links: Any, gradients: list[Any], start: Any = (0.0, 0.0), **given: Any) -> Tensor:
    """The parameter's moves at lr 1, one row a step."""
    p = torch.tensor(start, requires_grad=True)
    optimizer = gradkit.Optimizer([p], links, **{"lr": 1.0, **given})
    seen = [p.detach().clone()]
    for g in gradients:
        p.grad = torch.tensor(g)
        optimizer.step()
        seen.append(p.detach().clone())
    assert given.get("backend", "auto") in ("auto", *ran_on(optimizer))
    return torch.stack(seen[:-1]) - torch.stack(seen[1:])
