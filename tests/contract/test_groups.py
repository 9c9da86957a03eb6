"""Groups: overrides, names, added and replaced parameters, what they hold, and what no group and no state holds."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import gradkit
from gradkit import transforms as tx
from tests.contract.rows import (
    ALONE,
    LR,
    ROWS,
    assert_moved,
    assert_same,
    everything,
    gradients,
    parameters,
    train,
    values,
)

FLAGS = ("fused", "foreach", "capturable", "differentiable")
OPTIONS = {"maximize", "decay", "state_dtype", "rounding", "seed"}
BOOKKEEPING = {"params", "clock", "lr_ref", "algorithm"}
SAFE = (bool, int, float, str, type(None), torch.dtype, Tensor)  # what torch.load gives back with weights_only


def each_alone(make: Any, given: list[dict[str, Any]], steps: range) -> list[Tensor]:
    """The parameters, each trained by an optimizer of its own."""
    params = parameters()
    for i, (p, own) in enumerate(zip(params, given, strict=True)):
        optimizer = make([p], **own)
        for t in steps:
            p.grad = gradients(params, t)[i]
            optimizer.step()
    return params


@pytest.mark.parametrize("make", ALONE, ids=str)
def test_a_groups_values_override_the_optimizers(make):
    given = [{"lr": 0.2}, {"weight_decay": 0.3, "decay": "decoupled"}, {**make.row.other, "maximize": True}]
    params = parameters()
    optimizer = make([{"params": [p], **own} for p, own in zip(params, given, strict=True)])
    train(optimizer, params, range(5))
    alone = each_alone(make, given, range(5))
    assert_same(values(params), values(alone))
    unlike = each_alone(make, [{}] * 3, range(5))
    assert_moved(values(unlike), values(params))
    assert [g["lr"] for g in optimizer.param_groups] == [0.2, LR, LR]


def test_a_value_set_in_a_group_holds_from_the_next_step(make):
    """Also where it needs another plan: a decay of another kind, and none at all."""
    params, alike, unlike = parameters(), parameters(), parameters()
    optimizer, given, plain = make(params), make(alike, weight_decay=0.0, maximize=True), make(unlike)
    train(optimizer, params, range(2))
    train(plain, unlike, range(2))
    given.load_state_dict({**optimizer.state_dict(), "param_groups": given.state_dict()["param_groups"]})
    given.param_groups[0]["clock"].copy_(optimizer.param_groups[0]["clock"])
    with torch.no_grad():
        for a, b in zip(alike, params, strict=True):
            a.copy_(b)
    optimizer.param_groups[0].update(weight_decay=0.0, maximize=True)
    for o, tensors in ((optimizer, params), (given, alike), (plain, unlike)):
        train(o, tensors, range(2, 5))
    assert_same(values(params), values(alike))
    assert_moved(values(unlike), values(params))


def test_named_parameters_step_as_unnamed_ones(make):
    params, unnamed = parameters(), parameters()
    named = make([(f"layer.{i}", p) for i, p in enumerate(params)])
    plain = make(unnamed)
    assert named.param_groups[0]["param_names"] == ["layer.0", "layer.1", "layer.2"]
    train(named, params, range(3))
    train(plain, unnamed, range(3))
    assert_same(values(params), values(unnamed))
    assert named.state_dict()["param_groups"][0]["param_names"] == ["layer.0", "layer.1", "layer.2"]


def test_a_group_may_come_in_the_middle_of_a_run(make):
    """It starts at its own first step, and leaves the counters of the others alone."""
    params, late = parameters(), parameters()
    optimizer = make(params[:2])
    train(optimizer, params[:2], range(3))
    optimizer.add_param_group({"params": params[2], "lr": 0.01})
    together = make([{"params": late[:2]}, {"params": late[2], "lr": 0.01}])
    train(together, late, range(3), late=3)
    for o, tensors in ((optimizer, params), (together, late)):
        train(o, tensors, range(3, 6))
    assert_same(values(params), values(late))
    assert_moved(values(parameters()), values(params))
    for name in make.row.counters - {"low_step"}:  # which starts again with each selection
        assert [float(optimizer.state[p][name]) for p in params] == [6, 6, 3]
    assert float(optimizer.param_groups[0]["clock"]) == 6 and "clock" not in optimizer.param_groups[1]


@pytest.mark.parametrize("after", [0, 2], ids=["before the first step", "between steps"])
def test_a_framework_may_replace_the_parameters(make, after):
    """As sharding wrappers do: other tensor objects in the groups, with the state moved over to them."""
    params, kept = parameters(), parameters()
    optimizer, plain = make(params), make(kept)
    train(optimizer, params, range(after))
    train(plain, kept, range(after))
    before = values(params)
    new = [p.detach().clone().requires_grad_() for p in params]
    for old, p in zip(params, new, strict=True):
        if old in optimizer.state:
            optimizer.state[p] = optimizer.state.pop(old)
    optimizer.param_groups[0]["params"] = new
    train(optimizer, new, range(after, after + 3))
    train(plain, kept, range(after, after + 3))
    assert_same(values(new), values(kept))
    assert_same(values(params), before)
    assert set(optimizer.state) == set(new)


def test_the_constructor_makes_no_state(make):
    params = parameters()
    optimizer = make(params)
    optimizer.explain()
    assert not optimizer.state and not optimizer.state_dict()["state"]
    assert float(optimizer.param_groups[0]["clock"]) == 0


def test_init_state_makes_what_the_first_step_makes(make):
    params, stepped = parameters(), parameters()
    early, late = make(params), make(stepped)
    early.init_state()
    made = {name: (x.shape, x.stride(), x.dtype) for name, x in early.state[params[0]].items()}
    assert all(not x.any() for s in early.state.values() for x in s.values())
    for o, tensors in ((early, params), (late, stepped)):
        train(o, tensors, range(3))
    assert_same(everything(early, params), everything(late, stepped))
    assert made == {name: (x.shape, x.stride(), x.dtype) for name, x in late.state[stepped[0]].items()}


def test_state_is_tensors_under_known_names(make):
    params = parameters()
    optimizer = make(params)
    train(optimizer, params, range(2))
    row = make.row
    assert set(optimizer.state) == set(params)
    for p, state in optimizer.state.items():
        assert state.keys() == row.slots | row.counters | row.kept
        assert all(isinstance(x, Tensor) for x in state.values())
        for name in row.slots:
            ring = (3,) if name == "grad_ring" else ()
            part = name.startswith("low_") and p.dim() > 1  # of what is selected
            assert state[name].shape == (*ring, *p.shape) or (part and state[name].numel() < p.numel()), name
            assert state[name].dtype == torch.float32, name
        for name in row.counters:
            assert state[name].shape == () and state[name].device.type == "cpu" and state[name].dtype == torch.float32


def test_groups_hold_what_a_safe_load_gives_back(make):
    """Numbers, strings, None, tuples, dtypes and tensors, and of the chain only its arguments."""
    optimizer = make(parameters())
    groups = optimizer.state_dict()["param_groups"]

    def assert_safe(key: str, x: Any) -> None:
        if isinstance(x, tuple | list):
            for y in x:
                assert_safe(key, y)
        else:
            assert type(x) in SAFE, f"{key}: {x!r}"

    for key, value in groups[0].items():
        assert_safe(key, value)
    buffer = io.BytesIO()
    torch.save(groups, buffer)
    buffer.seek(0)
    assert_same(torch.load(buffer, weights_only=True), groups)
    assert groups[0]["algorithm"] == make.row.cls.__name__ and groups[0]["lr_ref"] == LR
    assert groups[0].keys() >= OPTIONS | BOOKKEEPING and not groups[0].keys() & {"transforms", "backend", *FLAGS}


def test_arguments_of_transforms_stand_in_every_group():
    params = parameters()
    clip = tx.clip_by_norm(1.0, name="near")
    optimizer = gradkit.AdamW([{"params": params[:1], "near.max_norm": 0.5}, {"params": params[1:]}], transforms=[clip])
    assert [g["near.max_norm"] for g in optimizer.param_groups] == [0.5, 1.0]
    train(optimizer, params, range(1))
    p, q = params[:2]
    assert float((optimizer.state[p]["exp_avg"] / 0.1).norm()) == pytest.approx(0.5, rel=1e-4)
    assert float((optimizer.state[q]["exp_avg"] / 0.1).norm()) == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
@pytest.mark.parametrize("flag", FLAGS)
def test_torchs_execution_flags_are_taken_when_off(row, flag):
    for off in (None, False):
        params, plain = parameters(), parameters()
        train(row.cls(params, **row.arguments, **{flag: off}), params, range(1))
        train(row.cls(plain, **row.arguments), plain, range(1))
        assert_same(values(params), values(plain))
    with pytest.raises(ValueError, match=rf"{row.cls.__name__}: {flag}=True .*backend="):
        row.cls(parameters(), **row.arguments, **{flag: True})


def test_an_optimizer_prints_its_groups(make):
    text = repr(make(parameters()))
    assert text.startswith(make.row.cls.__name__) and f"lr: {LR}" in text


@pytest.mark.parametrize("kind", [np.float32, np.float64], ids=lambda k: k.__name__)
def test_numbers_of_numpy_are_kept_as_pythons(make, kind):
    """A file with numpy's could not be loaded safely."""
    params, plain = parameters(), parameters()
    optimizer, other = make(params, lr=kind(0.25), weight_decay=kind(0.5)), make(plain, lr=0.25, weight_decay=0.5)
    assert type(optimizer.param_groups[0]["lr"]) is float and type(optimizer.param_groups[0]["weight_decay"]) is float
    train(optimizer, params, range(2))
    train(other, plain, range(2))
    optimizer.param_groups[0]["lr"], other.param_groups[0]["lr"] = kind(0.125), 0.125
    train(optimizer, params, range(2, 4))
    train(other, plain, range(2, 4))
    assert_same(values(params), values(plain))
    assert_moved(values(parameters()), values(params))
