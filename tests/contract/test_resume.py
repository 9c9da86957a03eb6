"""Saving, loading and copying: going on is bitwise the same as not stopping, in the middle of any phase."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.contract.rows import LR, ROWS, Subject, assert_moved, assert_same, everything, parameters, train, values
from tests.tolerance import assert_equal

STEPS = 8
LATE = 3  # the step at which the last parameter gets its first gradient
# 1: first moments; 2: inside the ring's first window and both warm-ups; 4: alpha's warm-up is over, the ring's head has
# begun again, and the late parameter is at its own first step; 5: beta3's warm-up is not over yet
SAVED_AT = (1, 2, 4, 5)
LOW = (torch.bfloat16, torch.float16)
STORAGES = ((torch.float64, "nearest"), *((d, how) for d in LOW for how in ("nearest", "stochastic", "kahan")))


def save(path: Any, optimizer: torch.optim.Optimizer, params: list[Tensor]) -> None:
    torch.save({"optimizer": optimizer.state_dict(), "model": values(params)}, path)


def load(path: Any, make: Any, **given: Any) -> tuple[torch.optim.Optimizer, list[Tensor]]:
    """A fresh optimizer over fresh parameters, filled from the file."""
    file = torch.load(path, weights_only=True)
    params = [p.requires_grad_() for p in file["model"]]
    optimizer = make(params, **given)
    optimizer.load_state_dict(file["optimizer"])
    return optimizer, params


@pytest.mark.parametrize("saved_at", SAVED_AT)
def test_going_on_from_a_file_is_not_stopping(make, saved_at, tmp_path):
    params = parameters()
    optimizer = make(params)
    train(optimizer, params, range(saved_at), late=LATE)
    path = tmp_path / "file"
    save(path, optimizer, params)
    at_save = everything(optimizer, params)
    train(optimizer, params, range(saved_at, STEPS), late=LATE)
    resumed, again = load(path, make)
    assert_same(everything(resumed, again), at_save)
    train(resumed, again, range(saved_at, STEPS), late=LATE)
    assert_same(everything(resumed, again), everything(optimizer, params))
    assert_moved(at_save["parameters"], values(params))


@pytest.mark.parametrize(("dtype", "rounding"), STORAGES, ids=str)
def test_every_dtype_and_write_back_resumes_bitwise(make, dtype, rounding):
    """torch's own load casts slots to the parameter's dtype: a bf16 parameter's float32 slots must come back whole."""
    params = parameters(dtype)
    given = {"rounding": rounding, "seed": 5}
    optimizer = make(params, **given)
    train(optimizer, params, range(3), late=2)
    file = io.BytesIO()
    save(file, optimizer, params)
    file.seek(0)
    resumed, again = load(file, make, **given)
    assert_same(everything(resumed, again), everything(optimizer, params))
    slot = resumed.state[again[0]][make.row.momentum]
    assert slot.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert f"write-back {rounding}" in resumed.explain()
    assert (rounding == "kahan") == any(
        bool(s["compensation"].any()) for s in resumed.state.values() if "compensation" in s
    )
    assert dtype == torch.float64 or not torch.equal(slot.to(dtype).float(), slot)
    for o, tensors in ((optimizer, params), (resumed, again)):
        train(o, tensors, range(3, STEPS))
    assert_same(everything(resumed, again), everything(optimizer, params))


@pytest.mark.parametrize("scheduler", ["OneCycleLR", "LambdaLR"])
def test_a_schedule_goes_on_too(make, scheduler):
    kinds = {
        "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=STEPS + 1),
        "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    }

    def run(optimizer: Any, plan: Any, params: list[Tensor], steps: range) -> None:
        for t in steps:
            train(optimizer, params, [t])
            plan.step()

    params = parameters()
    optimizer = make(params, decay="independent", weight_decay=0.1)
    plan = kinds[scheduler](optimizer)
    run(optimizer, plan, params, range(4))
    file, counted = copy.deepcopy(optimizer.state_dict()), plan.state_dict()
    again = [p.requires_grad_() for p in values(params)]
    resumed = make(again, decay="independent", weight_decay=0.1)
    second = kinds[scheduler](resumed)
    resumed.load_state_dict(file)
    second.load_state_dict({k: v for k, v in counted.items() if k != "lr_lambdas"} | {"lr_lambdas": [None]})
    assert resumed.param_groups[0]["lr_ref"] == optimizer.param_groups[0]["lr_ref"]
    run(optimizer, plan, params, range(4, STEPS))
    run(resumed, second, again, range(4, STEPS))
    assert_same(everything(resumed, again), everything(optimizer, params))


def test_loading_into_an_optimizer_that_has_stepped_goes_back(make):
    params = parameters()
    optimizer = make(params)
    train(optimizer, params, range(3))
    file = copy.deepcopy(optimizer.state_dict())
    at_save = everything(optimizer, params)
    ends = []
    for _ in range(2):
        train(optimizer, params, range(3, 6))
        ends.append(everything(optimizer, params))
        optimizer.load_state_dict(file)
        with torch.no_grad():
            for p, saved in zip(params, at_save["parameters"], strict=True):
                p.copy_(saved)
        assert_same(everything(optimizer, params), at_save)
    assert_same(*ends)


def test_what_is_loaded_shares_no_memory_with_its_source(make):
    params, other = parameters(), parameters()
    optimizer, copied = make(params), make(other)
    train(optimizer, params, range(2))
    source = optimizer.state_dict()
    copied.load_state_dict(source)
    before = everything(copied, other)
    train(optimizer, params, range(2, 4))
    for state in source["state"].values():
        for x in state.values():
            x.fill_(3.0)
    source["param_groups"][0]["clock"].fill_(9.0)
    source["param_groups"][0]["lr"] = 9.0
    assert_same(everything(copied, other), before)
    assert any(x.any() for s in before["state"].values() for x in s.values())


@pytest.mark.parametrize("saved_at", [0, 2, 4])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_steps_as_the_original(make, how, saved_at):
    params = parameters()
    optimizer = make(params)
    train(optimizer, params, range(saved_at), late=LATE)
    before = everything(optimizer, params)
    copies: Any = copy.deepcopy((optimizer, params))
    if how == "pickle":
        copies = pickle.loads(pickle.dumps((optimizer, params)))
    twin, tensors = copies
    assert type(twin) is type(optimizer) and twin.param_groups[0]["params"][0] is tensors[0]
    assert twin.backend == make.backend and len(twin.transforms) == len(optimizer.transforms)
    train(twin, tensors, range(saved_at, STEPS), late=LATE)
    assert_same(everything(optimizer, params), before)
    train(optimizer, params, range(saved_at, STEPS), late=LATE)
    assert_same(everything(twin, tensors), everything(optimizer, params))
    assert_moved(before["parameters"], values(params))
    assert twin.explain() == optimizer.explain()


def test_a_state_dict_pickles_without_the_optimizer(make):
    params = parameters()
    optimizer = make(params)
    train(optimizer, params, range(2))
    assert_same(pickle.loads(pickle.dumps(optimizer.state_dict())), optimizer.state_dict())
    assert_same(copy.deepcopy(optimizer.state_dict()), optimizer.state_dict())


def test_hooks_of_saving_and_loading_run(make):
    params, other = parameters(), parameters()
    optimizer, target = make(params), make(other)
    train(optimizer, params, range(2))
    ran: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda o: ran.append("before saving"))
    optimizer.register_state_dict_post_hook(lambda o, d: ran.append("after saving"))

    def smaller_lr(o: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        ran.append("before loading")
        return {**state_dict, "param_groups": [{**g, "lr": LR / 4} for g in state_dict["param_groups"]]}

    def after(o: Any) -> None:  # sees everything merged
        ran.append("after loading")
        assert o.param_groups[0]["lr"] == LR / 4 and o.state[other[0]][make.row.momentum].any()

    target.register_load_state_dict_pre_hook(smaller_lr)
    target.register_load_state_dict_post_hook(after)
    for _ in range(2):
        target.load_state_dict(optimizer.state_dict())
    assert ran == ["before saving", "after saving", "before loading", "after loading"] * 2
    assert target.param_groups[0]["lr"] == LR / 4
    name = make.row.momentum
    assert_equal(target.state[other[0]][name], optimizer.state[params[0]][name])


def cleared(optimizer: Any, params: list[Tensor]) -> None:
    optimizer.state.clear()


def cleared_alone(optimizer: Any, params: list[Tensor]) -> None:
    del optimizer.state[params[1]]


def momentum(optimizer: Any, params: list[Tensor]) -> str:
    return next(n for n in optimizer.state[params[0]] if n.endswith("exp_avg"))


def another_tensor(optimizer: Any, params: list[Tensor]) -> None:
    state, name = optimizer.state[params[0]], momentum(optimizer, params)
    state[name] = torch.full_like(state[name], 0.25)


def another_dict(optimizer: Any, params: list[Tensor]) -> None:
    optimizer.state[params[0]] = {
        k: x * 0 + 0.5 if x.dim() else x.clone() for k, x in optimizer.state[params[0]].items()
    }


def written_in_place(optimizer: Any, params: list[Tensor]) -> None:
    optimizer.state[params[0]][momentum(optimizer, params)].fill_(0.25)


EDITS = (cleared, cleared_alone, another_tensor, another_dict, written_in_place)


@pytest.mark.parametrize("edit", EDITS, ids=lambda f: f.__name__)
def test_state_that_the_user_changed_is_what_the_next_step_uses(make, edit):
    """Equal to a fresh optimizer that is given the changed state, and unlike the run without the change."""
    params, unlike = parameters(), parameters()
    optimizer, plain = make(params), make(unlike)
    train(optimizer, params, range(3))
    train(plain, unlike, range(3))
    edit(optimizer, params)
    alike = [p.detach().clone().requires_grad_() for p in params]
    fresh = make(alike)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for o, tensors in ((optimizer, params), (fresh, alike), (plain, unlike)):
        train(o, tensors, range(3, 6))
    assert_same(everything(optimizer, params), everything(fresh, alike))
    name = make.row.momentum
    slots = [[(o.state[p][name], p) for p in tensors] for o, tensors in ((optimizer, params), (plain, unlike))]
    assert any(not torch.equal(a, b) for one in zip(*slots, strict=True) for a, b in zip(*one, strict=True))


@pytest.mark.parametrize("row", [r for r in ROWS if "step" in r.counters], ids=lambda r: r.name)
def test_a_counter_that_the_user_set_is_counted_from(row):
    params = parameters()
    optimizer = Subject(row, "auto")(params)
    train(optimizer, params, range(2))
    optimizer.state[params[0]]["step"] = torch.tensor(10.0)
    optimizer.state[params[1]]["step"].fill_(20.0)
    train(optimizer, params, range(2, 4))
    assert [float(optimizer.state[p]["step"]) for p in params] == [12, 22, 4]
