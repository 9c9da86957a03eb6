"""Identities that hold exactly, or that name what a term does: each optimizer and transform against a simpler one."""

import inspect
import sys
from typing import Any

import numpy as np
import pytest
import torch

import gradkit
from gradkit import transforms as tx
from tests.cases import BACKENDS, BY_NAME, CASES, DECAYS, replay
from tests.scenarios import LR, SCENARIOS, draw, start
from tests.tolerance import assert_equal, assert_follows, tolerance

Make = Any  # a class, or a function of parameters and options
BF16 = torch.bfloat16
WRITE_BACKS = [(torch.float32, "nearest"), *((d, r) for d in (BF16, torch.float16) for r in ("nearest", "stochastic", "kahan"))]


def trajectory(make: Make, gradients: Any = None, *, backend: str = "auto", lrs: Any = None, **options: Any) -> list:
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


CLOSE = tolerance("reference", torch.float32)
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def test_every_case_names_its_limit_identities():
    here = dict(inspect.getmembers(sys.modules[__name__], inspect.isfunction))
    for case in CASES:
        assert case.limits and all(name in here for name in case.limits), case.name


@each_backend
def test_ademamix_without_alpha_is_adamw(backend):
    for warmups in ({}, {"alpha_warmup": 5, "beta3_warmup": 6}):
        mix = trajectory(gradkit.AdEMAMix, backend=backend, alpha=0.0, weight_decay=0.1, **warmups)
        assert_same_run(mix, trajectory(gradkit.AdamW, backend=backend, weight_decay=0.1))


def test_ademamix_without_beta1_has_no_fast_momentum():
    for betas, wanted in (((0.0, 0.9, 0.99), False), ((0.9, 0.9, 0.99), True)):
        p = torch.ones(4, requires_grad=True)
        optimizer = gradkit.AdEMAMix([p], betas=betas)
        replay(optimizer, [p], [[np.ones(4)]])
        assert set(optimizer.state[p]) == {"step", "exp_avg_slow", "exp_avg_sq"} | ({"exp_avg"} if wanted else set())


@each_backend
def test_ademamix_at_the_end_of_its_warmups_is_ademamix(backend):
    """From the last warm-up step on, alpha and beta3 are what the user gave."""
    plain = trajectory(gradkit.AdEMAMix, backend=backend)
    assert_same_run(trajectory(gradkit.AdEMAMix, backend=backend, alpha_warmup=1, beta3_warmup=1), plain)
    longer = trajectory(gradkit.AdEMAMix, backend=backend, alpha_warmup=4)
    assert not torch.equal(longer[0][1], plain[0][1])


@each_backend
@pytest.mark.parametrize("filter", ["ema", "ma"])
def test_grokfast_without_lamb_is_adamw_with_l2(filter, backend):
    options = {"betas": (0.9, 0.98), "weight_decay": 0.1, "backend": backend}
    filtered = trajectory(gradkit.Grokfast, filter=filter, window=3, lamb=0.0, **options)
    assert_same_run(filtered, trajectory(gradkit.AdamW, decay="l2", **options))


@each_backend
@pytest.mark.parametrize("name", ["grokfast_ema", "grokfast_ema_from_zero", "grokfast_ma", "grokfast_ma_sum"])
def test_a_filter_without_lamb_is_sgd(name, backend):
    given = {**BY_NAME[name].arguments, "lamb": 0.0, "backend": backend}
    assert_same_run(trajectory(BY_NAME[name].build, **given), trajectory(BY_NAME["sgd"].build, backend=backend))


@each_backend
def test_a_window_of_one_doubles_the_gradient(backend):
    doubled = [[2 * g for g in row] for row in draw()]
    ours = trajectory(BY_NAME["grokfast_ma"].build, window=1, lamb=1.0, backend=backend)
    assert_same_run(ours, trajectory(BY_NAME["sgd"].build, doubled, backend=backend), CLOSE)


@each_backend
def test_diffgrad_under_a_constant_gradient_is_adam_at_half_the_lr(backend):
    """The gradient stands still: friction 1/2 from the second step on; at first sigmoid(|g|)."""
    constant = [draw()[0]] * 6
    halved = [LR / 2] * 6
    slow = trajectory(gradkit.DiffGrad, constant, backend=backend, eps=1e-12)
    adam = trajectory(gradkit.AdamW, constant, backend=backend, eps=1e-12, lrs=halved, weight_decay=0.0)
    for ours, theirs, g in zip(slow, adam, constant[0], strict=True):
        for t in range(2, 6):
            torch.testing.assert_close(ours[t + 1] - ours[t], theirs[t + 1] - theirs[t], rtol=1e-3, atol=1e-7)
        first = (ours[1] - ours[0]) / (theirs[1] - theirs[0])
        friction = torch.where(torch.tensor(g) == 0.0, torch.nan, torch.sigmoid(torch.tensor(g).abs()))
        torch.testing.assert_close(first, 2 * friction, rtol=1e-3, atol=0.0, equal_nan=True)


@each_backend
def test_lion_moves_every_weight_by_lr(backend):
    """By lr exactly where the gradient is not zero, and not at all where it never was."""
    for seen, g in zip(trajectory(gradkit.Lion, draw()[1:2], backend=backend), draw()[1], strict=True):
        step = seen[0] - seen[1]
        sign = torch.tensor(g).sign()
        assert torch.equal(step.sign(), sign) and 0.0 in sign
        torch.testing.assert_close(step.abs(), LR * sign.abs(), rtol=0.0, atol=2e-7)


@each_backend
def test_lion_freezes_a_weight_whose_gradient_was_nan(backend):
    (_, seen, _) = trajectory(gradkit.Lion, SCENARIOS["nan"]().gradients, backend=backend)
    values = torch.stack([x.flatten()[4] for x in seen])
    assert values.isfinite().all() and (values[3:] == values[3]).all() and values[3] != values[0]


@each_backend
def test_lion_ignores_the_gradients_scale(backend):
    scaled = [[g * 1024.0 for g in row] for row in draw()]
    assert_same_run(trajectory(gradkit.Lion, scaled, backend=backend), trajectory(gradkit.Lion, backend=backend))


@each_backend
def test_adamw_with_a_tiny_eps_ignores_the_gradients_scale(backend):
    scaled = [[g * 1024.0 for g in row] for row in draw()]
    options = {"eps": 1e-30, "backend": backend}
    assert_same_run(trajectory(gradkit.AdamW, scaled, **options), trajectory(gradkit.AdamW, **options), CLOSE)


@each_backend
def test_amsgrad_under_growing_gradients_is_adamw(backend):
    growing = [[g * 4.0**t for g in draw()[1]] for t in range(6)]
    options = {"betas": (0.9, 0.5), "backend": backend}
    plain = trajectory(gradkit.AdamW, growing, **options)
    assert_same_run(trajectory(gradkit.AdamW, growing, amsgrad=True, **options), plain)
    falling = growing[::-1]
    other = trajectory(gradkit.AdamW, falling, amsgrad=True, **options), trajectory(gradkit.AdamW, falling, **options)
    assert not torch.equal(other[0][0][-1], other[1][0][-1])


CLIPS = {
    "clip_by_global_norm": lambda limit: tx.clip_by_global_norm(limit),
    "clip_by_global_norm_1": lambda limit: tx.clip_by_global_norm(limit, norm_type=1),
    "clip_by_global_norm_inf": lambda limit: tx.clip_by_global_norm(limit, norm_type=float("inf")),
    "clip_by_norm": tx.clip_by_norm,
    "clip_by_value": tx.clip_by_value,
}


@each_backend
@pytest.mark.parametrize("clip", CLIPS)
def test_a_clip_that_is_never_reached_is_no_clip(clip, backend):
    plain = trajectory(gradkit.AdEMAMix, backend=backend)
    for limit in (1e10, float("inf")):
        assert_same_run(trajectory(gradkit.AdEMAMix, backend=backend, transforms=[CLIPS[clip](limit)]), plain)
    tight = trajectory(gradkit.AdEMAMix, backend=backend, transforms=[CLIPS[clip](1e-3)])
    assert not torch.equal(tight[0][-1], plain[0][-1])


@each_backend
def test_a_clipped_gradient_has_the_norm_that_was_asked_for(backend):
    options = {"backend": backend, "lr": 1.0, "max_norm": 0.25}
    grads = draw()[1:2]
    steps = [x[0] - x[1] for x in trajectory(BY_NAME["clip_by_norm"].build, grads, **options)]
    assert [float(x.norm()) for x in steps] == pytest.approx([0.25] * 3, rel=1e-5)
    for norm_type in (1, 2, float("inf")):
        name = f"clip_by_global_norm_{norm_type}"
        steps = [x[0] - x[1] for x in trajectory(BY_NAME[name].build, grads, norm_type=norm_type, **options)]
        whole = torch.cat([x.flatten() for x in steps])
        assert float(whole.norm(norm_type)) == pytest.approx(0.25, rel=1e-5)


@each_backend
def test_cautious_keeps_an_update_that_agrees_everywhere(backend):
    """A constant gradient without zeros: Adam's update has its sign; a turned one is dropped whole."""
    constant = [[np.abs(g) + 0.5 for g in draw()[0]]] * 4
    plain = trajectory(gradkit.AdamW, constant, backend=backend)
    assert_same_run(trajectory(gradkit.AdamW, constant, backend=backend, transforms=[tx.cautious()]), plain)
    turned = constant + [[-0.01 * g for g in constant[0]]]
    (seen, *_) = trajectory(gradkit.AdamW, turned, backend=backend, transforms=[tx.cautious()], weight_decay=0.0)
    assert torch.equal(seen[-1], seen[-2])


@each_backend
def test_an_empty_chain_is_sgd(backend):
    params = [torch.tensor(x, requires_grad=True) for x in start()]
    theirs = replay(torch.optim.SGD(params, lr=LR, foreach=False), params, draw())
    ours = trajectory(BY_NAME["sgd"].build, backend=backend)
    assert_same_run(ours, theirs, CLOSE)


@each_backend
def test_independent_decay_follows_the_schedule_and_not_the_size_of_lr(backend):
    """With zero gradients, only decay moves: by the same share at any lr, half of it at half the first lr."""
    still = [[np.zeros_like(g) for g in row] for row in draw()[:2]]
    for lr in (1e-1, 1e-4):
        options = {"lr": lr, "weight_decay": 0.5, "decay": "independent", "backend": backend}
        for seen in trajectory(gradkit.AdamW, still, lrs=[lr, lr / 2], **options):
            torch.testing.assert_close(seen[1], 0.5 * seen[0])
            torch.testing.assert_close(seen[2], 0.75 * seen[1])


@each_backend
def test_cautious_decay_shrinks_only_what_the_update_shrinks_too(backend):
    """Lion's update is the gradient's sign at the first step: decay where it has the parameter's."""
    grads = draw()[1:2]
    options = {"weight_decay": 2.0, "backend": backend}
    plain = trajectory(gradkit.Lion, grads, decay="none", **options)
    decayed = trajectory(gradkit.Lion, grads, decay="decoupled", **options)
    ours = trajectory(gradkit.Lion, grads, decay="cautious", **options)
    for g, x, a, b in zip(grads[0], ours, plain, decayed, strict=True):
        agrees = torch.tensor(g).sign() * x[0].sign() > 0
        assert agrees.any() and not agrees.all()
        assert torch.equal(x[1], torch.where(agrees, b[1], a[1]))


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
        for history, p, g in zip(ours, params, row, strict=True):
            p.grad = torch.tensor(g)
        optimizer.step()
        scheduler.step()
        for history, p in zip(ours, params, strict=True):
            history.append(p.detach().clone())
    lrs = [LR * 0.5 ** (t // 2) for t in range(len(draw()))]
    assert_same_run(ours, trajectory(case.build, lrs=lrs, weight_decay=0.1, **case.arguments))


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize(("dtype", "rounding"), WRITE_BACKS)
def test_a_dummy_step_leaves_every_bit(dtype, rounding, name):
    """Zero gradients and lr 0, as distributed checkpoints do, fresh and after steps that moved."""
    for backend in BACKENDS:
        for decay in DECAYS:
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


@each_backend
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_stochastic_and_kahan_follow_float32_where_nearest_stalls(dtype, backend):
    """Steps of 1/32 of the last place: rounded to nearest they are lost, 160 times."""
    steps, n = 160, 4096
    lr = torch.finfo(dtype).eps / 32
    moved = {}
    for rounding in ("nearest", "stochastic", "kahan"):
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


def test_the_seed_chooses_the_random_bits():
    left = []
    for seed in (0, 0, 1):
        p = torch.linspace(0.1, 2.0, 999).to(BF16).requires_grad_()
        replay(gradkit.Lion([p], lr=1e-4, rounding="stochastic", seed=seed), [p], [[np.ones(999)]] * 3)
        left.append(p.detach())
    assert_equal(left[0], left[1])
    assert not torch.equal(left[0], left[2])
