"""What has to hold of gradkit.sharding itself, on each of two ranks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

import gradkit
from gradkit import sharding
from tests.sharding.world import RANKS
from tests.tolerance import assert_equal

SUMS = {"rtol": 1e-6, "atol": 1e-6}  # a sum over shards adds in another order


def line() -> DeviceMesh:
    return init_device_mesh("cpu", (RANKS,))


def full(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def shard(t: Tensor, where: Placement, mesh: DeviceMesh | None = None) -> DTensor:
    return distribute_tensor(t.clone(), mesh or line(), [where])


def equal(left: list[Tensor], right: list[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(left, right, strict=True)):
        assert_equal(a, b, f"tensor {i}")


def near(left: list[Tensor], right: list[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(left, right, strict=True)):
        torch.testing.assert_close(a, b, **SUMS, msg=lambda m, i=i: f"tensor {i}: {m}")


def index_is_where_a_shard_stands(_: Path) -> None:
    mesh, rank = line(), dist.get_rank()
    for shape in ((7,), (7, 3), (6, 4), (2, 5, 3), (1,), (1, 4), ()):
        places = torch.arange(torch.Size(shape).numel()).view(shape)
        for where in (*map(Shard, range(len(shape))), Replicate()):
            p = shard(places.float(), where, mesh)
            mine, index = p.to_local().long(), sharding.logical_index(p)
            if isinstance(index, int):
                index = torch.arange(index, index + mine.numel()).view(mine.shape)
            assert torch.equal(index, mine), (shape, where)
    assert isinstance(sharding.logical_index(shard(torch.ones(7, 3), Shard(0), mesh)), int)
    strided = ([0, 1, 4, 5], [2, 3, 6, 7])[rank]  # two blocks of four, each cut in two, as under TP and FSDP
    p = DTensor.from_local(torch.ones(4), mesh, [_StridedShard(0, split_factor=2)], shape=(8,), stride=(1,))
    assert sharding.logical_index(p).tolist() == strided
    ring = sharding.slot(p, torch.float32, 3)
    assert repr(ring.placements) == repr((_StridedShard(1, split_factor=2),)) and ring.shape == (3, 8)
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert torch.equal(sharding.logical_index(image), torch.arange(120).view(2, 3, 4, 5))
    assert sharding.logical_index(torch.ones(3, 4)) == 0


@contextmanager
def collectives() -> Iterator[list]:
    """The all-reduces issued meanwhile."""
    seen, real = [], dist.all_reduce

    def counted(tensor: Tensor, op: dist.ReduceOp = dist.ReduceOp.SUM, group: dist.ProcessGroup | None = None) -> None:
        seen.append((tuple(tensor.shape), op))
        real(tensor, op=op, group=group)

    dist.all_reduce = counted
    try:
        yield seen
    finally:
        dist.all_reduce = real


def totals_are_joined_by_one_all_reduce_an_operation(_: Path) -> None:
    rank, nan = dist.get_rank(), float("nan")
    params = [
        shard(torch.ones(7, 3), Shard(0)),
        torch.ones(3),
        shard(torch.ones(7, 3), Replicate()),
        shard(torch.ones(7, 3), Shard(1)),
        shard(torch.ones(1), Shard(0)),
        DTensor.from_local(torch.ones(4), line(), [_StridedShard(0, split_factor=2)], shape=(8,), stride=(1,)),
    ]
    mine = [[1.0, 5.0, 2.0], [2.0, 1.0, 7.0]][rank]  # sum, max, mean
    totals = torch.tensor([mine] * 6, dtype=torch.float64)
    totals[4] = torch.tensor([mine[0], nan if rank == 0 else 1.0, nan if rank == 1 else 1.0])
    with collectives() as seen:
        sharding.complete(totals, ["sum", "max", "mean"], params)
        assert [op for _, op in seen] == [dist.ReduceOp.SUM, dist.ReduceOp.MAX]
        assert all(shape[0] == 4 for shape, _ in seen)
    joined, alone = [3.0, 5.0, 9.0], mine
    wanted = torch.tensor([joined, alone, alone, joined, [3.0, nan, nan], joined], dtype=torch.float64)
    assert_equal(totals, wanted)


def replicas_are_counted_once(_: Path) -> None:
    for shape in ((RANKS, 1), (1, RANKS)):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
        p = distribute_tensor(torch.ones(7, 3), mesh, [Replicate(), Shard(0)])
        totals = torch.full((1, 1), float(p.to_local().numel()), dtype=torch.float64)
        sharding.complete(totals, ["sum"], [p])
        assert totals.item() == 21.0, shape


def gradient_is_brought_into_its_parameters_placements(_: Path) -> None:
    mesh, values = line(), torch.arange(21.0).view(7, 3)
    p = shard(values, Shard(0), mesh)
    for where in (Shard(0), Shard(1), Replicate()):
        assert torch.equal(sharding.local_grad(shard(values, where, mesh), p), p.to_local())
    partly = DTensor.from_local(values, mesh, [Partial()])
    assert torch.equal(sharding.local_grad(partly, p), RANKS * p.to_local())


def what_cannot_be_stepped_is_refused_before_anything_changed(_: Path) -> None:
    partly = nn.Parameter(DTensor.from_local(torch.ones(3), line(), [Partial()]))
    partly.grad = torch.ones_like(partly)
    opt = gradkit.AdamW([partly])
    refuses(opt.step, "Partial")
    assert not opt.state and torch.equal(partly.to_local(), torch.ones(3)) and float(opt.param_groups[0]["clock"]) == 0
    split = shard(torch.ones(3), Shard(0))
    refuses(lambda: sharding.local_grad(torch.ones(3), split), "both must be of one kind")
    refuses(lambda: sharding.local_grad(split, torch.ones(3)), "both must be of one kind")


def plain_state_is_refused_for_a_sharded_parameter(_: Path) -> None:
    plain, split = nn.Parameter(torch.ones(4)), nn.Parameter(shard(torch.ones(4), Shard(0)))
    plain.grad = torch.ones(4)
    old, new = gradkit.AdamW([plain]), gradkit.AdamW([split])
    old.step()
    refuses(lambda: new.load_state_dict(old.state_dict()), "set_optimizer_state_dict")
    assert not new.state


def refuses(call: Callable, why: str) -> None:
    try:
        call()
    except (TypeError, ValueError) as e:
        assert why in str(e), e
    else:
        raise AssertionError(f"nothing was raised about {why}")


LAWS = (
    index_is_where_a_shard_stands,
    totals_are_joined_by_one_all_reduce_an_operation,
    replicas_are_counted_once,
    gradient_is_brought_into_its_parameters_placements,
    what_cannot_be_stepped_is_refused_before_anything_changed,
    plain_state_is_refused_for_a_sharded_parameter,
)
