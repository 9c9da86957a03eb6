"""What holds for every optimizer: how hyperparameters may be given, and how parameters are written back."""

from typing import Any

import numpy as np
import pytest
import torch

import gradkit
from tests.cases import BACKENDS, BY_NAME, DECAYS
from tests.runs import assert_same_run, replay, trajectory
from tests.scenarios import LR, draw, start
from tests.tolerance import assert_equal

BF16 = torch.bfloat16
ROUNDINGS = ("nearest", "stochastic", "kahan")
WRITE_BACKS = [(torch.float32, "nearest"), *((d, r) for d in (BF16, torch.float16) for r in ROUNDINGS)]
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def as_tensors(arguments: dict[str, Any]) -> dict[str, Any]:
    def tensor(x: Any) -> Any:
        return tuple(map(tensor, x)) if isinstance(x, tuple) else torch.tensor(x, dtype=torch.float64)

    return {k: tensor(v) if isinstance(v, float | tuple) else v for k, v in arguments.items()}


@pytest.mark.parametrize("name", BY_NAME)
def test_a_hyperparameter_as_a_tensor_gives_the_same_bits(name):
    case = BY_NAME[name]
    given = {**case.arguments, "lr": LR, "weight_decay": 0.1}
    given.pop("norm_type", None)
    assert any(isinstance(v, torch.Tensor) for v in as_tensors(given).values())
    assert_same_run(trajectory(case.build, **as_tensors(given)), trajectory(case.build, **given))


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor"])
def test_a_scheduled_lr_gives_the_bits_of_one_that_was_set(tensor, name):
    case = BY_NAME[name]
    params = [torch.tensor(x, requires_grad=True) for x in start()]
    optimizer = case.optimizer(params, lr=torch.tensor(LR, dtype=torch.float64) if tensor else LR, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    ours = [[p.detach().clone()] for p in params]
    for row in draw():
        for p, g in zip(params, row, strict=True):
            p.grad = torch.tensor(g)
        optimizer.step()
        scheduler.step()
        for history, p in zip(ours, params, strict=True):
            history.append(p.detach().clone())
    lrs = [LR * 0.5 ** (t // 2) for t in range(len(draw()))]
    assert_same_run(ours, trajectory(case.build, lrs=lrs, weight_decay=0.1, **case.arguments))


def assert_a_dummy_step_leaves_every_bit(name: str, dtype: torch.dtype, rounding: str, decay: str) -> None:
    """Fresh, and after steps that moved."""
    for backend in BACKENDS:
        params = [torch.tensor(x).to(dtype).requires_grad_() for x in start()]
        options = {"decay": decay, "weight_decay": 0.1, "rounding": rounding, "backend": backend}
        optimizer = BY_NAME[name].optimizer(params, lr=LR, **options)
        zero = [torch.zeros_like(p) for p in params]
        for rows, lrs in (([zero] * 2, [0.0] * 2), (draw()[:2], [LR] * 2), ([zero] * 2, [0.0] * 2)):
            for seen in replay(optimizer, params, rows, lrs):
                what = f"{backend}, decay {decay}, lr {lrs[0]}"
                if lrs[0]:
                    assert not torch.equal(seen[0], seen[-1]), what
                else:
                    assert_equal(seen[0], seen[-1], what)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize(("dtype", "rounding"), WRITE_BACKS)
def test_a_dummy_step_leaves_every_bit_in_each_decay_and_write_back(dtype, rounding, decay):
    """Zero gradients and lr 0, as distributed checkpoints do."""
    assert_a_dummy_step_leaves_every_bit("lion", dtype, rounding, decay)


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize(("dtype", "rounding"), [WRITE_BACKS[0], WRITE_BACKS[2], WRITE_BACKS[-1]])
def test_a_dummy_step_of_any_optimizer_leaves_every_bit(dtype, rounding, name):
    assert_a_dummy_step_leaves_every_bit(name, dtype, rounding, "decoupled")


@each_backend
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_stochastic_and_kahan_follow_float32_where_nearest_stalls(dtype, backend):
    """Steps of 1/32 of the last place: rounded to nearest they are lost, 160 times."""
    steps, n = 160, 4096
    lr = torch.finfo(dtype).eps / 32
    moved = {}
    for rounding in ROUNDINGS:
        p = torch.ones(n, dtype=dtype).requires_grad_()
        optimizer = gradkit.Lion([p], lr=lr, rounding=rounding, backend=backend)
        p.grad = -torch.ones_like(p)
        for _ in range(steps):
            optimizer.step()
        moved[rounding] = p.detach().double() - 1.0
        rest = optimizer.state[p].get("compensation")
        moved[rounding] += rest.double() if rest is not None else 0.0
    whole = steps * lr  # five units in the last place
    assert (moved["nearest"] == 0.0).all()
    assert (moved["kahan"] - whole).abs().max() <= lr
    assert moved["stochastic"].mean().item() == pytest.approx(whole, rel=0.05)
    assert moved["stochastic"].unique().numel() > 3


@each_backend
def test_kahan_keeps_the_bits_of_a_parameter_on_a_tie(backend):
    """1 + 3/128 with half a unit left over rounds to its even neighbour: a step that moves nothing must not round."""
    p = torch.tensor([1.0234375], dtype=BF16, requires_grad=True)
    optimizer = gradkit.Lion([p], lr=0.0, rounding="kahan", backend=backend)
    optimizer.init_state()
    optimizer.state[p]["compensation"].fill_(2**-8)
    ((before, *after),) = replay(optimizer, [p], [[np.ones(1)]] * 2, backend=backend)
    assert float(before) + 2**-8 == 1.02734375 and torch.tensor(1.02734375).to(BF16) != before
    assert_equal(after[-1], before)
    assert optimizer.state[p]["compensation"].item() == 2**-8


def test_the_seed_chooses_the_random_bits():
    left = []
    for seed in (0, 0, 1):
        p = torch.linspace(0.1, 2.0, 999).to(BF16).requires_grad_()
        replay(gradkit.Lion([p], lr=1e-4, rounding="stochastic", seed=seed), [p], [[np.ones(999)]] * 3)
        left.append(p.detach())
    assert_equal(left[0], left[1])
    assert not torch.equal(left[0], left[2])
