"""Every optimizer and transform against its naive float64 reference, under gradients that break things."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

import gradkit
from tests.cases import BACKENDS, BY_NAME, CASES, DECAYS, Case
from tests.reference import sgd
from tests.runs import replay
from tests.scenarios import LR, SCENARIOS, Scenario, start
from tests.tolerance import assert_follows, tolerance

DTYPES = (torch.float32, torch.float64)
DECAYS_OF = {torch.float32: DECAYS, torch.float64: ("l2", "cautious")}  # the others are float32's code: test_backends
DECAY_AT = 0.3  # per unit of lr; "independent" is per step: less there
NUMPY = {torch.float32: np.float32, torch.float64: np.float64}


def run_both(case: Case, scenario: Scenario, dtype: torch.dtype, backend: str, decay: str, maximize: bool = False):
    """Parameter histories of gradkit and of the reference, in float64 unless the scenario is about float32."""
    weight_decay = DECAY_AT * LR if decay == "independent" else DECAY_AT
    params = [torch.tensor(x, dtype=dtype, requires_grad=True) for x in start()]
    options = {"decay": decay, "weight_decay": weight_decay, "maximize": maximize}
    optimizer = case.optimizer(params, lr=LR, backend=backend, **options)
    ours = replay(optimizer, params, scenario.gradients, scenario.lrs, backend)
    exact = NUMPY[dtype] if scenario.beyond_float32 else np.float64
    run = case.run(start(), exact, weight_decay=weight_decay, mode=decay, maximize=maximize)
    theirs = [start(), *(run.step(row, lr, LR) for row, lr in zip(scenario.gradients, scenario.lrs, strict=True))]
    return [[x.numpy() for x in one] for one in ours], [list(one) for one in zip(*theirs, strict=True)]


def without_hit(histories, gradients):
    """From the step after a non-finite gradient on, that element is nobody's: inf - inf depends on a mean's form."""
    hit = [np.zeros(x[0].shape, bool) for x in histories]
    out = [[x[0]] for x in histories]
    for t, row in enumerate(gradients):
        for i, g in enumerate(row):
            out[i].append(np.where(hit[i], 0.0, histories[i][t + 1]))
            if g is not None:
                hit[i] |= ~np.isfinite(g)
    return out


def assert_same_run(case, scenario, dtype, backend, decay, **options):
    ours, theirs = run_both(case, scenario, dtype, backend, decay, **options)
    if not case.coupled:
        ours, theirs = without_hit(ours, scenario.gradients), without_hit(theirs, scenario.gradients)
    moved = 0
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        try:
            assert_follows(a, b, tolerance("reference", dtype, backend))
        except AssertionError as e:
            raise AssertionError(f"{case.name}, decay {decay}, {dtype}, parameter {i}: {e}") from None
        moved += not np.array_equal(a[0], a[-1])
    assert moved, "nothing moved"


@pytest.mark.parametrize("backend", ["eager", "native"])  # chunked makes eager's calls: test_backends compares them
@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("name", BY_NAME)
def test_hostile_gradients_do_what_the_paper_says(name, scenario, backend):
    for dtype in DTYPES:
        for decay in DECAYS_OF[dtype]:
            assert_same_run(BY_NAME[name], SCENARIOS[scenario](), dtype, backend, decay)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", BY_NAME)
def test_maximize_climbs_what_the_reference_descends(name, backend):
    for decay in DECAYS:
        assert_same_run(BY_NAME[name], SCENARIOS["smooth"](), torch.float32, backend, decay, maximize=True)
    smooth = SCENARIOS["smooth"]()
    down, up = (run_both(BY_NAME[name], smooth, torch.float32, backend, "none", m)[0] for m in (False, True))
    assert np.sign(down[0][1] - down[0][0]).any()
    assert np.array_equal(np.sign(down[0][1] - down[0][0]), -np.sign(up[0][1] - up[0][0]))


@pytest.mark.parametrize("name", BY_NAME)
def test_the_reference_sees_every_mode_of_decay(name):
    """Else agreement with it proves nothing about that mode."""
    ends = {}
    for decay in DECAYS:
        run = BY_NAME[name].run(start(), weight_decay=DECAY_AT, mode=decay)
        for row in SCENARIOS["smooth"]().gradients:
            last = run.step(row, LR, 2 * LR)
        ends[decay] = np.concatenate([x.ravel() for x in last])
    chosen = BY_NAME[name].reference(**BY_NAME[name].arguments)["direction"]
    linear = getattr(chosen, "func", chosen) is sgd.direction
    for a, b in itertools.combinations(DECAYS, 2):
        same_law = linear and {a, b} == {"l2", "decoupled"}
        assert (np.abs(ends[a] - ends[b]).max() > 1e-3) != same_law, (a, b)


@pytest.mark.parametrize("case", [c for c in CASES if c.arguments], ids=lambda c: c.name)
def test_the_reference_sees_every_argument(case):
    """Changing any one of them changes the run, so a gradkit that ignored it would be found."""
    other = {
        **dict.fromkeys(("betas", "gammas", "vector_betas"), lambda x: tuple(b * 0.9 + 0.05 for b in x)),
        "base": lambda x: "adamw" if x != "adamw" else "lion",
        "split": lambda x: {"columns": "rows", "rows": "columns"}[x],
        "state_free": lambda x: "none",
        "norm": lambda x: {"rms": "l2", "l2": "rms"}[x],
        "roles": lambda x: {**x, 2: ("matrix", 1)},
        "amsgrad": lambda x: not x,
        "filter": lambda x: "ema",
        "mode": lambda x: {"zscore": "percentile", "percentile": "zscore"}.get(x, "mean"),
        "clip_option": lambda x: "adaptive_scaling",
        "max_grad_norm": lambda x: 2.0 if x is None else None,
        "init": lambda x: "first",
        "warmup": lambda x: not x,
        "norm_type": lambda x: {1: 2, 2: 1}.get(x, 2),
        **dict.fromkeys(
            (
                *("window", "reset_every", "warmup_after_reset", "clip_free_steps", "total_steps", "warmup_steps"),
                *("hessian_every", "update_gap"),
            ),
            lambda x: x + 1,
        ),
        **dict.fromkeys(
            ("correct_bias", "reset_bias_correction", "official_quirks", "skip_update_on_spike"), lambda x: not x
        ),
    }
    scenario = SCENARIOS["spike"]()

    def end(one: Case) -> np.ndarray:
        run = one.run(start())
        for row in scenario.gradients:
            last = run.step(row, LR, LR)
        return np.concatenate([x.ravel() for x in last])

    for key, value in case.arguments.items():
        changed = dataclasses.replace(case, arguments={**case.arguments, key: other.get(key, lambda x: x * 1.5)(value)})
        assert np.abs(end(changed) - end(case)).max() > 1e-4, key


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scenario", ["smooth", "spike", "huge", "zeros", "denormal", "missing", "late", "schedule"])
def test_adamw_is_torchs(scenario, dtype, backend):
    made = SCENARIOS[scenario]()
    for amsgrad in (False, True):
        for maximize in (False, True):
            for weight_decay in (0.0, 0.1):
                histories = []
                for module, chosen in ((gradkit, {"backend": backend}), (torch.optim, {"foreach": False})):
                    params = [torch.tensor(x, dtype=dtype, requires_grad=True) for x in start()]
                    options = {"amsgrad": amsgrad, "maximize": maximize, "weight_decay": weight_decay, **chosen}
                    optimizer = module.AdamW(params, lr=LR, betas=(0.8, 0.95), eps=1e-6, **options)
                    named = backend if module is gradkit else None
                    histories.append(replay(optimizer, params, made.gradients, made.lrs, named))
                for ours, theirs in zip(*histories, strict=True):
                    relative = tolerance("reference", dtype, backend)
                    assert_follows([x.numpy() for x in ours], [x.numpy() for x in theirs], relative)
