"""Sophia's estimates: how they come into h, what they leave alone, and when they are due."""

import io
import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import gradkit
from gradkit.estimators import gnb_labels, hutchinson
from tests.cases import BACKENDS
from tests.contract.rows import assert_same, everything
from tests.runs import ran_on
from tests.tolerance import assert_equal

SCALE = 2.0**10
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def made(**options: Any) -> tuple[list[Tensor], gradkit.Sophia]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(n, generator=generator).requires_grad_() for n in (5, 3)]
    return params, gradkit.Sophia(params, **{"betas": (0.9, 0.75), **options})


def give(params: list[Tensor], seed: int = 1, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = scale * torch.randn(p.shape, generator=generator)
    return [p.grad for p in params]


def curvature(optimizer: gradkit.Sophia, params: list[Tensor]) -> list[Tensor]:
    return [optimizer.state[p]["hessian"].clone() for p in params]


@each_backend
def test_squared_gradients_times_the_labels_come_into_h(backend):
    params, optimizer = made(backend=backend)
    expected = [torch.zeros_like(p) for p in params]
    before = [p.detach().clone() for p in params]
    for seed in range(3):
        grads = give(params, seed)
        copies = [g.clone() for g in grads]
        optimizer.update_hessian(batch_size=7)
        expected = [0.75 * h + 0.25 * 7 * g * g for h, g in zip(expected, grads, strict=True)]
        assert all(p.grad is g and torch.equal(g, c) for p, g, c in zip(params, grads, copies, strict=True))
    torch.testing.assert_close(curvature(optimizer, params), expected)
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert optimizer.param_groups[0]["clock"] == 0 and not any(optimizer.state[p]["exp_avg"].any() for p in params)
    assert ran_on(optimizer) == {backend}


@each_backend
def test_given_estimates_of_both_signs_come_into_h_in_the_groups_order(backend):
    params, _ = made()
    groups = [{"params": params[:1]}, {"params": params[1:], "betas": (0.9, 0.5)}]
    optimizer = gradkit.Sophia(groups, betas=(0.9, 0.75), backend=backend)
    estimates = [torch.tensor([1.0, -2.0, 0.0, 4.0, 8.0]), torch.tensor([-4.0, 2.0, 1.0])]
    optimizer.update_hessian(estimates=estimates)
    assert_equal(optimizer.state[params[0]]["hessian"], 0.25 * estimates[0])
    assert_equal(optimizer.state[params[1]]["hessian"], 0.5 * estimates[1])
    assert all(p.grad is None for p in params)


@each_backend
@pytest.mark.parametrize("bad", [torch.inf, torch.nan, 1e30], ids=["inf", "nan", "a square beyond float32"])
def test_an_estimate_that_is_not_finite_anywhere_is_left_out_everywhere(bad, backend):
    params, optimizer = made(backend=backend)
    give(params)
    optimizer.update_hessian(batch_size=2)
    before = curvature(optimizer, params)
    params[1].grad[1] = bad
    optimizer.update_hessian(batch_size=2)
    if bad != 1e30:
        optimizer.update_hessian(estimates=[p.grad for p in params])
    assert_same(curvature(optimizer, params), before)
    params[1].grad[1] = 0.0
    optimizer.update_hessian(batch_size=2)
    assert not torch.equal(optimizer.state[params[0]]["hessian"], before[0])


def test_a_parameter_without_an_estimate_keeps_its_curvature():
    params, optimizer = made()
    give(params)
    optimizer.update_hessian(batch_size=2)
    before = curvature(optimizer, params)
    params[0].grad = None
    optimizer.update_hessian(batch_size=2)
    optimizer.update_hessian(estimates=[None, torch.ones(3)])
    after = curvature(optimizer, params)
    assert torch.equal(after[0], before[0]) and not torch.equal(after[1], before[1])


def test_a_frozen_parameter_gets_no_state():
    """hutchinson() gives zeros for it."""
    params, _ = made()
    params[0].requires_grad_(False)
    optimizer = gradkit.Sophia(params)
    optimizer.update_hessian(estimates=hutchinson(params[1].square().sum(), params))
    assert params[0] not in optimizer.state and optimizer.state[params[1]]["hessian"].any()


@each_backend
def test_a_nan_in_the_momentum_is_not_hidden_by_the_limit(backend):
    """Nor by the maximum in the denominator; an infinity is limited."""
    p = torch.zeros(3, requires_grad=True)
    optimizer = gradkit.Sophia([p], lr=1.0, backend=backend)
    p.grad = torch.tensor([torch.nan, -torch.inf, 1e38])
    optimizer.step()
    assert p[0].isnan() and p[1:].tolist() == [1.0, -1.0]


def test_an_estimate_is_due_before_step_1_and_every_k_steps():
    params, optimizer = made(hessian_every=3)
    due = []
    for t in range(7):
        due.append(optimizer.hessian_due)
        give(params, t)
        optimizer.step()
    assert due == [True, False, False, True, False, False, True]


@pytest.mark.parametrize("how", ["batch_size", "estimates"])
def test_a_scaler_is_divided_out(how):
    (params, optimizer), (plain, other) = made(), made()
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    for scaled in (True, False):
        chosen, into = (params, optimizer) if scaled else (plain, other)
        grads = give(chosen, scale=SCALE if scaled else 1.0)
        given = {"batch_size": 4} if how == "batch_size" else {"estimates": [g.clone() for g in grads]}
        into.update_hessian(**given, scaler=scaler if scaled else None)
    assert_same(curvature(optimizer, params), curvature(other, plain))
    give(params)
    before = curvature(optimizer, params)
    optimizer.update_hessian(batch_size=4, scaler=torch.amp.GradScaler("cpu", enabled=False))
    other.update_hessian(batch_size=4)
    if how == "batch_size":
        assert_same(curvature(optimizer, params), curvature(other, plain))
    assert not torch.equal(before[0], optimizer.state[params[0]]["hessian"])


def test_gradients_that_were_unscaled_before_are_refused():
    """The step's own would then stay scaled, for a scaler unscales once between two updates."""
    params, optimizer = made()
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    scaler.scale(params[0].sum() + params[1].sum()).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match=r"Sophia.update_hessian: scaler.unscale_\(\) has been called"):
        optimizer.update_hessian(batch_size=2, scaler=scaler)
    assert not optimizer.state


class Task:
    """Softmax regression, trained as the documentation does."""

    def __init__(self, **options: Any):
        torch.manual_seed(0)
        self.model = torch.nn.Linear(4, 3)
        self.optimizer = gradkit.Sophia(self.model.parameters(), lr=0.01, hessian_every=3, **options)

    def train(self, steps: range, scaler: Any = None) -> None:
        plain = scaler or torch.amp.GradScaler("cpu", enabled=False)
        for t in steps:
            torch.manual_seed(t)
            x, y = torch.randn(8, 4), torch.randint(3, (8,))
            logits = self.model(x)
            if self.optimizer.hessian_due:
                plain.scale(F.cross_entropy(logits, gnb_labels(logits))).backward(retain_graph=True)
                self.optimizer.update_hessian(batch_size=8, scaler=scaler)
                self.optimizer.zero_grad()
            plain.scale(F.cross_entropy(logits, y)).backward()
            plain.step(self.optimizer)
            plain.update()
            self.optimizer.zero_grad()

    def everything(self) -> dict[str, Any]:
        return everything(self.optimizer, list(self.model.parameters()))


def test_a_scaled_loop_is_the_unscaled_one():
    scaled, plain = Task(), Task()
    scaled.train(range(7), torch.amp.GradScaler("cpu", init_scale=SCALE))
    plain.train(range(7))
    assert_same(scaled.everything(), plain.everything())
    assert plain.optimizer.state[plain.model.weight]["hessian"].any()


@pytest.mark.parametrize(("backend", "correct_bias"), [("eager", False), ("chunked", False), ("native", True)])
def test_a_run_stopped_between_two_estimates_goes_on_bitwise(correct_bias, backend):
    straight, stopped, resumed = (Task(backend=backend, correct_bias=correct_bias) for _ in range(3))
    straight.train(range(10))
    stopped.train(range(5))
    file = io.BytesIO()
    torch.save({"model": stopped.model.state_dict(), "optimizer": stopped.optimizer.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    resumed.model.load_state_dict(state["model"])
    resumed.optimizer.load_state_dict(state["optimizer"])
    assert not resumed.optimizer.hessian_due
    resumed.train(range(5, 10))
    assert_same(resumed.everything(), straight.everything())


def steps_that_warn(optimizer: gradkit.Sophia, params: list[Tensor], steps: int, caplog: Any) -> list[int]:
    found = []
    for t in range(steps):
        caplog.clear()
        give(params, t)
        optimizer.step()
        for p in params:
            p.grad = None
        optimizer.step()  # which does nothing
        found += [t + 1] * len([r for r in caplog.records if "no update_hessian() in the last 6 steps" in r.message])
    return found


def test_it_says_once_that_estimates_are_missing(caplog):
    caplog.set_level(logging.WARNING, "gradkit")
    params, optimizer = made(hessian_every=3)
    assert steps_that_warn(optimizer, params, 20, caplog) == [6]
    give(params)
    optimizer.update_hessian(batch_size=2)
    assert steps_that_warn(optimizer, params, 4, caplog) == []
    for p in params:
        p.grad = None
    with pytest.raises(ValueError, match="no parameter has a gradient"):  # so it is no update
        optimizer.update_hessian(batch_size=2)
    others, resumed = made(hessian_every=3)
    resumed.load_state_dict(optimizer.state_dict())
    assert steps_that_warn(resumed, others, 20, caplog) == [2]


@pytest.mark.parametrize("bad", [1.0, torch.nan])
def test_it_says_once_that_no_estimate_was_finite(bad, caplog):
    """A call is no estimate: only one that has entered h ends the sign descent."""
    caplog.set_level(logging.WARNING, "gradkit")
    params, optimizer = made(hessian_every=3)
    said = []
    for t in range(20):
        give(params, t)
        if optimizer.hessian_due:
            optimizer.update_hessian(estimates=[bad * torch.ones_like(p) for p in params])
        optimizer.step()
        said += [(t + 1, record.getMessage()) for record in caplog.records]
        caplog.clear()
    if bad == 1.0:
        assert not said
    else:
        ((step, message),) = said
        assert step == 6 and message.startswith(
            "Sophia: no estimate has entered h in the first 6 steps: each had an inf"
        )


def test_the_win_rate_is_the_share_of_what_is_not_limited():
    p, q = torch.zeros(4, requires_grad=True), torch.zeros(1, requires_grad=True)
    groups = [{"params": [p]}, {"params": [q], "clip": 4.0}]
    optimizer = gradkit.Sophia(groups, betas=(0.5, 0.5), gamma=0.5)
    assert optimizer.win_rate() == 0.0
    optimizer.load_state_dict(torch.optim.Adam(groups).state_dict())
    assert optimizer.win_rate() == 0.0
    p.grad, q.grad = torch.tensor([4.0, -4.0, 4.0, 0.0]), torch.tensor([4.0])
    optimizer.step()  # m is 2, -2, 2, 0 and 2
    assert optimizer.win_rate() == 0.0  # a weight that never had a gradient is none
    optimizer.update_hessian(estimates=[torch.tensor([8.5, 8.5, 7.5, 0.0]), torch.tensor([7.5])])
    assert optimizer.win_rate() == 3 / 5  # h is half of that: 2 < 0.5 * 4.25, 2 > 0.5 * 3.75, 2 < 4 * 0.5 * 3.75
    optimizer.param_groups[0]["correct_bias"] = True
    assert optimizer.win_rate() == 1 / 5  # m is twice as large


def test_the_curvature_is_kept_in_the_state_dtype():
    params, optimizer = made(state_dtype=torch.bfloat16)
    give(params)
    optimizer.update_hessian(batch_size=2)
    optimizer.step()
    assert {optimizer.state[p]["hessian"].dtype for p in params} == {torch.bfloat16}


def test_new_estimates_need_no_new_plan():
    params, optimizer = made(hessian_every=2)
    plans = []
    for t in range(5):
        give(params, t)
        if optimizer.hessian_due:
            optimizer.update_hessian(batch_size=2)
        optimizer.step()
        plans.append(dict(optimizer._plans))
    assert plans[-1] == plans[2] and len(plans[2]) == 2  # the first step makes the counters, which all plans look at
    assert len({id(seen["step"]) for seen in plans}) == 1


ERRORS = [
    ({}, ValueError, "give either batch_size=, the number of drawn labels, or estimates="),
    ({"batch_size": 2, "estimates": []}, ValueError, "give either batch_size="),
    ({"batch_size": 0}, ValueError, "batch_size=0: give a whole number >= 1"),
    ({"batch_size": 2.5}, ValueError, "batch_size=2.5: give a whole number >= 1"),
    (
        {"batch_size": 2, "scaler": 1024.0},
        TypeError,
        "scaler=1024.0: give the torch.amp.GradScaler of the loss, or None",
    ),
    ({"estimates": [torch.ones(5)]}, ValueError, "1 estimates for 2 parameters; give a list, in the order of the gr"),
    ({"estimates": torch.ones(2)}, ValueError, "for 2 parameters; give a list"),
    ({"estimates": [torch.ones(5), torch.ones(4)]}, ValueError, r"estimate 1 is (4,), its parameter (3,); give one"),
    ({"estimates": [torch.ones(5), 1.0]}, ValueError, r"estimate 1 is 1.0, its parameter (3,)"),
    ({"estimates": dict.fromkeys("ab", torch.ones(99))}, ValueError, "a dict for 2 parameters; give a list"),
    (
        {"estimates": [torch.ones(5, dtype=torch.int64), None]},
        ValueError,
        "estimate 0 is torch.int64, torch.strided on cpu; give a dense one on cpu of one of torch.float32",
    ),
    (
        {"estimates": [torch.ones(5, device="meta"), None]},
        ValueError,
        "strided on meta; give a dense one on cpu of one",
    ),
    (
        {"estimates": [None, torch.ones(3).to_sparse()]},
        ValueError,
        "estimate 1 is torch.float32, torch.sparse_coo on cpu",
    ),
    ({"estimates": [None, None]}, ValueError, "there is no estimate for a parameter that is trained"),
]


def test_estimates_are_due_by_a_number_of_steps():
    _, optimizer = made()
    optimizer.param_groups[0]["hessian_every"] = 0
    with pytest.raises(ValueError, match="Sophia: hessian_every=0: give a whole number >= 1"):
        _ = optimizer.hessian_due


def test_an_update_without_any_gradient_is_refused():
    _, optimizer = made()
    with pytest.raises(
        ValueError, match=r"^Sophia.update_hessian: no parameter has a gradient; call it after backward"
    ):
        optimizer.update_hessian(batch_size=2)
    assert not optimizer.state


@pytest.mark.parametrize(("given", "error", "says"), ERRORS, ids=lambda x: str(x)[:40])
def test_an_estimate_that_cannot_be_one_is_refused(given, error, says):
    params, optimizer = made()
    give(params)
    with pytest.raises(error) as caught:
        optimizer.update_hessian(**given)
    assert str(caught.value).startswith("Sophia.update_hessian: ") and says in str(caught.value)
    assert not optimizer.state
