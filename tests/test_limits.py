"""Identities that hold exactly, or that name what a term does: each optimizer and transform against a simpler one."""

import inspect
import sys

import numpy as np
import pytest
import torch

import gradkit
from gradkit import transforms as tx
from tests.cases import BACKENDS, BY_NAME, CASES, frugal_of
from tests.runs import assert_same_run, replay, trajectory
from tests.scenarios import LR, SCENARIOS, draw, start
from tests.tolerance import tolerance

BF16 = torch.bfloat16


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


def test_the_slow_momentum_stays_float32():
    """In bfloat16 it would lose increments of 1e-4."""
    p = torch.ones(4, requires_grad=True)
    optimizer = gradkit.AdEMAMix([p], state_dtype=BF16)
    replay(optimizer, [p], [[np.ones(4)]])
    dtypes = {name: optimizer.state[p][name].dtype for name in ("exp_avg", "exp_avg_slow", "exp_avg_sq")}
    assert dtypes == {"exp_avg": BF16, "exp_avg_slow": torch.float32, "exp_avg_sq": BF16}


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
def test_a_window_forgets_a_spike(backend):
    """A running sum would keep its rounding error for ever: 1e30 + 4 - 1e30 = 0."""
    p = torch.zeros(3, requires_grad=True)
    optimizer = gradkit.Optimizer([p], gradkit.chain(tx.grokfast_ma(window=4, lamb=2.0)), lr=0.0, backend=backend)
    for t in range(13):
        p.grad = torch.full_like(p, 1e30 if t == 2 else 1.0)
        filtered = optimizer.trace(p)[0][1]
        optimizer.step()
    assert torch.equal(filtered, torch.full_like(p, 3.0))


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
    "spike_clip": tx.spike_clip,
    "adaptive_clip": tx.adaptive_clip,
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
@pytest.mark.parametrize("name", ["clip_by_norm", "clip_by_global_norm_2", "clip_by_global_norm_inf"])
def test_a_clip_divides_by_the_norm_and_a_floor(name, backend):
    """torch's 1e-6, which shows where the norm is as small."""
    given = {k: v for k, v in BY_NAME[name].arguments.items() if k != "max_norm"}
    p = torch.zeros(4, requires_grad=True)
    optimizer = BY_NAME[name].build([p], lr=1.0, backend=backend, max_norm=1e-7, **given)
    ((_, after),) = replay(optimizer, [p], [[np.array([1e-6, 0.0, 0.0, 0.0])]])
    assert after[0].item() == pytest.approx(-5e-8, rel=1e-5)


@each_backend
def test_cautious_multiplies_by_at_most_a_thousand(backend):
    """One entry in 5000 agrees with its gradient: the others' share would make it 5000 times larger."""
    turned = np.full(5000, -0.01, np.float32)
    turned[7] = 1.0
    left = []
    for transforms in ([tx.cautious()], []):
        p = torch.zeros(5000, requires_grad=True)
        optimizer = gradkit.AdamW([p], weight_decay=0.0, backend=backend, transforms=transforms)
        left += replay(optimizer, [p], [[np.ones(5000, np.float32)], [turned]])
    ours, plain = (float(x[2][7] - x[1][7]) for x in left)
    assert ours == pytest.approx(1000 * plain, rel=1e-4)


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
def test_independent_decay_of_a_group_that_began_at_lr_0_is_none(backend):
    options = {"lr": 0.0, "lrs": [LR] * 8, "backend": backend}
    still = trajectory(gradkit.AdamW, weight_decay=0.5, decay="independent", **options)
    assert_same_run(still, trajectory(gradkit.AdamW, decay="none", **options))


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


@each_backend
def test_spam_without_cuts_and_resets_is_adam(backend):
    """eps stands beside another root: a tiny one makes them one."""
    plain = {"eps": 1e-30, "weight_decay": 0.1, "backend": backend}
    ours = trajectory(gradkit.SPAM, threshold=None, reset_every=None, **plain)
    for a, b in zip(ours, trajectory(gradkit.AdamW, **plain), strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=CLOSE, atol=CLOSE)


@each_backend
def test_spam_with_its_bias_correction_reset_starts_anew(backend):
    """From a reset on, it goes as an optimizer that was just made."""
    options = {"threshold": None, "warmup_after_reset": 0, "reset_bias_correction": True, "backend": backend}
    gradients = draw()
    params, fresh = ([torch.tensor(x, requires_grad=True) for x in start()] for _ in range(2))
    resetting = gradkit.SPAM(params, lr=LR, reset_every=4, **options)
    replay(resetting, params, gradients[:3])
    with torch.no_grad():
        for p, q in zip(fresh, params, strict=True):
            p.copy_(q)
    replay(resetting, params, gradients[3:6])
    replay(gradkit.SPAM(fresh, lr=LR, reset_every=None, **options), fresh, gradients[3:6])
    assert all(map(torch.equal, params, fresh))


def test_spam_may_decay_what_it_has_updated():
    ends = []
    for quirks in (False, True):
        p = torch.ones(1, dtype=torch.float64, requires_grad=True)
        replay(gradkit.SPAM([p], lr=0.1, eps=1e-30, weight_decay=1.0, official_quirks=quirks), [p], [[np.ones(1)]])
        ends.append(p.item())
    assert ends == pytest.approx([0.9 * 1.0 - 0.1, 0.9 * (1.0 - 0.1)], rel=1e-12)


@each_backend
def test_spam_frees_a_weight_whose_gradients_were_zero(backend):
    ends = []
    for freezes in (False, True):
        p = torch.zeros(2, requires_grad=True)
        optimizer = gradkit.SPAM([p], clip_free_steps=1, clip_zero_variance=freezes, backend=backend)
        replay(optimizer, [p], [[np.array([0.0, 1.0])], [np.array([1.0, 1.0])]])
        ends.append(bool(p[0] != 0))
    assert ends == [True, False]


@each_backend
def test_a_cut_spike_is_not_remembered(backend):
    """The mean square sees what was cut, so the second of two spikes is cut as the first; a NaN leaves no trace."""
    p = torch.zeros(2, requires_grad=True)
    optimizer = gradkit.Optimizer([p], tx.spike_clip(threshold=9.0, beta2=0.5), lr=1.0, backend=backend)
    steps = []
    for g in (1.0, 1.0, 1e20, 1.0, float("nan"), 1.0):
        before = p.detach().clone()
        replay(optimizer, [p], [[np.array([1.0, g])]])
        steps.append((before - p.detach()).tolist())
        with torch.no_grad():
            p.nan_to_num_(0.0)
    assert steps[2] == [1.0, pytest.approx(3.0, rel=1e-6)]  # sqrt(9 * 1)
    assert steps[5] == [1.0, 1.0] and optimizer.state[p]["spike_sq"].isfinite().all()


@each_backend
def test_adagn_ignores_the_gradients_scale(backend):
    """Of each tensor: only how its norm varies over time is left."""

    def run(scale: float) -> list[torch.Tensor]:
        grads = [[np.float32(scale) * g for g in row] for row in draw()]
        return [x[-1] for x in trajectory(BY_NAME["adagn"].build, grads, backend=backend, lr=0.1)]

    for a, b in zip(run(1.0), run(1024.0), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@each_backend
def test_adaclip_keeps_the_ratios_of_what_it_shrinks(backend):
    p = torch.zeros(4, requires_grad=True)
    optimizer = gradkit.Optimizer([p], tx.adaclip(gamma=0.5), lr=1.0, backend=backend)
    replay(optimizer, [p], [[np.ones(4)]] * 3)
    before = p.detach().clone()
    replay(optimizer, [p], [[np.array([100.0, 60.0, 1.0, -80.0])]])
    a, b, c, d = (before - p.detach()).tolist()
    assert (b / a, c, d / a) == (pytest.approx(0.6), pytest.approx(1.0), pytest.approx(-0.8)) and a < 60.0


@each_backend
def test_stablespam_forgets_no_average_at_a_reset(backend):
    p = torch.zeros(3, requires_grad=True)
    optimizer = gradkit.StableSPAM([p], reset_every=2, backend=backend)
    replay(optimizer, [p], [[np.ones(3)]] * 2)
    state = optimizer.state[p]
    assert (float(state["step"]), float(state["stat_step"])) == (1.0, 2.0)
    assert float(state["absmax_avg"]) == pytest.approx(1 - 0.999**2) and state["absmax_avg"].dtype == torch.float64


@each_backend
@pytest.mark.parametrize("mode", ["zscore", "percentile"])
def test_zclip_leaves_steady_gradients_alone(mode, backend):
    """And one that isn't finite out of its statistics."""
    p = torch.zeros(2, requires_grad=True)
    clip = tx.zclip(warmup_steps=4, max_grad_norm=None, mode=mode)
    optimizer, moved, kept = gradkit.Optimizer([p], clip, lr=1.0, backend=backend), [], []
    nan, inf = float("nan"), float("inf")
    for size in (3.0, 4.0, 3.5, nan, 4.5, 4.0, 3.0, 1e6, inf, 4.0):
        with torch.no_grad():
            p.zero_()
        replay(optimizer, [p], [[np.array([size, 0.0])]])
        moved.append(-p[0].item())
        kept.append([float(optimizer.param_groups[0][f"zclip.{n}"]) for n in ("count", "mean", "var")])
    assert moved[:3] == [3.0, 4.0, 3.5] and moved[4:7] == [4.5, 4.0, 3.0] and moved[9] == 4.0
    assert 3.5 < moved[7] < (4.0 if mode == "zscore" else 5.5) and not np.isfinite([moved[3], moved[8]]).any()
    assert kept[3] == kept[2] and kept[8] == kept[7]
    assert kept[4] == [4.0, pytest.approx(3.75), pytest.approx(0.3125)]


@each_backend
def test_zclip_holds_back_a_norm_that_overflows(backend):
    """3e19 is finite in float32, its square is not."""
    p = torch.zeros(4, requires_grad=True)
    optimizer = gradkit.Optimizer([p], tx.zclip(warmup_steps=2), lr=1.0, backend=backend)
    for size in (1.0, 1.1, 0.9, 3e19):
        before = p.detach().clone()
        replay(optimizer, [p], [[np.full(4, size)]])
    assert float((p.detach() - before).abs().max()) <= 1.0


def scales(start, roles, gradients, backend, **given):
    """SCALE's parameters after steps with such gradients, and the optimizer."""
    params = [torch.tensor(x, requires_grad=True) for x in start]
    groups = [{"params": [p], "role": role} for p, role in zip(params, roles, strict=True)]
    optimizer = gradkit.SCALE(groups, lr=0.1, backend=backend, **given)
    replay(optimizer, params, gradients, backend=backend)
    return params, optimizer


@each_backend
@pytest.mark.parametrize("norm", ["rms", "l2"])
def test_scale_without_the_heads_momentum_is_sgd_behind_column_normalize(backend, norm):
    rng = np.random.default_rng(0)
    shapes, roles = ((5, 4), (3, 5), (2, 3, 2, 2)), ("matrix", "last", "matrix")
    given, *gradients = [[rng.standard_normal(s).astype(np.float32) for s in shapes] for _ in range(4)]
    decayed = {"weight_decay": 0.1, "backend": backend}
    ours, optimizer = scales(given, roles, gradients, momentum=0.0, norm=norm, **decayed)
    theirs = [torch.tensor(x, requires_grad=True) for x in given]
    sgd = gradkit.Optimizer(theirs, tx.column_normalize(norm), lr=0.1, **decayed)
    replay(sgd, theirs, gradients, backend=backend)
    for p, q, before in zip(ours, theirs, given, strict=True):
        assert torch.equal(p, q) and not torch.equal(p, torch.from_numpy(before))
    momentum, held = scales(given, roles, gradients, norm=norm, **decayed)
    assert torch.equal(momentum[0], ours[0]) and not torch.allclose(momentum[1], ours[1], rtol=1e-2)
    assert [{*held.state[p]} for p in momentum] == [set(), {"exp_avg"}, set()]
    assert [{*optimizer.state[p]} for p in ours] == [set(), set(), set()]


@each_backend
@pytest.mark.parametrize("norm", ["rms", "l2"])
def test_scale_gives_each_output_one_size(backend, norm):
    """1 in the root mean square, or in length, over the inputs: of rows, or of columns where they lie along axis 0."""
    gradient = np.arange(24.0, dtype=np.float32).reshape(4, 6) - 7.0
    for role, inputs in (({"role": "matrix"}, 1), ({"role": "embedding"}, 0), ({"role": "matrix", "fan_in": 0}, 0)):
        p = torch.zeros(4, 6, requires_grad=True)
        optimizer = gradkit.SCALE([{"params": [p], **role}], lr=1.0, norm=norm, backend=backend)
        replay(optimizer, [p], [[gradient]], backend=backend)
        square = p.detach().square()
        square = square.mean(inputs) if norm == "rms" else square.sum(inputs)
        torch.testing.assert_close(square, torch.ones(6 if inputs == 0 else 4), rtol=CLOSE, atol=0.0)


@each_backend
def test_scale_damps_an_output_whose_gradient_vanishes(backend):
    """By as much as its root mean square lies below 1e-8: a clamp, which leaves the others alone."""
    p = torch.zeros(3, 4, requires_grad=True)
    optimizer = gradkit.SCALE([{"params": [p], "role": "matrix"}], lr=1.0, backend=backend)
    replay(optimizer, [p], [[np.float32([[2e-8] * 4, [0.5e-8] * 4, [0.0] * 4])]], backend=backend)
    wanted = -torch.tensor([1.0, 0.5, 0.0])[:, None].expand(3, 4)
    torch.testing.assert_close(p.detach(), wanted, rtol=CLOSE, atol=0.0)


@each_backend
def test_scale_takes_vectors_as_adamw_with_vector_lr(backend):
    """At the first step its eps counts sqrt(1 - b2) as much, since it stands beside the uncorrected root."""
    p, v, w = (torch.ones(s, requires_grad=True) for s in ((2, 2), 3, 3))
    both = [{"params": [p], "role": "matrix"}, {"params": [v], "role": "vector", "weight_decay": 0.1}]
    ours = gradkit.SCALE(both, lr=0.5, vector_lr=0.01, vector_eps=1e-3, backend=backend)
    theirs = gradkit.AdamW([w], lr=0.01, eps=1e-3 / (1 - 0.999) ** 0.5, weight_decay=0.1, backend=backend)
    gradient = np.float32([0.1, -2.0, 1e-3])
    replay(ours, [p, v], [[np.ones((2, 2), np.float32), gradient]], backend=backend)
    replay(theirs, [w], [[gradient]], backend=backend)
    torch.testing.assert_close(v, w, rtol=CLOSE, atol=0.0)
    moved = [float((x.detach() - 1.0).abs().max()) for x in (v, p)]
    assert moved[0] < 0.02 < moved[1]


@each_backend
def test_the_norm_of_an_update_grows_slowly(backend):
    p = torch.zeros(4, requires_grad=True)
    chained = gradkit.chain(tx.norm_growth_limit(gamma=1.5))
    optimizer, norms = gradkit.Optimizer([p], chained, lr=1.0, backend=backend), []
    for size in (1.0, 100.0, 100.0, 0.5, 0.0, 7.0):
        before = p.detach().clone()
        replay(optimizer, [p], [[np.full(4, size / 2)]])
        norms.append(float((p.detach() - before).norm()))
    assert norms == pytest.approx([1.0, 1.5, 2.25, 0.5, 0.0, 7.0], rel=1e-6)


@each_backend
def test_sophia_without_curvature_is_sign_descent(backend):
    """Lion whose direction and momentum have one beta."""
    options = {"backend": backend, "weight_decay": 0.1}
    ours = trajectory(gradkit.Sophia, betas=(0.9, 0.99), **options)
    assert_same_run(ours, trajectory(gradkit.Lion, betas=(0.9, 0.9), **options))


@each_backend
def test_sophia_below_its_limit_is_a_newton_step(backend):
    """At lr = gamma it ends a parabola in one step, whatever its curvatures; where they are negative it walks."""
    curvature = torch.tensor([1e-3, 1.0, 1e4, -2.0])
    p = torch.tensor([0.5, -2.0, 3.0, 1.0], requires_grad=True)
    optimizer = gradkit.Sophia(
        [p], lr=0.01, betas=(0.0, 0.0), gamma=0.01, clip=400.0, weight_decay=0.0, backend=backend
    )
    optimizer.update_hessian(estimates=[curvature])
    replay(optimizer, [p], [[(curvature * p.detach()).numpy()]])
    torch.testing.assert_close(p.detach(), torch.tensor([0.0, 0.0, 0.0, 5.0]), rtol=1e-6, atol=1e-6)


each_split = pytest.mark.parametrize("split", ["blocks", "columns", "rows", "randk"])


@each_split
@pytest.mark.parametrize("base", ["adamw", "lion", "sgdm"])
def test_frugal_of_everything_is_its_base(base, split):
    """With state that stays; bitwise, across several selections."""
    whole = {"base": base, "split": split, "density": 1.0, "reset_state": False, "update_gap": 3}
    if base == "sgdm":
        theirs = trajectory(lambda ps, lr, backend: torch.optim.SGD(ps, lr=lr, momentum=0.9))
        assert_same_run(trajectory(frugal_of, **whole), theirs, CLOSE)  # torch adds lr times it in another order
        return
    options = {"betas": (0.8, 0.95), "weight_decay": 0.1}
    theirs = trajectory({"adamw": gradkit.AdamW, "lion": gradkit.Lion}[base], **options)
    assert_same_run(trajectory(frugal_of, **whole, **options), theirs)


@each_split
def test_frugal_of_nothing_is_the_state_free_rule(split):
    """Bitwise, for what is split; Lion whose momentum lasts no step is the sign of the gradient."""
    nothing = {"split": split, "density": 0.0, "update_gap": 3, "weight_decay": 0.1}
    signs = trajectory(gradkit.Lion, betas=(0.0, 0.0), weight_decay=0.1)
    assert_same_run(trajectory(frugal_of, **nothing)[1:], signs[1:])
    plain = trajectory(gradkit.Optimizer, chain=gradkit.chain(), weight_decay=0.1)
    assert_same_run(trajectory(frugal_of, **nothing, state_free="sgd")[1:], plain[1:])


def test_spam_of_everything_is_spam():
    spiky = {"threshold": 2.0, "reset_every": 3, "warmup_after_reset": 2, "clip_free_steps": 1, "weight_decay": 0.1}
    assert_same_run(trajectory(gradkit.SPAM, density=1.0, **spiky), trajectory(gradkit.SPAM, **spiky))
