"""GradScaler: a scaled loss takes the steps of the unscaled one; an overflow takes none."""

from typing import Any

import pytest
import torch
from torch import Tensor

import gradkit
from tests.contract.rows import assert_moved, assert_same, everything, gradients, parameters, values

STEPS = 5
SCALE = 2.0**10  # a power of two: unscaling is exact


def loss_of(params: list[Tensor], row: list[Tensor]) -> Tensor:
    """Whose gradients are the row's."""
    return torch.stack([(p * g).sum() for p, g in zip(params, row, strict=True)]).sum()


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("overflow", [False, True], ids=["no overflow", "overflow"])
@pytest.mark.parametrize("explicit", [False, True], ids=["implicit", "explicit unscale"])
def test_a_scaled_loss_takes_the_steps_of_the_unscaled_one(make, explicit, overflow, micro_batches):
    params, plain = parameters(), parameters()
    optimizer, other = make(params), make(plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    skipped = 0
    for t in range(STEPS):
        rows = [gradients(params, 10 * t + k) for k in range(micro_batches)]
        bad = overflow and t == 2
        if bad:
            rows[-1][1][0] = torch.inf
        optimizer.zero_grad()
        other.zero_grad()
        for row in rows:
            scaler.scale(loss_of(params, row)).backward()
            loss_of(plain, row).backward()
        before = everything(optimizer, params)
        if explicit:
            scaler.unscale_(optimizer)
            assert_same([p.grad for p in params], [p.grad for p in plain])
        given = [p.grad for p in params]
        scaler.step(optimizer)
        scaler.update()
        assert all(p.grad is g for p, g in zip(params, given, strict=True))
        if bad:
            skipped += 1
            assert_same(everything(optimizer, params), before)
        else:
            other.step()
    assert_same(everything(optimizer, params), everything(other, plain))
    assert_moved(values(parameters()), values(params))
    assert float(optimizer.param_groups[0]["clock"]) == STEPS - skipped
    assert scaler.get_scale() == SCALE / 2**skipped and skipped == int(overflow)


def test_clipping_after_unscaling_is_clipping_without_a_scaler(make):
    params, plain = parameters(), parameters()
    optimizer, other = make(params), make(plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    for t in range(3):
        optimizer.zero_grad()
        other.zero_grad()
        scaler.scale(loss_of(params, gradients(params, t))).backward()
        loss_of(plain, gradients(plain, t)).backward()
        scaler.unscale_(optimizer)
        norms = [torch.nn.utils.clip_grad_norm_(x, 0.5) for x in (params, plain)]
        assert torch.equal(*norms) and norms[0] > 0.5
        scaler.step(optimizer)
        scaler.update()
        other.step()
    assert_same(everything(optimizer, params), everything(other, plain))


def test_the_scaler_unscales_and_not_the_optimizer():
    """An optimizer that claimed to handle scales itself would be unscaled twice after an explicit unscale_."""
    assert not getattr(gradkit.Optimizer, "_step_supports_amp_scaling", False)
    params = parameters()
    optimizer: Any = gradkit.Lion(params)
    assert not getattr(optimizer, "_step_supports_amp_scaling", False)
    assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")
