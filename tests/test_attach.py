"""Transforms in front of torch's optimizers: what they read, and what goes away again."""

import copy
import importlib
import pickle
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import gradkit
from gradkit import transforms as tx
from gradkit.attach import handles, real
from tests.cases import BACKENDS, BY_NAME
from tests.contract.rows import assert_same, everything, gradients, parameters, train, values
from tests.in_front import attached, clones, half_way, ours, pair, sgd
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
    some = Wrapper(optimizer)  # as many of pytorch_optimizer's, which have those of a step and no more
    some._optimizer_step_pre_hooks, some.param_groups = {}, optimizer.param_groups
    assert real(some) is optimizer


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


@pytest.mark.parametrize("between", ["one replaced", "one taken away", "all replaced, in a closure"])
def test_behind_now_gradients_may_be_changed_before_the_step(between):
    params = parameters()
    handle = attached(sgd(params), tx.grokfast_ema(lamb=1.0))
    given = [torch.ones_like(p) for p in params]
    for p, g in zip(params, given, strict=True):
        p.grad = g.clone()

    def change():
        handle.now()  # doubles them
        if between == "all replaced, in a closure":
            for p in params:
                p.grad = p.grad * 1.0
        else:
            params[0].grad = None if between == "one taken away" else params[0].grad * 1.0

    if between == "all replaced, in a closure":
        handle.optimizer.step(change)
    else:
        change()
        handle.optimizer.step()
    assert handle.clock == 1
    for p, before in zip(params, parameters(), strict=True):
        if p.grad is not None:
            torch.testing.assert_close(before - p, torch.full_like(p, 2.0))


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


def test_a_key_of_nobodys_in_a_group_is_named_once(caplog):
    p = torch.ones(1, requires_grad=True)
    optimizer = sgd([{"params": [p], "gradkit.clip_by_value.limits": 0.1}])
    gradkit.attach(optimizer, tx.clip_by_value(5.0))
    for _ in range(2):
        p.grad = torch.ones(1)
        optimizer.step()
    assert caplog.text.count("gradkit.clip_by_value.limits in param_groups belongs to nothing attached here") == 1


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
