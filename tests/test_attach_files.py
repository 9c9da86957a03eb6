"""Transforms in front of torch's optimizers: what a file holds, what a load takes, and how a run goes on."""

import copy
import inspect
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gradkit
from gradkit import transforms as tx
from gradkit.attach import handles
from tests.contract.rows import assert_moved, assert_same, everything, parameters, train, values
from tests.in_front import attached, clones, half_way, ours, pair, sgd


def every_optimizer() -> list[Any]:
    """Of torch.optim: each that takes dense gradients and no closure, in each of its ways of running here."""
    made = []
    for name, cls in vars(torch.optim).items():
        if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer:
            if name in ("LBFGS", "SparseAdam"):
                continue
            options = [{}, *({f: True} for f in ("foreach", "fused") if f in inspect.signature(cls).parameters)]
            made += [pytest.param(cls, o, id="-".join([name, *o])) for o in options if runs(cls, o)]
    return made


def runs(cls: type, options: Mapping[str, Any]) -> bool:
    """Whether torch has a kernel of this kind for the CPU."""
    p = torch.ones(2, 2, requires_grad=True)
    p.grad = torch.ones(2, 2)
    try:
        cls([p], **options).step()
    except RuntimeError as e:
        assert "fused" in str(e)
        return False
    return True


def test_every_optimizer_of_torch_is_tried():
    tried = [x.id for x in every_optimizer()]
    assert {"AdamW", "NAdam", "RMSprop", "Muon", "SGD", "Adafactor", "AdamW-foreach", "SGD-foreach"} <= {*tried}
    assert {x for x in tried if "fused" in x} >= {f"{n}-fused" for n in ("Adam", "AdamW", "SGD", "Adagrad")}
    assert len(tried) >= 25


def matrices(cls: type) -> list[Tensor]:
    return parameters(shapes=[(5, 3), (2, 4), (3, 3)] if cls.__name__ == "Muon" else [(5, 3), (7,), (2, 3, 2, 4)])


def through_a_file(state_dict: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    torch.save(state_dict, folder / "file.pt")
    return torch.load(folder / "file.pt", weights_only=True)


@pytest.mark.parametrize(("cls", "options"), every_optimizer())
def test_a_checkpoint_resumes_bitwise(cls, options, tmp_path):
    def start(params: Sequence[Tensor]) -> torch.optim.Optimizer:
        optimizer = cls(params, lr=0.01, **options)
        gradkit.attach(optimizer, *pair())
        return optimizer

    params = matrices(cls)
    optimizer = start(params)
    train(optimizer, params, range(5), late=3)
    half = [p.clone().detach().requires_grad_() for p in params]
    other = start(half)
    other.load_state_dict(through_a_file(optimizer.state_dict(), tmp_path))
    train(optimizer, params, range(5, 10))
    train(other, half, range(5, 10))
    assert_same(everything(other, half), everything(optimizer, params))
    plain = matrices(cls)
    train(cls(plain, lr=0.01, **options), plain, range(10), late=3)
    assert not any(torch.equal(a, b) for a, b in zip(plain, params, strict=True)), "they changed nothing"
    assert_moved(matrices(cls), values(params))


def test_numbers_of_each_tensor_resume_bitwise(tmp_path):
    """They are float64, beside float32 parameters; a transform named by the user carries its name."""
    transforms = [tx.adaclip(), tx.adagn(name="calm"), tx.spike_clip(2.0)]
    params = parameters()
    optimizer = torch.optim.AdamW(params, lr=0.01)
    gradkit.attach(optimizer, *transforms)
    train(optimizer, params, range(5), late=3)
    file = through_a_file(optimizer.state_dict(), tmp_path)
    numbers = {"gradkit_adaclip_absmax_avg", "gradkit_calm_norm_avg", "gradkit_calm_norm_sq_avg"}
    assert {k for k, v in file["state"][0].items() if isinstance(v, float) and not k.endswith("step")} == numbers
    half = clones(params)
    other = torch.optim.AdamW(half, lr=0.01)
    gradkit.attach(other, *transforms)
    other.load_state_dict(file)
    train(optimizer, params, range(5, 10))
    train(other, half, range(5, 10))
    assert_same(everything(other, half), everything(optimizer, params))


THIRD_PARTY = [
    ("pytorch_optimizer", "AdEMAMix", {}),
    ("pytorch_optimizer", "Lion", {}),
    ("pytorch_optimizer", "FAdam", {}),  # which looks at every value of a file that it loads
    ("pytorch_optimizer", "MADGRAD", {}),  # which keeps a number of its own in `state`
    ("optimi", "AdamW", {}),
    ("optimi", "StableAdamW", {"triton": False}),
]


@pytest.mark.parametrize(("module", "name", "options"), THIRD_PARTY)
def test_others_optimizers_resume_bitwise(module, name, options, tmp_path):
    cls = getattr(pytest.importorskip(module, reason=f"{module} is not installed"), name)
    test_a_checkpoint_resumes_bitwise(cls, options, tmp_path)


class Strict(torch.optim.AdamW):
    """Behind torch's load it looks for every key of the file, as pytorch_optimizer's do."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for p, entry in zip(self.param_groups[0]["params"], state_dict["state"].values(), strict=True):
            assert {*self.state[p]} >= {*entry}
            self.state[p] = {k: self.state[p][k] for k in entry}


def test_a_class_that_looks_for_every_key_of_a_file_finds_it(tmp_path):
    test_a_checkpoint_resumes_bitwise(Strict, {}, tmp_path)
    params, optimizer, _ = half_way()
    for way in (lambda x: x.state_dict(), lambda x: x.step(), lambda x: [h.detach() for h in handles(x)]):
        other = Strict(clones(params))
        gradkit.attach(other, tx.clip_by_value(1.0))  # which owns none of them
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        way(other)
        assert {k for e in other.state.values() for k in e} == {"step", "exp_avg", "exp_avg_sq"}


def test_names_in_a_file_and_that_numbers_in_it_are_pythons():
    _, optimizer, _ = half_way()
    file = optimizer.state_dict()
    slots = {f"gradkit_grokfast_ma_grad_{n}" for n in ("ring", "head", "tail")}
    assert {*file["state"][0]} == {"step", "exp_avg", "exp_avg_sq", *slots, "gradkit_grokfast_ma_filter_step"}
    assert file["state"][0]["gradkit_grokfast_ma_filter_step"] == 5.0
    kept = {k: v for k, v in file["param_groups"][0].items() if k.startswith("gradkit.")}
    assert kept["gradkit.grokfast_ma.clock"] == 5.0 and kept["gradkit.zclip.count"] == 3.0
    assert kept["gradkit.grokfast_ma.window"] == 3 and kept["gradkit.zclip.warmup_steps"] == 3
    assert not any(isinstance(v, Tensor) for v in (*kept.values(), file["state"][0]["gradkit_grokfast_ma_filter_step"]))
    assert {*optimizer.state[optimizer.param_groups[0]["params"][0]]} == {"step", "exp_avg", "exp_avg_sq"}


def test_a_bfloat16_parameters_slots_are_float32_behind_a_load(tmp_path):
    params, optimizer, handle = half_way(dtype=torch.bfloat16)
    half = clones(params)
    other = torch.optim.AdamW(half, lr=0.01)
    mine = gradkit.attach(other, *pair())
    other.load_state_dict(through_a_file(optimizer.state_dict(), tmp_path))
    for p, q in zip(params, half, strict=True):
        assert mine.state[q]["grad_ring"].dtype == torch.float32
        assert_same(dict(mine.state[q]), dict(handle.state[p]))
    train(optimizer, params, range(5, 10))
    train(other, half, range(5, 10))
    assert_same(everything(other, half), everything(optimizer, params))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attaching_behind_a_load_goes_on_from_it(dtype, caplog, tmp_path):
    params, optimizer, _ = half_way(dtype=dtype)
    half = clones(params)
    other = torch.optim.AdamW(half, lr=0.01)
    other.load_state_dict(through_a_file(optimizer.state_dict(), tmp_path))
    assert ours(other)
    with caplog.at_level(logging.WARNING, "gradkit"):
        gradkit.attach(other, *pair())
    assert {*other.state[half[0]]} == {"step", "exp_avg", "exp_avg_sq"}
    train(optimizer, params, range(5, 10))
    train(other, half, range(5, 10))
    if dtype == torch.float32:
        assert_same(everything(other, half), everything(optimizer, params))
        assert not caplog.records
    else:
        said = [x.getMessage() for x in caplog.records]
        assert len(said) == 1 and "has rounded" in said[0] and "attach before it" in said[0]
        assert other.param_groups[0]["gradkit.grokfast_ma.clock"] == 10.0


def test_a_copy_of_the_optimizer_has_the_numbers_and_no_hooks():
    params, optimizer, _ = half_way()
    other = copy.deepcopy(optimizer)
    assert not handles(other) and other.param_groups[0]["gradkit.zclip.count"] == 3.0
    handle = gradkit.attach(other, *pair())
    for p in (half := other.param_groups[0]["params"]):
        p.grad = torch.ones_like(p)
    other.step()
    assert other.param_groups[0]["gradkit.grokfast_ma.clock"] == 6.0 and len(handle.state) == len(half)


def test_an_entry_that_was_ours_alone_is_no_state_of_the_optimizers():
    """AdamW in front of which SGD's file is loaded must not take ours, which is all that SGD had, for its own."""
    params = parameters()
    plain = sgd(params)
    gradkit.attach(plain, *pair())
    train(plain, params, range(3))
    for early in (True, False):
        half = clones(params)
        optimizer = torch.optim.AdamW(half) if early else sgd(half)
        if early:
            gradkit.attach(optimizer, *pair())
        optimizer.load_state_dict(plain.state_dict())
        if not early:
            gradkit.attach(optimizer, *pair())
        assert not optimizer.state
        assert [float(x["filter_step"]) for x in handles(optimizer)[0].state.values()] == [3.0, 3.0, 3.0]


def test_a_file_from_before_attaching_loads_and_state_starts_fresh(caplog):
    params = parameters()
    plain = torch.optim.AdamW(params, lr=0.02)
    train(plain, params, range(5))
    half, optimizer, handle = half_way()
    optimizer.param_groups[0]["gradkit.zclip.alpha"] = 0.5
    with caplog.at_level(logging.WARNING, "gradkit"):
        optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))  # torch's load shares what it need not cast
    (record,) = caplog.records
    assert "lacks gradkit.zclip.count" in record.getMessage() and "starts fresh" in record.getMessage()
    group = optimizer.param_groups[0]
    assert group["lr"] == 0.02 and group.get("gradkit.zclip.alpha") == 0.5 and not handle.state
    fresh = clones(half)
    other = torch.optim.AdamW(fresh, lr=0.02)
    other.load_state_dict(plain.state_dict())
    gradkit.attach(other, *pair())
    other.param_groups[0]["gradkit.zclip.alpha"] = 0.5
    train(optimizer, half, range(5))
    train(other, fresh, range(5))
    assert_same(everything(optimizer, half), everything(other, fresh))


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD])
def test_a_plain_optimizer_goes_on_from_a_file_with_our_keys(cls):
    params = parameters()
    optimizer = cls(params, lr=0.01)
    gradkit.attach(optimizer, *pair())
    train(optimizer, params, range(5), late=9)  # the last has never had a gradient
    half, bare = clones(params), clones(params)
    other, plain = cls(half, lr=0.01), cls(bare, lr=0.01)
    file = optimizer.state_dict()
    other.load_state_dict(copy.deepcopy(file))
    mine = [{k: v for k, v in e.items() if not k.startswith("gradkit_")} for e in file["state"].values()]
    plain.load_state_dict({**file, "state": {k: e for k, e in zip(file["state"], mine, strict=True) if e}})
    train(other, half, range(5, 10))
    train(plain, bare, range(5, 10))
    assert_same(values(half), values(bare))


def test_keys_of_what_is_not_attached_are_dropped_with_one_warning(caplog):
    _, optimizer, _ = half_way()
    params = parameters()
    other = torch.optim.AdamW(params)
    gradkit.attach(other, tx.zclip(warmup_steps=3))
    gradkit.attach(other, tx.clip_by_value(1.0))
    with caplog.at_level(logging.WARNING, "gradkit"):
        other.load_state_dict(optimizer.state_dict())
    unknown = [x.getMessage() for x in caplog.records if "belongs to nothing" in x.getMessage()]
    assert len(unknown) == 1 and "gradkit_grokfast_ma_grad_ring" in unknown[0] and "zclip" not in unknown[0]
    assert not any("grokfast" in k for k in ours(other)) and other.param_groups[0]["gradkit.zclip.count"] == 3.0


def test_a_file_that_has_lost_the_slots_alone_is_told(caplog):
    """As torch's flattened one: it keeps what `optimizer.state` has."""
    _, optimizer, _ = half_way()
    file = optimizer.state_dict()
    file["state"] = optimizer.state_dict()["state"] | {
        key: {k: v for k, v in e.items() if not k.startswith("gradkit_")} for key, e in file["state"].items()
    }
    with caplog.at_level(logging.WARNING, "gradkit"):
        optimizer.load_state_dict(file)
    (record,) = caplog.records
    assert "lacks gradkit_grokfast_ma_filter_step" in record.getMessage() and "zclip" not in record.getMessage()


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.Adagrad])
def test_a_file_of_step_0_lacks_nothing(cls, caplog):
    optimizer, other = cls(parameters()), cls(parameters())
    for x in (optimizer, other):
        gradkit.attach(x, *pair())
    with caplog.at_level(logging.WARNING, "gradkit"):
        other.load_state_dict(optimizer.state_dict())
    assert not caplog.records


def test_loaded_arguments_win_as_lr_does():
    _, optimizer, _ = half_way()
    optimizer.param_groups[0]["gradkit.zclip.z_thresh"] = 4.5
    other = torch.optim.AdamW(parameters())
    gradkit.attach(other, *pair())
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["gradkit.zclip.z_thresh"] == 4.5


def test_a_file_of_another_model_is_refused_before_anything_has_changed():
    _, optimizer, _ = half_way()
    params = parameters(shapes=[(5, 3), (8,), (2, 3, 2, 4)])
    other = torch.optim.AdamW(params)
    handle = gradkit.attach(other, *pair())
    train(other, params, range(2))
    before, state = everything(other, params), dict(handle.state)
    with pytest.raises(ValueError, match=r"'gradkit_grokfast_ma_grad_\w+' of parameter 1 has shape"):
        other.load_state_dict(optimizer.state_dict())
    assert_same(everything(other, params), before)
    assert all(handle.state[p] is x for p, x in state.items())
    with pytest.raises(ValueError, match="parameter groups|size of optimizer's group"):
        other.load_state_dict(torch.optim.AdamW(params[:1]).state_dict())
    fresh = torch.optim.AdamW(parameters(shapes=[(5, 3), (8,), (2, 3, 2, 4)]))
    fresh.load_state_dict(optimizer.state_dict())
    held = everything(fresh, [])
    with pytest.raises(ValueError, match="of parameter 1 has shape"):
        gradkit.attach(fresh, *pair())
    assert_same(everything(fresh, []), held)
    assert not handles(fresh)


@gradkit.rule(slots=("y_z",))
def long_slot(u, y_z):
    return u, y_z + 1.0


@gradkit.rule(slots=("z",))
def short_slot(u, z):
    return u, z + 3.0


def test_slots_that_a_file_would_take_for_one_are_refused():
    optimizer = sgd([torch.ones(1, requires_grad=True)])
    long, short = gradkit.chain(long_slot, name="x"), gradkit.chain(short_slot, name="x_y")
    with pytest.raises(ValueError, match="two slots would be 'gradkit_x_y_z' in a file"):
        gradkit.attach(optimizer, long, short)
    gradkit.attach(optimizer, long)
    with pytest.raises(ValueError, match="two slots would be 'gradkit_x_y_z' in a file"):
        gradkit.attach(optimizer, short)
    assert len(handles(optimizer)) == 1


@pytest.mark.parametrize("lacking", ["gradkit_grokfast_ema_grad_ema", "gradkit_grokfast_ema_filter_step"])
@pytest.mark.parametrize("late", [False, True], ids=["attached, then loaded", "loaded, then attached"])
def test_a_link_of_which_a_file_lacks_something_starts_fresh(late, lacking, caplog):
    def made() -> tuple[Tensor, torch.optim.Optimizer]:
        p = torch.zeros(1, requires_grad=True)
        return p, sgd([p])

    p, optimizer = made()
    gradkit.attach(optimizer, tx.grokfast_ema(lamb=1.0), tx.spike_clip(1e9))
    p.grad = torch.full((1,), 7.0)
    optimizer.step()
    file = optimizer.state_dict()
    assert lacking in file["state"][0]
    del file["state"][0][lacking]
    q, other = made()
    if late:
        other.load_state_dict(file)
    gradkit.attach(other, tx.grokfast_ema(lamb=1.0), tx.spike_clip(1e9))
    if not late:
        other.load_state_dict(file)
    assert f"lacks {lacking}: its link starts fresh" in caplog.text
    q.grad = torch.ones(1)
    other.step()
    assert q.grad.item() == 2.0  # the first average is the gradient
    assert other.state_dict()["state"][0]["gradkit_spike_clip_spike_sq"].item() != pytest.approx(0.001), "goes on"


def test_arguments_that_a_load_has_left_win_and_are_named(caplog):
    optimizer = sgd([{"params": [torch.ones(1, requires_grad=True)], "gradkit.clip_by_value.limit": 0.1}])
    gradkit.attach(optimizer, tx.clip_by_value(0.1))
    assert not caplog.text
    handles(optimizer)[0].detach()
    optimizer.param_groups[0]["gradkit.clip_by_value.limit"] = 0.1
    gradkit.attach(optimizer, tx.clip_by_value(0.5))
    assert "clip_by_value.limit is 0.1, as loaded, not 0.5" in caplog.text


def test_a_handles_clock_is_the_files_behind_a_load():
    p = torch.zeros(1, requires_grad=True)
    handle = attached(sgd([p]), tx.clip_by_value(0.1))
    p.grad = torch.ones(1)
    handle.optimizer.step()
    other = attached(sgd([torch.zeros(1, requires_grad=True)]), tx.clip_by_value(0.1))
    other.optimizer.load_state_dict(handle.optimizer.state_dict())
    assert other.clock == 1.0
