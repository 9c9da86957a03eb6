"""Loading what another optimizer saved, or the same one with other values: what is taken, what stays, is refused."""

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor

import gradkit
from tests.contract.rows import (
    LR,
    assert_moved,
    assert_same,
    everything,
    parameters,
    train,
    values,
)
from tests.tolerance import assert_equal, tolerance

GIVEN = {"lr": 0.03, "betas": (0.8, 0.95), "weight_decay": 0.2, "maximize": True}
TORCHS = (torch.optim.AdamW, torch.optim.Adam)


def torchs(cls: Any, params: list[Tensor], **given: Any) -> torch.optim.Optimizer:
    """After three scheduled steps."""
    optimizer = cls(params, **{**GIVEN, **given})
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for t in range(3):
        train(optimizer, params, [t])
        schedule.step()
    return optimizer


@pytest.mark.parametrize("cls", TORCHS, ids=lambda c: c.__name__)
def test_torchs_adam_brings_its_schedule_and_the_slots_of_our_names(make, cls, caplog):
    params = parameters()
    theirs = torchs(cls, params)
    ours = make(params, weight_decay=0.5)
    own = copy.deepcopy({k: v for k, v in ours.param_groups[0].items() if k != "params"})
    with caplog.at_level(logging.INFO, "gradkit"):
        ours.load_state_dict(theirs.state_dict())
    group = ours.param_groups[0]
    taken = {"lr": 0.03 / 8, "initial_lr": 0.03, "weight_decay": 0.2, "maximize": True}
    assert {k: group[k] for k in taken} == taken
    assert_same({k: v for k, v in group.items() if k != "params"}, {**own, **taken})
    shared = make.row.slots & {"exp_avg", "exp_avg_sq"}
    for p in params:
        taken = make.row.counters & {"step"}  # a filter that starts fresh has its own count
        assert ours.state[p].keys() == shared | taken
        for name in shared:
            assert_equal(ours.state[p][name], theirs.state[p][name])
        assert {float(ours.state[p][n]) for n in taken} <= {3.0}
    (line,) = [r.getMessage() for r in caplog.records if r.name == "gradkit"]
    assert line.startswith(make.row.cls.__name__) and "lr, weight_decay, maximize" in line
    said = line.split(" from a state dict of another optimizer; ")
    taken = shared | make.row.counters & {"step"}
    assert said[0].endswith(f": took {', '.join(sorted(taken)) or 'no state'} and lr, weight_decay, maximize")
    fresh, left = (
        (make.row.slots | make.row.counters | make.row.kept) - taken,
        {"exp_avg", "exp_avg_sq", "step"} - taken,
    )
    assert said[1] == (f"{', '.join(sorted(fresh))} starts fresh" if fresh else "nothing starts fresh") + (
        f"; {', '.join(sorted(left))} left out" if left else ""
    )
    before = values(params)
    train(ours, params, range(3, 5))
    assert_moved(before, values(params))
    assert ours.state[params[0]].keys() == make.row.slots | make.row.counters | make.row.kept


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_our_adamw_goes_on_where_torchs_stopped_and_back(backend, amsgrad):
    params = parameters()
    theirs = torchs(torch.optim.AdamW, params, amsgrad=amsgrad)
    copied = [p.detach().clone().requires_grad_() for p in params]
    ours = gradkit.AdamW(copied, betas=GIVEN["betas"], amsgrad=amsgrad, backend=backend)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    before = values(params)

    def assert_close(a: list[Tensor], b: list[Tensor]) -> None:
        limit = tolerance("reference", torch.float32)
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=limit, atol=limit * LR)

    for o, tensors in ((theirs, params), (ours, copied)):
        train(o, tensors, range(3, 8))
    assert_close(copied, params)
    assert_moved(before, values(params))

    back = [p.detach().clone().requires_grad_() for p in copied]
    again = torch.optim.AdamW(back)
    again.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert again.param_groups[0]["lr"] == 0.03 / 8 and again.param_groups[0]["amsgrad"] == amsgrad
    for o, tensors in ((theirs, params), (ours, copied), (again, back)):
        train(o, tensors, range(8, 12))
    assert_close(copied, params)
    assert_close(back, params)
    assert float(again.state[back[0]]["step"]) == 12


def test_an_optimizer_without_slots_of_our_names_brings_its_schedule_alone(make, caplog):
    """A count without the moments it belongs to would switch the bias corrections off: it isn't taken either."""
    params, fresh = parameters(), parameters()
    theirs = torch.optim.Adagrad(params, lr=0.3)
    train(theirs, params, range(3))
    before = values(params)
    ours, plain = make(params), make(fresh, lr=0.3, weight_decay=0.0)
    with caplog.at_level(logging.INFO, "gradkit"):
        ours.load_state_dict(theirs.state_dict())
    assert not ours.state and "took no state" in caplog.text
    for p, value in zip(fresh, before, strict=True):
        p.data.copy_(value)
    train(ours, params, range(3, 6))
    train(plain, fresh, range(3, 6))
    assert_same(values(params), values(fresh))


def test_the_files_values_win_and_missing_keys_keep_ours(make):
    params, other = parameters(), parameters()
    saved = make(params, lr=0.5, weight_decay=0.3, seed=4)
    train(saved, params, range(2))
    file = copy.deepcopy(saved.state_dict())
    for key in ("seed", "decay", "clock"):
        del file["param_groups"][0][key]
    file["param_groups"][0]["note"] = "kept"
    ours = make(other, seed=9, decay="cautious")
    ours.load_state_dict(file)
    group = ours.param_groups[0]
    wanted = {"lr": 0.5, "weight_decay": 0.3, "seed": 9, "decay": "cautious", "note": "kept"}
    assert {k: group[k] for k in wanted} == wanted
    assert float(group["clock"]) == 0
    assert_same(ours.state_dict()["state"], saved.state_dict()["state"])


def test_the_same_class_says_nothing(make, caplog):
    params = parameters()
    optimizer = make(params)
    train(optimizer, params, range(1))
    with caplog.at_level(logging.DEBUG, "gradkit"):
        make(parameters()).load_state_dict(optimizer.state_dict())
    assert not caplog.records


def test_the_argument_is_called_state_dict(make):
    params, other = parameters(), parameters()
    optimizer, again = make(params), make(other)
    train(optimizer, params, range(1))
    again.load_state_dict(state_dict=optimizer.state_dict())
    assert_same(again.state_dict(), optimizer.state_dict())


def other_shape(sd: dict[str, Any]) -> str:
    for name, x in sd["state"][1].items():
        if x.dim():
            sd["state"][1][name] = torch.zeros(8)
    return r"of parameter 1 has shape \(8,\), it needs \(.*7,?\)"


def other_counts(sd: dict[str, Any]) -> str:
    sd["param_groups"][0]["params"].append(3)
    return r"groups of \[4\] parameters, this optimizer \[3\]"


def other_groups(sd: dict[str, Any]) -> str:
    sd["param_groups"] = [{**sd["param_groups"][0], "params": [0]}, {**sd["param_groups"][0], "params": [1, 2]}]
    return r"groups of \[1, 2\] parameters, this optimizer \[3\]"


def other_window(sd: dict[str, Any]) -> str:
    """The value's own shape fits no parameter even as a ring."""
    for name, x in sd["state"][0].items():
        if x.dim():
            sd["state"][0][name] = x.unsqueeze(0).unsqueeze(0)
    return "of parameter 0 has shape"


@pytest.mark.parametrize("spoil", [other_shape, other_counts, other_groups, other_window], ids=lambda f: f.__name__)
def test_a_state_dict_of_another_shape_changes_nothing(make, spoil):
    params, other = parameters(), parameters()
    saved, ours = make(params, lr=0.5), make(other)
    train(saved, params, range(2))
    train(ours, other, range(1))
    before = everything(ours, other)
    bad = copy.deepcopy(saved.state_dict())
    message = spoil(bad)
    with pytest.raises(ValueError, match=rf"{make.row.cls.__name__}\.load_state_dict: .*{message}"):
        ours.load_state_dict(bad)
    assert_same(everything(ours, other), before)
    train(ours, other, range(1, 2))
    ours.load_state_dict(saved.state_dict())
    assert_same(ours.state_dict(), saved.state_dict())


@pytest.mark.parametrize("source", [gradkit.AdamW, gradkit.Lion, gradkit.AdEMAMix], ids=lambda c: c.__name__)
def test_our_classes_load_one_another(make, source, caplog):
    params = parameters()
    first = source(params, lr=0.02, backend=make.backend)
    train(first, params, range(2))
    second = make(params)
    with caplog.at_level(logging.INFO, "gradkit"):
        second.load_state_dict(first.state_dict())
    assert second.param_groups[0]["algorithm"] == make.row.cls.__name__ and second.param_groups[0]["lr"] == 0.02
    if not make.row.part:
        assert_equal(second.state[params[0]]["exp_avg"], first.state[params[0]]["exp_avg"])
    lacks = any("zclip." in name for name in second.param_groups[0].keys() - first.param_groups[0].keys())
    assert len(caplog.records) == (source is not make.row.cls or lacks)
    before = values(params)
    train(second, params, range(2, 4))
    assert_moved(before, values(params))


@pytest.mark.parametrize("kind", [torch.optim.AdamW, gradkit.AdamW], ids=["torchs", "ours"])
def test_a_tensor_lr_in_the_file_is_not_shared(make, kind):
    params, other = parameters(), parameters()
    first = kind(params, lr=torch.tensor(0.1))
    train(first, params, range(1))
    second = make(other)
    second.load_state_dict(first.state_dict())
    first.param_groups[0]["lr"].fill_(9.0)
    assert float(second.param_groups[0]["lr"]) == pytest.approx(0.1)
    train(second, other, range(1))
    assert float(second.param_groups[0]["lr"]) == pytest.approx(0.1)


def test_torchs_bf16_slots_become_float32_with_the_same_values(make):
    params, other = parameters(torch.bfloat16), parameters(torch.bfloat16)
    theirs = torchs(torch.optim.AdamW, params)
    assert theirs.state[params[0]]["exp_avg"].dtype == torch.bfloat16
    ours = make(other)
    ours.load_state_dict(theirs.state_dict())
    for p, q in zip(params, other, strict=True):
        if not make.row.part:
            assert_equal(ours.state[q]["exp_avg"], theirs.state[p]["exp_avg"].float())
    before = values(other)
    train(ours, other, range(3, 5))
    assert_moved(before, values(other))


def test_a_frozen_parameter_has_no_state_in_the_file_and_none_after(make):
    params, other = parameters(), parameters()
    params[1].requires_grad_(False)
    other[1].requires_grad_(False)
    saved, ours = make(params), make(other)
    for optimizer, tensors in ((saved, params), (ours, other)):
        tensors[0].grad = torch.ones_like(tensors[0])
        optimizer.step()
    ours.load_state_dict(saved.state_dict())
    assert set(ours.state) == {other[0], other[2]} and set(ours.state_dict()["state"]) == {0, 2}
    assert_same(ours.state_dict(), saved.state_dict())
