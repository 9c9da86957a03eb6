"""What tests of transforms in front of others' optimizers share."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

import gradkit
from gradkit import transforms as tx
from gradkit.attach import Attached
from tests.contract.rows import parameters, train


def attached(optimizer: torch.optim.Optimizer, *transforms: gradkit.Chain, backend: str = "auto") -> Attached:
    handle = gradkit.attach(optimizer, *transforms)
    handle.backend = backend
    return handle


def sgd(params: Iterable[Any], **given: Any) -> torch.optim.SGD:
    return torch.optim.SGD(params, **{"lr": 1.0, **given})


def pair() -> list[gradkit.Chain]:
    """One with slots of each parameter, one with numbers over all."""
    return [tx.grokfast_ma(window=3, warmup=False), tx.zclip(warmup_steps=3)]


def half_way(**given: Any) -> tuple[list[Tensor], torch.optim.Optimizer, Attached]:
    """AdamW with two attached transforms behind five steps."""
    params = parameters(given.pop("dtype", torch.float32))
    optimizer = torch.optim.AdamW(params, lr=0.01, **given)
    handle = gradkit.attach(optimizer, *pair())
    train(optimizer, params, range(5))
    return params, optimizer, handle


def clones(params: Iterable[Tensor]) -> list[Tensor]:
    return [p.detach().clone().requires_grad_() for p in params]


def ours(optimizer: torch.optim.Optimizer) -> set[str]:
    """Keys of ours that an optimizer or its state dict shows."""
    file = optimizer.state_dict()
    dicts = [*optimizer.param_groups, *optimizer.state.values(), *file["param_groups"], *file["state"].values()]
    return {k for d in dicts for k in d if k.startswith("gradkit")}
