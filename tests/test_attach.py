"""Transforms in front of torch's optimizers: what they read, what a file holds, and what goes away again."""

import copy
import importlib
import inspect
import logging
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import gradkit
from gradkit import transforms as tx
from gradkit.attach import Attached, handles
from tests.cases import BACKENDS, BY_NAME
from tests.contract.rows import assert_moved, assert_same, everything, gradients, parameters, train, values
from tests.runs import ran_on
from tests.test_golden import Golden, as_rows
from tests.tolerance import assert_equal, tolerance

CPU = torch.device("cpu")
each_backend = pytest.mark.parametrize("backend", BACKENDS)
TRANSFORMS: dict[str, Callable[[], gradkit.Chain]] = {
    "clip_by_global_norm": lambda: tx.clip_by_global_norm(1.0),
    "clip_by_norm": lambda: tx.clip_by_norm(0.5),
    "clip_by_value": lambda: tx.clip_by_value(0.3),
    "spike_clip": lambda: tx.spike_clip(2.0, beta2=0.9),
    "adaptive_clip": lambda: tx.adaptive_clip(0.2),
    "column_normalize": tx.column_normalize,
    "grokfast_ema": tx.grokfast_ema,
    "grokfast_ma": lambda: tx.grokfast_ma(window=3),
    "adaclip": tx.adaclip,
    "adagn": tx.adagn,
    "zclip": lambda: tx.zclip(warmup_steps=3),
}
OTHERS = {"cautious", "norm_growth_limit", "pixelwise_clip"}  # not of the gradient


def attached(optimizer: torch.optim.Optimizer, *transforms: gradkit.Chain, backend: str = "auto") -> Attached:
    handle = gradkit.attach(optimizer, *transforms)
    handle.backend = backend
    return handle


def sgd(params: Iterable[Any], **given: Any) -> torch.optim.SGD:
    return torch.optim.SGD(params, **{"lr": 1.0, **given})


# what the optimizer reads


def test_every_transform_of_the_gradient_stands_here():
    assert {*TRANSFORMS} | OTHERS == {*tx.__all__}


@each_backend
@pytest.mark.parametrize("name", TRANSFORMS)
def test_behind_it_sgd_moves_each_parameter_by_minus_the_transformed_gradient(name, backend):
    params, own = parameters(), parameters()
    handle = attached(sgd(params), TRANSFORMS[name](), backend=backend)
    optimizer = gradkit.Optimizer(own, gradkit.chain(), lr=1.0, transforms=[TRANSFORMS[name]()], backend=backend)
    changed = False
    for t in range(5):
        rows = gradients(params, t)
        for p, q, g in zip(params, own, rows, strict=True):
            p.grad, q.grad = g, g.clone()
        before = values(params)
        handle.optimizer.step()
        optimizer.step()
        for p, q, g, old in zip(params, own, rows, before, strict=True):
            assert p.grad is g, "the gradient is rewritten in place"
            assert torch.equal(p, old - g)
            assert_equal(p.detach(), q.detach())
            changed |= not torch.equal(p.grad, q.grad)
    assert changed and ran_on(handle) == {backend}


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_a_low_precision_gradient_becomes_is_rounded_once(dtype, backend):
    """The average of a filter is float32; so is what is computed, up to the store."""
    (p, *_), (q, *_) = parameters(dtype), parameters()
    handle = attached(sgd([p]), tx.grokfast_ema(), tx.clip_by_value(1.5), backend=backend)
    wide = attached(sgd([q]), tx.grokfast_ema(), tx.clip_by_value(1.5), backend="eager")
    for t in range(5):
        (g,) = gradients([p], t)
        p.grad, q.grad = g.clone(), g.float()
        handle.optimizer.step()
        wide.optimizer.step()
        assert_equal(p.grad, q.grad.to(dtype))
        assert not torch.equal(p.grad, g)
    assert ran_on(handle) == {backend}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_in_front_of_torchs_adamw_it_is_what_it_is_in_our_own(name):
    params, own = parameters(), parameters()
    handle = attached(torch.optim.AdamW(params, lr=0.01), TRANSFORMS[name]())
    optimizer = gradkit.AdamW(own, lr=0.01, transforms=[TRANSFORMS[name]()])
    for t in range(5):
        train(handle.optimizer, params, [t])
        train(optimizer, own, [t])
    limit = tolerance("reference", torch.float32)
    torch.testing.assert_close(params, own, rtol=limit, atol=limit * 0.01)


def test_a_clip_by_value_reads_and_writes_the_gradient_alone():
    text = gradkit.attach(sgd(parameters()), tx.clip_by_value(1.0)).explain()
    assert text.startswith("attached to SGD: 3 parameters")
    assert "chain: clip_by_value.clip_value\n" in text and "launches: 1; 8 bytes an element" in text


def test_a_trace_ends_with_what_the_optimizer_will_read():
    params = parameters()
    handle = attached(sgd(params), tx.grokfast_ema(), tx.clip_by_value(0.3))
    for p, g in zip(params, gradients(params, 0), strict=True):
        p.grad = g
    before = everything(handle.optimizer, params)
    links = handle.trace(params[1])
    assert [n for n, _ in links] == ["grokfast_ema.ema_filter", "clip_by_value.clip_value"]
    assert_same(everything(handle.optimizer, params), before)
    handle.optimizer.step()
    assert torch.equal(links[-1][1], params[1].grad)


# the authors' runs


@each_backend
@pytest.mark.parametrize("case", ["grokfast_ema", "grokfast_ma"])
def test_the_filtered_gradient_is_the_authors(case, backend):
    (file,) = BY_NAME[case].golden
    golden = Golden(file)
    params = golden.params()
    arguments = {k: v for k, v in golden.arguments.items() if k not in ("lr", "weight_decay", "momentum")}
    handle = attached(sgd(params), getattr(tx, case)(**arguments), backend=backend)
    relative = tolerance("golden", torch.float32)
    for t, row in enumerate(golden.steps("grad"), 1):
        for p, g in zip(params, row, strict=True):
            p.grad = torch.tensor(g)
        handle.optimizer.step()
        for p, theirs in zip(params, golden.each("filtered", t), strict=True):
            np.testing.assert_allclose(p.grad.numpy(), theirs, relative, relative * np.abs(theirs).max())
    assert ran_on(handle) == {backend}


@each_backend
@pytest.mark.parametrize("file", ["tx_clip_norm__l2_clip", "tx_clip_norm__linf"])
def test_clipping_by_global_norm_is_torchs(file, backend):
    golden = Golden(file)
    params = [torch.zeros(golden.arrays[f"grad_{i}"].shape, requires_grad=True) for i in range(3)]
    handle = attached(sgd(params), tx.clip_by_global_norm(**golden.arguments), backend=backend)
    for i, p in enumerate(params):
        p.grad = torch.tensor(golden.arrays[f"grad_{i}"])
    handle.optimizer.step()
    for i, p in enumerate(params):
        clipped = golden.arrays[f"out_{i}"]
        assert np.abs(clipped).max() < np.abs(golden.arrays[f"grad_{i}"]).max()
        np.testing.assert_allclose(-p.detach().numpy(), clipped, rtol=tolerance("golden", torch.float32), atol=0)
    assert ran_on(handle) == {backend}


@each_backend
@pytest.mark.parametrize("file", ["tx_zclip__default_w5", "tx_zclip__percentile_nomax"])
def test_zclip_cuts_and_remembers_as_the_authors_do(file, backend):
    golden = Golden(file)
    arrays, arguments = golden.arrays, {k: v for k, v in golden.meta["hyperparameters"].items() if k != "eps"}
    params = [torch.zeros(arrays[f"grad_0_{k}"].shape, requires_grad=True) for k in "ab"]
    optimizer = sgd(params)
    handle, cut = attached(optimizer, tx.zclip(**arguments), backend=backend), 0
    for t in range(30):
        for p, k in zip(params, "ab", strict=True):
            p.grad = torch.tensor(arrays[f"grad_{t}_{k}"])
        optimizer.step()
        for p, k in zip(params, "ab", strict=True):
            np.testing.assert_allclose(p.grad.numpy(), arrays[f"out_{t}_{k}"], rtol=1e-6)
            cut += not np.allclose(arrays[f"grad_{t}_{k}"], arrays[f"out_{t}_{k}"])
        if not np.isnan(arrays["mean"][t]):
            kept = [float(optimizer.param_groups[0].get(f"gradkit.zclip.{n}", -1.0)) for n in ("mean", "var")]
            np.testing.assert_allclose(kept, [arrays["mean"][t], arrays["var"][t]], rtol=1e-6)
    assert cut >= 8 and ran_on(handle) == {backend}


@each_backend
def test_adaptive_clip_cuts_as_the_authors_do(backend):
    arrays, arguments = Golden("tx_agc__clip0.1").arrays, Golden("tx_agc__clip0.1").meta["hyperparameters"]
    names = ["lin", "bias", "conv", "gain", "lin_big", "mh"]
    weights, grads, clipped = ([as_rows(n, arrays[f"{kind}_{n}"]) for n in names] for kind in ("param", "grad", "out"))
    params = [torch.tensor(x, requires_grad=True) for x in weights]
    handle = attached(sgd(params), tx.adaptive_clip(**arguments), backend=backend)
    for p, g in zip(params, grads, strict=True):
        p.grad = torch.tensor(g)
    handle.optimizer.step()
    for p, theirs in zip(params, clipped, strict=True):
        np.testing.assert_allclose(p.grad.numpy(), theirs, rtol=2e-6, atol=0)
    assert sum(not np.allclose(g, c) for g, c in zip(grads, clipped, strict=True)) == 5
    assert ran_on(handle) == {backend}


# what a file holds


def pair() -> list[gradkit.Chain]:
    """One with slots of each parameter, one with numbers over all."""
    return [tx.grokfast_ma(window=3, warmup=False), tx.zclip(warmup_steps=3)]


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


def half_way(**given: Any) -> tuple[list[Tensor], torch.optim.Optimizer, Attached]:
    """AdamW with two attached transforms behind five steps."""
    params = parameters(given.pop("dtype", torch.float32))
    optimizer = torch.optim.AdamW(params, lr=0.01, **given)
    handle = gradkit.attach(optimizer, *pair())
    train(optimizer, params, range(5))
    return params, optimizer, handle


def clones(params: Iterable[Tensor]) -> list[Tensor]:
    return [p.detach().clone().requires_grad_() for p in params]


def ours(optimizer: torch.optim.Optimizer) -> set[str]:
    """Keys of ours that an optimizer or its state dict shows."""
    file = optimizer.state_dict()
    dicts = [*optimizer.param_groups, *optimizer.state.values(), *file["param_groups"], *file["state"].values()]
    return {k for d in dicts for k in d if k.startswith("gradkit")}


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


# what goes away again


def test_detaching_leaves_a_plain_optimizer():
    params, optimizer, handle = half_way()
    bare = clones(params)
    plain = torch.optim.AdamW(bare, lr=0.01)
    other = gradkit.attach(optimizer, tx.clip_by_value(1.0))
    handle.detach()
    handle.detach()
    assert {k.split(".")[1] for k in ours(optimizer)} == {"clip_by_value"} and handles(optimizer) == [other]
    other.detach()
    assert not ours(optimizer) and not handles(optimizer) and not handle.state
    file = copy.deepcopy(optimizer.state_dict())
    assert {*file["param_groups"][0]} == {*plain.state_dict()["param_groups"][0]}
    plain.load_state_dict(file)
    train(optimizer, params, range(5, 8))
    train(plain, bare, range(5, 8))
    assert_same(everything(optimizer, params), everything(plain, bare))
    with pytest.raises(RuntimeError, match="it was detached"):
        handle.explain()


# groups


def test_groups_follow_the_first_one_and_may_have_their_own_values():
    params = parameters()
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = sgd([{"params": params[:1]}, {"params": params[1:2], "gradkit.clip_by_value.limit": 0.125}])
    gradkit.attach(optimizer, tx.clip_by_value(0.5))
    optimizer.add_param_group({"params": params[2:]})
    optimizer.step()
    assert [float(p.grad.max()) for p in params] == [0.5, 0.125, 0.5]
    optimizer.param_groups[0]["gradkit.clip_by_value.limit"] = 0.25
    optimizer.step()
    assert [float(p.grad.max()) for p in params] == [0.25, 0.125, 0.25]
    optimizer.param_groups[0]["gradkit.clip_by_value.limit"] = -1.0
    before = everything(optimizer, params)
    with pytest.raises(ValueError, match="attached to SGD: clip_by_value.limit=-1.0: give a number > 0"):
        optimizer.step()
    assert_same(everything(optimizer, params), before)


class Plain(torch.optim.Optimizer):
    """Without a learning rate."""

    def __init__(self, params: Iterable[Tensor], **given: Any):
        super().__init__(params, given)

    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            p.data.sub_(p.grad)


@gradkit.rule
def by_rate(u, lr):
    return u * lr


def test_a_groups_lr_may_be_anything_and_a_rule_may_ask_for_it():
    for lr in ({}, {"lr": None}, {"lr": torch.tensor(0.5)}, {"lr": 0.5}):
        params = parameters()
        optimizer = Plain(params, **lr)
        gradkit.attach(optimizer, tx.clip_by_value(0.25))
        train(optimizer, params, range(2))
        assert params[0].grad.abs().max() == 0.25
        if lr.get("lr") is None:
            with pytest.raises(ValueError, match="by_rate asks for the scalar 'lr', which nobody gives"):
                gradkit.attach(optimizer, by_rate)
        else:
            gradkit.attach(optimizer, by_rate)
            train(optimizer, params, [2])
            assert params[0].grad.abs().max() == 0.125


def test_names_of_parameters_exclude():
    layer = torch.nn.Linear(3, 3)
    optimizer = sgd(layer.named_parameters())
    gradkit.attach(optimizer, tx.adaptive_clip(1e-3, exclude=("weight",)))
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert layer.weight.grad.eq(1).all() and layer.bias.grad.lt(1).all()
    with pytest.raises(ValueError, match="needs names"):
        gradkit.attach(sgd(layer.parameters()), tx.adaptive_clip(exclude=("weight",)))


@pytest.mark.parametrize("scheduler", ["StepLR", "OneCycleLR", "LambdaLR", "ReduceLROnPlateau"])
def test_schedulers_step_as_without(scheduler):
    given = {
        "StepLR": {"step_size": 2},
        "OneCycleLR": {"max_lr": 0.1, "total_steps": 9},
        "LambdaLR": {"lr_lambda": lambda t: 1 / (t + 1)},
        "ReduceLROnPlateau": {"patience": 0},
    }[scheduler]
    rates: list[list[float]] = []
    for transforms in ([], pair()):
        params = parameters()
        optimizer = torch.optim.AdamW(params, lr=0.05)
        if transforms:
            gradkit.attach(optimizer, *transforms)
        schedule = getattr(torch.optim.lr_scheduler, scheduler)(optimizer, **given)
        rates.append([])
        for t in range(5):
            train(optimizer, params, [t])
            schedule.step(*([1.0] if scheduler == "ReduceLROnPlateau" else []))
            rates[-1].append(optimizer.param_groups[0]["lr"])
    assert rates[0] == rates[1] and len({*rates[0]}) > 1


# closures, scalers, gradients of all kinds


@pytest.mark.parametrize("way", ["positional", "keyword"])
def test_a_closures_gradients_are_transformed_behind_it(way):
    params, plain = parameters(), parameters()
    optimizer, other = sgd(params), sgd(plain)
    gradkit.attach(optimizer, tx.clip_by_value(0.25))

    def closure(of: list[Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            assert torch.is_grad_enabled()
            for p in of:
                p.grad = None
            loss = torch.stack([(p * p).sum() for p in of]).sum()
            loss.backward()
            return loss

        return run

    for _ in range(3):
        args, kwargs = ((closure(params),), {}) if way == "positional" else ((), {"closure": closure(params)})
        loss = optimizer.step(*args, **kwargs)
        expected = closure(plain)()
        for p in plain:
            p.grad.clamp_(-0.25, 0.25)
        other.step()
        assert_equal(loss.detach(), expected.detach())
    assert_same(values(params), values(plain))
    assert optimizer.param_groups[0]["gradkit.clip_by_value.clock"] == 3.0


def scaled(params: list[Tensor], row: list[Tensor]) -> Tensor:
    """A loss whose gradients are the row's."""
    return torch.stack([(p * g).sum() for p, g in zip(params, row, strict=True)]).sum()


@pytest.mark.parametrize("explicit", [False, True], ids=["implicit", "explicit"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_a_scaled_loss_takes_the_steps_of_the_unscaled_one(cls, fused, explicit):
    params, plain = parameters(), parameters()
    optimizer, other = cls(params, lr=0.01, fused=fused), cls(plain, lr=0.01, fused=fused)
    for x in (optimizer, other):
        gradkit.attach(x, *pair())
        gradkit.attach(x, tx.clip_by_value(0.5))  # a second handle: what is unscaled stays so
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for t in range(6):
        rows = [gradients(params, 10 * t + k) for k in range(2)]
        if t == 3:
            rows[-1][1][0] = torch.inf
        optimizer.zero_grad()
        other.zero_grad()
        for row in rows:  # accumulated
            scaler.scale(scaled(params, row)).backward()
            scaled(plain, row).backward()
        if explicit:
            scaler.unscale_(optimizer)
        before, given = everything(optimizer, params), [p.grad.clone() for p in params]
        scaler.step(optimizer)
        scaler.update()
        assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")
        if t == 3:
            now = everything(optimizer, params)
            if fused:  # torch counts, takes the count back, and leaves a zero of its own making
                assert_same(now["param_groups"], before["param_groups"])
                assert_same(now["parameters"], before["parameters"])
                assert_same(given if explicit else [g * 1.0 for g in given], [p.grad for p in params])
            else:
                assert_same(now, before)
        else:
            other.step()
    assert_same(everything(optimizer, params), everything(other, plain))
    assert scaler.get_scale() == 2.0**9
    assert optimizer.param_groups[0]["gradkit.clip_by_value.clock"] == 5.0


def test_a_rule_that_asks_for_g_needs_it_unscaled():
    params = parameters()
    optimizer = torch.optim.SGD(params, lr=0.01, fused=True)
    gradkit.attach(optimizer, towards)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(scaled(params, gradients(params, 0))).backward()
    before = everything(optimizer, params)
    with pytest.raises(RuntimeError, match=r"towards asks for g, .* scaler.unscale_\(optimizer\)"):
        scaler.step(optimizer)
    assert_same(everything(optimizer, params), before)


@gradkit.rule
def towards(u, g):
    return u + g


def test_late_and_frozen_parameters_and_steps_without_gradients():
    params = parameters()
    params[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(params)
    handle = gradkit.attach(optimizer, *pair())
    optimizer.step()
    assert optimizer.param_groups[0]["gradkit.grokfast_ma.clock"] == 0.0 and not handle.state
    train(optimizer, params[1:], range(2), late=1)
    assert {*handle.state} == {*params[1:]}
    assert [float(handle.state[p]["filter_step"]) for p in params[1:]] == [2.0, 1.0]


def odd(kind: str, g: Tensor) -> Tensor:
    """The same values, laid out in another way."""
    return {
        "transposed": lambda: g.t().contiguous().t(),
        "sliced": lambda: torch.stack([g, g], -1)[..., 0],
        "negated": lambda: torch._neg_view(-g),
        "expanded": lambda: g[:1].expand_as(g),
    }[kind]()


@each_backend
@pytest.mark.parametrize("kind", ["transposed", "sliced", "negated", "expanded"])
def test_a_gradient_of_another_layout_gets_its_values(kind, backend):
    params, plain = parameters(shapes=[(4, 3)]), parameters(shapes=[(4, 3)])
    handle = attached(sgd(params), tx.clip_by_value(0.3), tx.grokfast_ema(), backend=backend)
    other = attached(sgd(plain), tx.clip_by_value(0.3), tx.grokfast_ema(), backend=backend)
    for t in range(3):
        (g,) = gradients(params, t)
        params[0].grad = odd(kind, g)
        plain[0].grad = params[0].grad.clone(memory_format=torch.contiguous_format).resolve_neg()
        layout = params[0].grad
        handle.optimizer.step()
        other.optimizer.step()
        assert torch.equal(params[0].grad, plain[0].grad)
        assert params[0].grad is layout or kind == "expanded"
    assert_same(values(params), values(plain))


@each_backend
def test_channels_last_parameters(backend):
    (p,), (q,) = parameters(shapes=[(4, 3, 5, 5)]), parameters(shapes=[(4, 3, 5, 5)])
    p = p.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    handles_ = [attached(sgd([x]), tx.clip_by_value(0.3), tx.spike_clip(2.0), backend=backend) for x in (p, q)]
    for t in range(3):
        for x, handle in zip((p, q), handles_, strict=True):
            (g,) = gradients([q], t)
            x.grad = g.to(memory_format=torch.channels_last) if x is p and t else g
            handle.optimizer.step()
    assert_equal(p.detach().contiguous(), q.detach())


def test_statistics_count_what_a_clip_has_cut():
    params = parameters()
    handle = gradkit.attach(sgd(params), tx.clip_by_value(0.5))
    handle.stats(every=2)
    train(handle.optimizer, params, [0])
    assert handle.stats() == {}
    (g, *_) = gradients(params, 1)
    train(handle.optimizer, params, [1])
    mine = handle.stats()["0"]
    assert mine["clip_by_value.clipped"] == pytest.approx(float(g.abs().gt(0.5).float().mean()))
    assert mine["grad_norm"] == pytest.approx(float(g.norm()))
    assert mine["norm_after"] == pytest.approx(float(g.clamp(-0.5, 0.5).norm()))
    assert {"weight_norm", "clip_by_value.norm_before", "clip_by_value.norm_after"} <= {*mine}


def test_statistics_are_of_unscaled_gradients():
    params = parameters()
    optimizer = sgd(params, fused=True)
    handle = gradkit.attach(optimizer, tx.clip_by_value(0.5))
    handle.stats(every=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    row = gradients(params, 0)
    scaler.scale(scaled(params, row)).backward()
    scaler.step(optimizer)
    assert handle.stats()["0"]["grad_norm"] == pytest.approx(float(row[0].norm()))


# bad input


def refused() -> Iterable[Any]:
    w = parameters
    own, update = gradkit.AdamW, tx.cautious
    given: dict[str, tuple[Any, Sequence[Any], str]] = {
        "nothing": (None, [tx.clip_by_value(1.0)], "None is no torch.optim.Optimizer"),
        "a list": ([torch.optim.AdamW(w())], [tx.clip_by_value(1.0)], "is no torch.optim.Optimizer"),
        "no transform": (torch.optim.AdamW(w()), [], "give at least one transform"),
        "an empty chain": (torch.optim.AdamW(w()), [gradkit.chain()], "give at least one transform"),
        "a function": (torch.optim.AdamW(w()), [tx.clip_by_value], "is no chain or transform"),
        "pixelwise": (torch.optim.AdamW(w()), [tx.pixelwise_clip(1.0, 1)], "pixelwise_clip works on a tensor"),
        "update": (torch.optim.AdamW(w()), [update()], "cautious.agreement works at the stage UPDATE.*transforms="),
        "decay": (torch.optim.AdamW(w()), [gradkit.chain(gradkit.rule(later, stage=gradkit.Stage.WRITE))], "WRITE"),
        "split": (
            torch.optim.AdamW(w()),
            [gradkit.split("rows", gradkit.rule(later))],
            "works at the stage PRECONDITION",
        ),
        "twice in one": (torch.optim.AdamW(w()), [tx.clip_by_value(1.0)] * 2, "two links named 'clip_by_value'"),
        "LBFGS": (torch.optim.LBFGS(w()), [tx.clip_by_value(1.0)], "LBFGS evaluates the closure many times"),
        "SparseAdam": (torch.optim.SparseAdam(w()), [tx.clip_by_value(1.0)], "SparseAdam takes sparse gradients"),
        "ours": (own(w()), [tx.clip_by_value(1.0)], r"AdamW is gradkit's own.*transforms=\[...\]"),
        "complex": (
            torch.optim.AdamW([torch.ones(2, dtype=torch.complex64, requires_grad=True)]),
            [tx.clip_by_value(1.0)],
            "complex64 is not supported: use torch.view_as_real",
        ),
    }
    return [pytest.param(*x, id=name) for name, x in given.items()]


def later(u):
    return u


@pytest.mark.parametrize(("optimizer", "transforms", "says"), refused())
def test_bad_input_is_refused_and_nothing_is_half_done(optimizer, transforms, says):
    before = [dict(g) for g in getattr(optimizer, "param_groups", ())]
    with pytest.raises((TypeError, ValueError), match=says):
        gradkit.attach(optimizer, *transforms)
    if isinstance(optimizer, torch.optim.Optimizer):
        assert_same([{**g} for g in optimizer.param_groups], before)
        assert not handles(optimizer) and not optimizer._optimizer_load_state_dict_pre_hooks


def test_a_name_that_is_taken_is_refused():
    optimizer = torch.optim.AdamW(parameters())
    handle = gradkit.attach(optimizer, tx.clip_by_value(1.0))
    with pytest.raises(ValueError, match=r"AdamW has a 'clip_by_value' already: call .detach\(\)"):
        gradkit.attach(optimizer, tx.clip_by_value(2.0))
    assert handles(optimizer) == [handle] and optimizer.param_groups[0]["gradkit.clip_by_value.limit"] == 1.0
    second = gradkit.attach(optimizer, tx.clip_by_value(2.0, name="second"))
    assert handles(optimizer) == [handle, second] and optimizer.param_groups[0]["gradkit.second.limit"] == 2.0


def test_a_sparse_gradient_is_refused_before_anything_has_changed():
    embedding = torch.nn.Embedding(4, 3, sparse=True)
    optimizer = sgd(embedding.parameters())
    gradkit.attach(optimizer, tx.clip_by_value(1.0))
    embedding(torch.tensor([1, 2])).sum().backward()
    before = everything(optimizer, embedding.parameters())
    with pytest.raises(RuntimeError, match="attached to SGD: the gradient of parameter 0 is sparse"):
        optimizer.step()
    assert_same(everything(optimizer, embedding.parameters()), before)


class Wrapper(torch.optim.Optimizer):
    """As accelerate's: no hooks of its own."""

    def __init__(self, optimizer: Any):
        self.optimizer = optimizer


def test_wrappers_without_hooks_are_opened():
    optimizer = sgd(parameters())
    assert gradkit.attach(Wrapper(optimizer), tx.clip_by_value(1.0)).optimizer is optimizer
    with pytest.raises(TypeError, match="Wrapper runs no hooks: give the optimizer that it wraps"):
        gradkit.attach(Wrapper(None), tx.clip_by_value(1.0))


def test_accelerates_wrapper_is_opened():
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    importlib.import_module("accelerate.optimizer")
    params = parameters()
    wrapped = accelerate.Accelerator(cpu=True).prepare_optimizer(sgd(params))
    handle = gradkit.attach(wrapped, tx.clip_by_value(0.25))
    assert handle.optimizer is wrapped.optimizer
    train(wrapped, params, [0])
    assert params[0].grad.abs().max() == 0.25


# once, and all or nothing


class Calls(torch.optim.SGD):
    """As many libraries do it: a step around that of torch."""

    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize("with_closure", [False, True])
def test_a_step_that_calls_its_bases_step_is_one(with_closure):
    sgd([torch.ones(1, requires_grad=True)])  # torch puts hooks around a class's step when the first of it is made
    p = torch.zeros(1, requires_grad=True)
    handle = attached(Calls([p], lr=1.0), tx.grokfast_ema(lamb=1.0))

    def closure():
        p.grad = torch.ones(1)
        return p.sum()

    for n in (1, 2):
        p.grad = torch.ones(1)
        handle.optimizer.step(*[closure] * with_closure)
        assert handle.clock == n and p.item() == -2.0 * n


def test_a_step_that_raised_leaves_nothing_behind():
    class Fails(torch.optim.SGD):
        def step(self, closure=None):
            raise ArithmeticError

    p = torch.zeros(1, requires_grad=True)
    handle = attached(Fails([p], lr=1.0), tx.clip_by_value(0.5))
    for n in (1, 2):
        p.grad = torch.ones(1)
        with pytest.raises(ArithmeticError):
            handle.optimizer.step()
        assert p.grad.item() == 0.5 and handle.clock == n


@pytest.mark.parametrize("then", ["another gradient", "a closure", "no gradient at first", "a load"])
def test_what_now_has_not_seen_is_transformed_in_the_step(then):
    p = torch.zeros(1, requires_grad=True)
    handle = attached(sgd([p]), tx.clip_by_value(0.1))
    p.grad = None if then == "no gradient at first" else torch.ones(1)
    handle.now()
    if then == "a load":
        handle.optimizer.load_state_dict(handle.optimizer.state_dict())
        p.grad.fill_(1.0)
    elif then != "a closure":
        p.grad = torch.ones(1)

    def closure():
        p.grad.fill_(1.0)
        return p.sum()

    handle.optimizer.step(*[closure] * (then == "a closure"))
    assert p.item() == pytest.approx(-0.1)


def test_a_wrong_edit_is_found_before_another_handle_has_rewritten_anything():
    p = torch.zeros(1, requires_grad=True)
    first = attached(sgd([p]), tx.grokfast_ema(lamb=1.0))
    second = attached(first.optimizer, tx.clip_by_value(5.0))
    group = first.optimizer.param_groups[0]
    group["gradkit.clip_by_value.limit"] = -1.0
    p.grad = torch.ones(1)
    with pytest.raises(ValueError, match="limit"):
        first.optimizer.step()
    assert p.grad.item() == 1.0 and first.clock == second.clock == 0.0
    group["gradkit.clip_by_value.limit"] = 5.0
    first.optimizer.step()
    assert p.grad.item() == 2.0


def test_differentiable_steps_are_refused():
    optimizer = sgd([torch.ones(1, requires_grad=True)], differentiable=True)
    with pytest.raises(ValueError, match="differentiable=True: transforms keep no graph"):
        gradkit.attach(optimizer, tx.clip_by_value(1.0))
    assert not handles(optimizer)


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


def test_a_key_of_nobodys_in_a_group_is_named_once(caplog):
    p = torch.ones(1, requires_grad=True)
    optimizer = sgd([{"params": [p], "gradkit.clip_by_value.limits": 0.1}])
    gradkit.attach(optimizer, tx.clip_by_value(5.0))
    for _ in range(2):
        p.grad = torch.ones(1)
        optimizer.step()
    assert caplog.text.count("gradkit.clip_by_value.limits in param_groups belongs to nothing attached here") == 1


def test_arguments_that_a_load_has_left_win_and_are_named(caplog):
    optimizer = sgd([{"params": [torch.ones(1, requires_grad=True)], "gradkit.clip_by_value.limit": 0.1}])
    gradkit.attach(optimizer, tx.clip_by_value(0.1))
    assert not caplog.text
    handles(optimizer)[0].detach()
    optimizer.param_groups[0]["gradkit.clip_by_value.limit"] = 0.1
    gradkit.attach(optimizer, tx.clip_by_value(0.5))
    assert "clip_by_value.limit is 0.1, as loaded, not 0.5" in caplog.text


def test_a_copy_of_a_handle_is_detached():
    p = torch.zeros(1, requires_grad=True)
    handle = attached(sgd([p]), tx.clip_by_value(0.1), tx.grokfast_ema())
    p.grad = torch.ones(1)
    handle.optimizer.step()
    assert repr(handle) == "<clip_by_value, grokfast_ema attached to SGD>"
    for twin in (copy.deepcopy(handle), pickle.loads(pickle.dumps(handle))):
        assert repr(twin) == "<clip_by_value, grokfast_ema attached to SGD, detached>"
        assert not handles(twin.optimizer) and twin.optimizer is not handle.optimizer
        twin.detach()
        for use in (twin.explain, twin.now, twin.stats):
            with pytest.raises(RuntimeError, match="it was detached; call gradkit.attach again"):
                use()
        gradkit.attach(twin.optimizer, *twin.transforms)


def test_a_handles_clock_is_the_files_behind_a_load():
    p = torch.zeros(1, requires_grad=True)
    handle = attached(sgd([p]), tx.clip_by_value(0.1))
    p.grad = torch.ones(1)
    handle.optimizer.step()
    other = attached(sgd([torch.zeros(1, requires_grad=True)]), tx.clip_by_value(0.1))
    other.optimizer.load_state_dict(handle.optimizer.state_dict())
    assert other.clock == 1.0
