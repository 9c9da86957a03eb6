"""Every scheduler of torch.optim.lr_scheduler: what it sets is what the next step uses."""

import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as schedulers

from tests.contract.rows import LR, ROWS, Subject, assert_same, assert_same_numbers, gradients, parameters, values

STEPS = 6
WARM = {"factor": 0.5, "total_iters": 2}
TABLE = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, [lambda t: 1 / (1 + t), lambda t: 0.5**t]),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda t: 0.8),
    "StepLR": lambda o: schedulers.StepLR(o, 2, gamma=0.5),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [1, 3], gamma=0.5),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, **WARM),
    "LinearLR": lambda o: schedulers.LinearLR(o, total_iters=4),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.7),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.ConstantLR(o, **WARM), schedulers.ExponentialLR(o, 0.7)], milestones=[3]
    ),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, T_max=4),  # lr is 0 at step 4
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, **WARM), schedulers.ExponentialLR(o, 0.7)]
    ),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, factor=0.5, patience=1),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, base_lr=0.01, max_lr=0.1, step_size_up=2),  # moves beta1 as well
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, T_0=3),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, max_lr=[0.1, 0.2], total_steps=STEPS + 1),  # beta1 too
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, total_iters=5, power=2.0),
}
Series = list[list[tuple[Any, Any]]]
each = pytest.mark.parametrize("name", TABLE)


def two_groups(params: list[torch.Tensor]) -> list[dict[str, Any]]:
    return [{"params": params[:1]}, {"params": params[1:], "lr": LR / 8}]


def scheduled(make: Any, name: str, cycled: str) -> tuple[list[torch.Tensor], Series]:
    """Parameters after a scheduled run, and each step's lr and betas, or momentum, by group."""
    params = parameters()
    optimizer = make(two_groups(params))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # SequentialLR calls the schedulers inside it with an argument that they warn of
        warnings.filterwarnings("ignore", message="The epoch parameter", category=UserWarning)
        scheduler, series = TABLE[name](optimizer), []
        for t in range(STEPS):
            series.append([(g["lr"], g[cycled]) for g in optimizer.param_groups])
            for p, g in zip(params, gradients(params, t), strict=True):
                p.grad = g
            optimizer.step()
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
    return values(params), series


def of_torch(cycled: str, value: Any) -> Any:
    """An optimizer of torch whose betas, or momentum, start there."""
    cls: Any = torch.optim.AdamW if cycled == "betas" else torch.optim.SGD
    return partial(cls, lr=LR, **{cycled: value})


def first_two(value: Any) -> Any:
    """Of the betas those that torch's optimizers have."""
    return tuple(value)[:2] if isinstance(value, tuple | list) else value


def test_the_table_has_every_scheduler_of_torch():
    assert set(schedulers.__all__) - {"LRScheduler"} == TABLE.keys()


@each
def test_a_schedule_is_torchs_and_equals_values_set_by_hand(make, name):
    (cycled,) = make.row.other
    ours, series = scheduled(make, name, cycled)
    _, theirs = scheduled(of_torch(cycled, first_two(series[0][0][1])), name, cycled)
    assert [[(lr, first_two(b)) for lr, b in row] for row in series] == [
        [(lr, first_two(b)) for lr, b in row] for row in theirs
    ]
    params = parameters()
    optimizer = make(two_groups(params))
    for t, row in enumerate(series):
        for group, (lr, value) in zip(optimizer.param_groups, row, strict=True):
            group["lr"], group[cycled] = lr, value
        for p, g in zip(params, gradients(params, t), strict=True):
            p.grad = g
        optimizer.step()
    assert_same(ours, values(params))
    for group in range(2):
        assert len({row[group][0] for row in series}) > 1


@each
@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
def test_a_schedule_moves_both_backends_alike(row, name):
    (cycled,) = row.other
    eager, _ = scheduled(Subject(row, "eager"), name, cycled)
    default, _ = scheduled(Subject(row, "auto"), name, cycled)
    assert_same_numbers(row, default, eager)


@pytest.mark.parametrize("name", ["OneCycleLR", "CyclicLR"])
def test_a_cycling_beta_reaches_the_step(make, name):
    (cycled,) = make.row.other
    _, series = scheduled(make, name, cycled)
    rows = [row[0][1] if cycled == "betas" else (row[0][1],) for row in series]
    assert len({row[0] for row in rows}) > 1
    assert len({len(row) for row in rows}) == 1 and len({row[1:] for row in rows}) == 1
