"""Selections on two ranks: whole tensors of whatever placement, parts of plain ones, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Replicate, Shard

import gradkit
from gradkit.transforms import clip_by_value
from tests.reference import selection
from tests.sharding.units import equal, full, shard
from tests.sharding.world import RANKS

PLACED = (  # one row over two ranks leaves the second without any
    ((7, 5), Shard(0)),
    ((1, 4), Shard(0)),
    ((4, 6), Shard(1)),
    ((3, 3), Replicate()),
    ((5, 2), None),
    ((2, 3), None),
    ((5,), Shard(0)),
    ((), None),
)
SHAPES = tuple(shape for shape, _ in PLACED)
MATRICES = [i for i, shape in enumerate(SHAPES) if len(shape) > 1]
GAP, STEPS = 2, 6


def drawn(shape: tuple[int, ...], step: int, at: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 * step + at))


def frugal(params: list[Any], **given: Any) -> gradkit.FRUGAL:
    """Half of the matrices in turn; what the first of PLACED are."""
    matrix = [p for at, p in enumerate(params) if at in MATRICES]
    vector = [p for at, p in enumerate(params) if at not in MATRICES]
    groups = [{"params": matrix, "role": "matrix"}, {"params": vector, "role": "vector"}]
    return gradkit.FRUGAL(groups, **{"lr": 0.1, "density": 0.5, "update_gap": GAP, "weight_decay": 0.1, **given})


def with_state(optimizer: gradkit.Optimizer, params: list[Any]) -> list[int]:
    """Which matrices have state."""
    return [at for at in MATRICES if optimizer.state[params[at]]]


def gathered(mine: Any) -> list[Any]:
    """What each rank has."""
    there: list[Any] = [None] * RANKS
    dist.all_gather_object(there, mine)
    return there


def whole_tensors_are_selected_as_in_one_process(given: dict[str, Any], _: Path) -> None:
    plain = [nn.Parameter(drawn(shape, 0, at)) for at, shape in enumerate(SHAPES)]
    split = [
        nn.Parameter(p.detach().clone() if where is None else shard(p.detach(), where))
        for p, (_, where) in zip(plain, PLACED, strict=True)
    ]
    optimizers = [frugal(params, **given) for params in (plain, split)]
    turns = []
    for step in range(1, STEPS + 1):
        for at, (shape, where) in enumerate(PLACED):
            plain[at].grad = drawn(shape, step, at)
            split[at].grad = plain[at].grad.clone() if where is None else shard(plain[at].grad, where)
        for optimizer in optimizers:
            optimizer.step()
        turns.append(with_state(optimizers[1], split))
        assert turns[-1] == with_state(optimizers[0], plain)
    chosen = [
        selection.selected("blocks", (t - 1) // GAP, at, SHAPES, 0.5) for t in range(1, STEPS + 1) for at in MATRICES
    ]
    assert sum(turns, []) == [at for at, x in zip(MATRICES * STEPS, chosen, strict=True) if x.all()]
    assert turns[0] != turns[2] and turns[2] != turns[4] and len(turns[0]) == len(MATRICES) // 2
    equal([full(p.detach()) for p in plain], [full(p.detach()) for p in split])
    for p, q in zip(plain, split, strict=True):
        mine = optimizers[1].state[q]
        assert mine.keys() == optimizers[0].state[p].keys()
        slots = [n for n in mine if mine[n].dim()]
        equal([optimizers[0].state[p][n] for n in slots], [full(mine[n]) for n in slots])
        assert all(isinstance(mine[n], DTensor) == isinstance(q, DTensor) for n in slots)
        assert all(mine[n].placements == q.placements for n in slots if isinstance(q, DTensor))


def a_rank_without_a_gradient_selects_with_the_others(_: Path) -> None:
    """On each rank as if its shards were all there is."""
    start = [drawn(shape, 0, at) for at, shape in enumerate(SHAPES)]
    split = [nn.Parameter(t if where is None else shard(t, where)) for t, (_, where) in zip(start, PLACED, strict=True)]
    alone = [nn.Parameter((p.to_local() if isinstance(p, DTensor) else p).detach().clone()) for p in split]
    whole, part = frugal(split), frugal(alone)
    for step in range(1, STEPS + 1):
        for at, (shape, where) in enumerate(PLACED):
            grad = drawn(shape, step, at)
            split[at].grad = grad if where is None else shard(grad, where)
            alone[at].grad = (split[at].grad.to_local() if where is not None else grad).clone()
            if dist.get_rank() == 1 and step % 3 == at % 3:
                split[at].grad = alone[at].grad = None
        whole.step()
        part.step()
        there = gathered((with_state(whole, split), with_state(part, alone)))
        assert all(x == there[0] for x in there) and there[0][0] == there[0][1]
    equal(
        [p.detach() for p in alone], [p.to_local() if isinstance(p, DTensor) else p for p in map(Tensor.detach, split)]
    )


def parts_of_plain_tensors_are_selected_as_in_one_process(kind: str, _: Path) -> None:
    """As under DDP: on each rank what the reference selects, which knows no ranks."""
    params = [nn.Parameter(drawn(shape, 0, at)) for at, shape in enumerate(SHAPES)]
    optimizer = frugal(params, split=kind, state_free="none", weight_decay=0.0)
    seen: list[list[np.ndarray]] = []
    for step in range(1, STEPS + 1):
        before = [p.detach().clone() for p in params]
        for at, p in enumerate(params):
            p.grad = drawn(SHAPES[at], step, at)
        optimizer.step()
        seen.append([(p.detach() != q).numpy() for p, q in zip(params, before, strict=True)])
        for at in MATRICES:
            assert (seen[-1][at] == selection.selected(kind, (step - 1) // GAP, at, SHAPES, 0.5)).all(), (step, at)
    for other in gathered(seen):
        assert all((a == b).all() for x, y in zip(seen, other, strict=True) for a, b in zip(x, y, strict=True))
    equal(*gathered([p.detach() for p in params]))


def parts_of_sharded_tensors_are_refused(_: Path) -> None:
    """The optimizers as soon as they are made, a split of the user's in each call that would select."""
    for where in (Shard(0), Shard(1), Replicate()):
        sharded = nn.Parameter(shard(torch.ones(4, 6), where))
        for kind in ("columns", "rows", "randk"):
            with pytest.raises(
                ValueError, match=rf"shape \(4, 6\) is sharded, and split='{kind}' .*use split='blocks'"
            ):
                gradkit.FRUGAL([{"params": [sharded], "role": "matrix"}], split=kind)
        gradkit.FRUGAL([{"params": [sharded], "role": "matrix"}])
        with pytest.raises(ValueError, match=r"SPAM: .* is sharded, and density=0.5 .*: use density=None in its group"):
            gradkit.SPAM([sharded], density=0.5)
        for kind in ("columns", "rows", "randk"):
            plain = nn.Parameter(torch.ones(4, 6))
            optimizer = gradkit.Optimizer([plain, sharded], gradkit.split(kind, gradkit.transforms.grokfast_ema()))
            plain.grad, sharded.grad = torch.ones(4, 6), torch.ones_like(sharded)
            for call in (optimizer.step, optimizer.init_state, lambda o=optimizer: o.load_state_dict(o.state_dict())):
                with pytest.raises(
                    TypeError, match=f"parameter 1 is sharded: {kind} of it can't be .*; select 'blocks'"
                ):
                    call()
            assert not optimizer.state and float(optimizer.param_groups[0]["clock"]) == 0
            assert plain.eq(1).all() and sharded.to_local().eq(1).all()


def flat_parameters_are_selected_whole_or_refused(original: bool, _: Path) -> None:
    """FSDP1 cuts what it has laid end to end: no rank has rows, with `use_orig_params` either."""
    torch.manual_seed(0)
    how: dict[str, Any] = {"device_id": torch.device("cpu"), "use_orig_params": original}
    net = nn.Sequential(*(FullyShardedDataParallel(nn.Linear(n, m), **how) for n, m in ((5, 7), (7, 3), (3, 1))))
    params = list(net.parameters())
    alone = [nn.Parameter(p.detach().clone()) for p in params]
    role = {"role": "matrix"}
    optimizers = [
        gradkit.FRUGAL([{"params": x, **role}], density=0.4, update_gap=1, backend="eager") for x in (params, alone)
    ]
    turns = []
    for step in range(4):
        net(drawn((6, 5), step, 0)).square().mean().backward()
        for p, q in zip(params, alone, strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        turns.append([i for i, p in enumerate(params) if optimizers[0].state[p]])
        equal([p.detach() for p in params], [q.detach() for q in alone])
        net.zero_grad()
    assert len({*map(tuple, turns)}) > 1 and all(x == turns for x in gathered(turns))
    for kind in ("columns", "rows", "randk"):
        with pytest.raises(ValueError, match=rf"is flattened with others, and split='{kind}' .*use split='blocks'"):
            gradkit.FRUGAL([{"params": params, **role}], split=kind)
    with pytest.raises(ValueError, match="SPAM: .* is flattened with others, and density=0.5 .*use density=None"):
        gradkit.SPAM(params, density=0.5)
    optimizer = gradkit.Optimizer(params, gradkit.split("rows", clip_by_value(1.0)))
    params[0].grad = torch.ones_like(params[0])
    with pytest.raises(TypeError, match="parameter 0 is flattened with others: rows of it .*; select 'blocks'"):
        optimizer.step()


def an_optimizer_without_state_is_saved_again_as_it_was_loaded(make: Callable, _: Path) -> None:
    """Before it steps: torch makes its dummy step, which counts, for an optimizer that holds nothing at all."""
    nets = [nn.Linear(4, 3, bias=False) for _ in range(2)]
    old, new = (make(net.parameters()) for net in nets)
    nets[0].weight.grad = torch.ones(3, 4)
    for _step in range(3):
        old.step()
    new.load_state_dict(old.state_dict())
    again = get_optimizer_state_dict(nets[1], new)
    assert float(again["param_groups"][0]["clock"]) == 3 == float(new.param_groups[0]["clock"])


LAWS = (parts_of_sharded_tensors_are_refused, a_rank_without_a_gradient_selects_with_the_others)
