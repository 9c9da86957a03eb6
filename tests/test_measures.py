"""Measures: over all tensors or each, in several groups and dtypes, with one or several values."""

import copy
import math
import pickle
from typing import Any

import pytest
import torch

import gradkit
from gradkit import chain, measure, rule
from gradkit import transforms as tx
from gradkit.ops import absolute, maximum, sign, sqrt, where
from gradkit.reduction import order
from tests.cases import BACKENDS
from tests.runs import ran_on
from tests.tolerance import tolerance

each_backend = pytest.mark.parametrize("backend", BACKENDS)
CLOSE = {"rtol": tolerance("reference", torch.float32), "atol": 1e-7}


@each_backend
@pytest.mark.parametrize("norm_type", [1, 2, math.inf])
def test_one_clip_reaches_over_groups_and_dtypes(norm_type, backend):
    kinds = (torch.float32, torch.float64, torch.float32)
    torch.manual_seed(1)
    start = [torch.randn(s).to(d) for s, d in zip(((4, 3), (5,), ()), kinds, strict=True)]
    ours, theirs = ([p.clone().requires_grad_() for p in start] for _ in range(2))
    groups = [[{"params": x[:1], "lr": 0.05}, {"params": x[1:], "weight_decay": 0.2}] for x in (ours, theirs)]
    clip = tx.clip_by_global_norm(0.7, norm_type)
    optimizer = gradkit.AdamW(groups[0], lr=0.1, transforms=[clip], backend=backend)
    reference = torch.optim.AdamW(groups[1], lr=0.1)
    for t in range(4):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p) * (0.01 if t == 2 else 1.0)  # once it is not reached
            q.grad = p.grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(theirs, 0.7, norm_type)
        assert (norm > 0.7) == (t != 2)
        optimizer.step()
        reference.step()
    assert ran_on(optimizer) == {backend} and len(optimizer.explain().split("chain:")) == 3
    torch.testing.assert_close([p.detach() for p in ours], [p.detach() for p in theirs], **CLOSE)


def test_a_measure_over_all_has_one_value_of_each_argument():
    def groups(**second: Any) -> list[dict[str, Any]]:
        return [
            {"params": [torch.ones(2, requires_grad=True)]},
            {"params": [torch.ones(3, requires_grad=True)], **second},
        ]

    key, clip = "clip_by_global_norm.max_norm", tx.clip_by_global_norm(1.0)
    wanted = r"clip_by_global_norm.max_norm is \[1.0, 0.5\] in the groups.*set it alike in every group"
    with pytest.raises(ValueError, match=wanted):
        gradkit.AdamW(groups(**{key: 0.5}), transforms=[clip])
    optimizer = gradkit.AdamW(groups(), transforms=[clip])
    with pytest.raises(ValueError, match=key):
        optimizer.add_param_group({"params": [torch.ones(1, requires_grad=True)], key: 0.5})
    assert len(optimizer.param_groups) == 2
    params = [g["params"][0] for g in optimizer.param_groups]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.param_groups[1][key] = 0.5
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match=wanted):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))
    assert float(optimizer.param_groups[0]["clock"]) == 1 and float(optimizer.state[params[1]]["step"]) == 1
    optimizer.param_groups[0][key] = 0.5
    optimizer.step()
    assert float(optimizer.param_groups[0]["clock"]) == 2


class ByGroup(gradkit.Optimizer):
    """Groups that say which links they run."""

    def __init__(self, params: Any, lr: float = 1.0, links: tuple[str, ...] = (), **options: Any):
        super().__init__(params, lr=lr, links=links, **options)

    def links(self, group: Any) -> gradkit.Chain:
        return chain(*(TRANSFORMS[name] for name in group["links"]))


TRANSFORMS = {"clip": tx.clip_by_global_norm(1.0), "peak": tx.clip_by_global_norm(4.0, math.inf, name="peak")}


@each_backend
def test_a_measure_covers_the_tensors_whose_chain_holds_it(backend):
    params = [torch.zeros(1, requires_grad=True) for _ in range(3)]
    names = (("clip",), (), ("clip",))
    groups = [{"params": [p], "links": n} for p, n in zip(params, names, strict=True)]
    optimizer = ByGroup(groups, backend=backend)
    for p, g in zip(params, (3.0, 100.0, 4.0), strict=True):
        p.grad = torch.tensor([g])
    optimizer.step()
    moves = torch.cat([-p.detach() for p in params])
    torch.testing.assert_close(moves, torch.tensor([0.6, 100.0, 0.8]), **CLOSE)


@each_backend
def test_measures_run_in_an_order_that_suits_every_group(backend):
    params = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    groups = [{"params": params[:1], "links": ("peak", "clip")}, {"params": params[1:], "links": ("clip",)}]
    optimizer = ByGroup(groups, backend=backend)
    params[0].grad, params[1].grad = torch.tensor([8.0]), torch.tensor([3.0])
    optimizer.step()  # 8 -> 4 by its peak, then (4, 3) -> (0.8, 0.6)
    torch.testing.assert_close(torch.cat(params).detach(), torch.tensor([-0.8, -0.6]), **CLOSE)
    groups[1]["links"] = ("clip", "peak")
    crossed = ByGroup([{**g, "params": g["params"]} for g in groups], backend=backend)
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match="another order in another group: use one order"):
        crossed.step()
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True)) and not crossed.state


def two(small, total, floor):
    """Two results of two reductions, arithmetic among scalars, a gate."""
    root = sqrt(total)
    return where(small > floor, 1.0 / root, 1.0), root + 1.0


@measure(scope="tensor", reduce={"small": "max", "total": "sum"}, gives=("gain", "bias"), finish=two)
def sizes(u, p):
    return absolute(u), u * u + p * 0.0


@rule
def standardise(u, p, gain, bias):
    return u * gain + sign(p) * bias


@each_backend
def test_a_measure_may_reduce_and_give_several_values(backend):
    links = chain(sizes, standardise, name="standard", floor=2.5)
    p = torch.tensor([1.0, 100.0], requires_grad=True)
    optimizer = gradkit.Optimizer([p], links, lr=1.0, backend=backend)
    moves = []
    for row in ([3.0, -4.0], [1.0, 2.0]):
        before, p.grad = p.detach().clone(), torch.tensor(row)
        optimizer.step()
        moves.append(before - p.detach())
    root = math.sqrt(5.0)
    expected = torch.tensor([[0.6 + 6.0, -0.8 + 6.0], [1.0 - (root + 1.0), 2.0 + root + 1.0]])
    torch.testing.assert_close(torch.stack(moves), expected, rtol=1e-4, atol=1e-4)  # differences of a hundred


def running_max(largest, before):
    return maximum(largest, before), maximum(largest, before)


@measure(scope="all", reduce={"largest": "max"}, state=("before",), gives=("most",), finish=running_max)
def most_so_far(u):
    return absolute(u)


@rule
def over_most(u, most):
    return u / maximum(u * 0.0 + most, 1e-3)


SO_FAR = chain(most_so_far, over_most, name="so_far")


def keeping(backend, *dtypes, **options):
    params = [torch.zeros(3, dtype=dtype, requires_grad=True) for dtype in dtypes]
    optimizer = gradkit.Optimizer([{"params": [p]} for p in params], SO_FAR, lr=1.0, backend=backend, **options)
    return params, optimizer


def give(params, *sizes):
    for p, size in zip(params, sizes, strict=True):
        p.grad = torch.full_like(p, size)


@each_backend
def test_what_a_measure_over_all_keeps_stands_once_in_the_first_group(backend):
    params, optimizer = keeping(backend, torch.float32, torch.bfloat16)
    first, second = optimizer.param_groups
    give(params, 2.0, 4.0)
    optimizer.step()
    assert float(first["so_far.before"]) == 4.0 and "so_far.before" not in second
    assert params[0].tolist() == [-0.5] * 3 and params[1].tolist() == [-1.0] * 3
    plan = optimizer._plans["step"]
    give(params, 1.0, 1.0)
    optimizer.step()
    assert float(first["so_far.before"]) == 4.0 and optimizer._plans["step"] is plan
    first["so_far.before"] = torch.tensor(8.0)  # from outside
    optimizer.step()
    assert float(first["so_far.before"]) == 8.0 and first["so_far.before"].dtype == torch.float64
    assert params[0].tolist() == [-0.5 - 0.25 - 0.125] * 3
    assert "so_far.before once" in optimizer.explain()


def test_looking_and_copying_leave_what_is_kept_alone():
    params, optimizer = keeping("auto", torch.float32)
    give(params, 2.0)
    optimizer.step()
    give(params, 16.0)
    assert dict(optimizer.trace(params[0]))["so_far.over_most"].tolist() == [1.0] * 3
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        other.param_groups[0]["params"][0].grad = torch.full((3,), 32.0)
        other.step()
        assert float(other.param_groups[0]["so_far.before"]) == 32.0
    assert float(optimizer.param_groups[0]["so_far.before"]) == 2.0


def test_what_is_kept_for_all_needs_a_name_of_its_own():
    p = torch.zeros(3, requires_grad=True)
    with pytest.raises(ValueError, match="most_so_far keeps before in the first group: give its chain name="):
        gradkit.Optimizer([p], chain(most_so_far, over_most))
    with pytest.raises(ValueError, match="arguments other names"):
        gradkit.Optimizer([p], chain(most_so_far, over_most, name="so_far", before=1.0))


def test_a_file_without_what_is_kept_says_so(caplog):
    (p,), optimizer = keeping("auto", torch.float32)
    saved = gradkit.Optimizer([p], chain(), lr=1.0).state_dict()
    optimizer.load_state_dict(saved)
    assert "lacks so_far.before" in caplog.text


@each_backend
def test_what_is_kept_for_all_starts_anew_where_it_was_taken_away(backend):
    params, optimizer = keeping(backend, torch.float32, torch.float32)
    give(params, 2.0, 4.0)
    optimizer.step()
    optimizer.param_groups.reverse()
    optimizer.step()
    assert float(optimizer.param_groups[0]["so_far.before"]) == 4.0
    del optimizer.param_groups[0]["so_far.before"]
    give(params, 1.0, 3.0)
    optimizer.step()
    assert float(optimizer.param_groups[0]["so_far.before"]) == 3.0


def test_transforms_may_be_replaced_between_steps():
    net = torch.nn.Linear(2, 2)
    optimizer = gradkit.AdamW(net.named_parameters())
    for transforms in ((tx.zclip(),), (tx.adaptive_clip(exclude=("bias",)),), ()):
        optimizer.transforms = transforms
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()


def test_a_norm_is_counted_only_for_a_mean():
    optimizer = gradkit.AdamW([torch.ones(2, requires_grad=True)], transforms=[tx.clip_by_norm(1.0), tx.cautious()])
    (batch,) = optimizer.batches([torch.ones(2)])
    assert [r.counts for r in order([batch])] == [False, True]
