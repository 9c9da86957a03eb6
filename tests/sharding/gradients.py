"""Gradients that the ranks have in different ways: some lack one, one has a NaN, parameters lie on several meshes."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import gradkit
from gradkit.ops import absolute
from gradkit.transforms import adaptive_clip, clip_by_global_norm, clip_by_norm
from tests.sharding.units import full, line, near, shard
from tests.sharding.world import RANKS


def mean_itself(size):
    return size


@gradkit.measure(scope="all", reduce={"size": "mean"}, gives=("size",), finish=mean_itself)
def mean_size(u):
    return absolute(u)


@gradkit.rule
def over_size(u, size):
    return u / size


def rank_without_a_gradient_holds_up_none(backend: str, _: Path) -> None:
    torch.manual_seed(4)
    start, grads = [torch.randn(6, 2), torch.randn(6)], [torch.randn(6, 2), torch.randn(6)]
    split = [nn.Parameter(shard(t, Shard(0))) for t in start]
    plain = [nn.Parameter(t.clone()) for t in start]
    for p, q, g in zip(split, plain, grads, strict=True):
        p.grad, q.grad = shard(g, Shard(0)), g.clone()
    plain[1].grad[3:] = 0.0
    if dist.get_rank() == 1:
        split[1].grad = None
    for params in (split, plain):
        clips = [clip_by_global_norm(0.1), clip_by_norm(0.05)]
        gradkit.AdamW(params, eps=1e-2, transforms=clips, backend=backend).step()
    near([full(split[0].detach())], [plain[0].detach()])
    near([full(split[1].detach())], [torch.cat([plain[1].detach()[:3], start[1][3:]])])


def meshes_of_one_and_two_dimensions_step_together(_: Path) -> None:
    plane = init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("outer", "inner"))
    lie = [(line(), [Shard(0)]), (plane, [Replicate(), Shard(1)]), (plane, [Shard(1), Shard(0)]), None]
    ends = []
    for split in (True, False):
        random = torch.Generator().manual_seed(6)
        params = []
        for where in lie:
            p, g = (torch.randn(7, 3, generator=random) for _ in range(2))
            p, g = (distribute_tensor(t, *where) if split and where else t for t in (p, g))
            params.append(nn.Parameter(p))
            params[-1].grad = g
        gradkit.AdamW(params, eps=1e-2, transforms=[clip_by_global_norm(0.1), clip_by_norm(0.05)]).step()
        ends.append([full(p.detach()) for p in params])
    near(*ends)


def nan_on_one_rank_reaches_all(norm_type: float, _: Path) -> None:
    split, plain = nn.Parameter(shard(torch.ones(4), Shard(0))), nn.Parameter(torch.ones(2))
    split.grad, plain.grad = shard(torch.tensor([torch.nan, 1.0, 1.0, 1.0]), Shard(0)), torch.ones(2)
    gradkit.AdamW([split, plain], transforms=[clip_by_global_norm(0.1, norm_type=norm_type)]).step()
    assert split.to_local().isnan().all() and plain.isnan().all()


def ranks_agree_on_a_mean_though_one_lacks_a_gradient(_: Path) -> None:
    split, late = (nn.Parameter(shard(torch.zeros(4), Shard(0))) for _ in range(2))
    split.grad, late.grad = (shard(torch.full((4,), size), Shard(0)) for size in (1.0, 4.0))
    if dist.get_rank() == 1:
        late.grad = None
    filtered = gradkit.chain(mean_size, over_size, name="over_size")
    gradkit.Optimizer([split, late], filtered, lr=1.0).step()
    torch.testing.assert_close(full(split.detach()), torch.full((4,), -1 / 2))  # (4 * 1 + 2 * 4) / 6


def rank_with_gradients_of_plain_parameters_only_joins_in(_: Path) -> None:
    split, plain = nn.Parameter(shard(torch.zeros(4), Shard(0))), nn.Parameter(torch.zeros(2))
    plain.grad = torch.tensor([3.0, 4.0])
    if dist.get_rank() == 0:
        split.grad = DTensor.from_local(torch.full((2,), 6.0), split.device_mesh, [Shard(0)], shape=(4,), stride=(1,))
    filtered = clip_by_global_norm(1.0)
    gradkit.Optimizer([split, plain], filtered, lr=1.0).step()
    torch.testing.assert_close(plain.detach(), -torch.tensor([3.0, 4.0]) / 97**0.5)  # 9 + 16 + 2 * 36


def rows_that_are_cut_are_refused(_: Path) -> None:
    p = nn.Parameter(shard(torch.randn(4, 6), Shard(1)))
    p.grad = torch.ones_like(p)
    before = p.detach().to_local().clone()
    with pytest.raises(TypeError, match=r"a measure of rows needs them whole: a parameter placed as .*dim=1.* is cut"):
        gradkit.AdamW([p], transforms=[adaptive_clip()]).step()
    assert torch.equal(before, p.detach().to_local())


def an_embedding_that_is_cut_between_its_rows_is_refused(_: Path) -> None:
    """As fully_shard cuts it unless it is told otherwise; cut along the other dimension it takes the plain step."""
    torch.manual_seed(5)
    start, g, ends = torch.randn(6, 4), torch.randn(6, 4), []
    for where in (Shard(0), Shard(1), Replicate(), None):
        p = nn.Parameter(start.clone() if where is None else shard(start, where))
        p.grad = g.clone() if where is None else shard(g, where)
        optimizer = gradkit.SCALE([{"params": [p], "role": "embedding"}], lr=0.1)
        if where == Shard(0):
            told = r"columns needs them whole: .*dim=0.* is cut across; shard it along dimension 1 .*shard_placement_fn"
            with pytest.raises(TypeError, match=told):
                optimizer.step()
            assert torch.equal(full(p.detach()), start) and float(optimizer.param_groups[0]["clock"]) == 0
        else:
            optimizer.step()
            ends.append(full(p.detach()))
    assert torch.equal(ends[0], ends[2]) and torch.equal(ends[1], ends[2]) and not torch.equal(ends[2], start)


def state_by_role_is_that_of_this_rank(_: Path) -> None:
    p = nn.Parameter(shard(torch.ones(7, 3), Shard(0)))
    optimizer = gradkit.SCALE([{"params": [p], "role": "last"}])
    line = f"state by role on this rank: last {4 * 3 * (4, 3)[dist.get_rank()]} bytes"
    assert line in optimizer.explain().splitlines()


def an_estimate_with_a_nan_on_one_rank_is_left_out_on_all(_: Path) -> None:
    split, other = (nn.Parameter(shard(torch.ones(4), Shard(0))) for _ in range(2))
    optimizer = gradkit.Sophia([split, other], betas=(0.0, 0.5))
    for last in (2.0, torch.nan):
        split.grad, other.grad = shard(torch.tensor([0.0, 1.0, 1.0, last]), Shard(0)), shard(torch.ones(4), Shard(0))
        optimizer.update_hessian(batch_size=6)
    hessians = [full(optimizer.state[p]["hessian"]) for p in (split, other)]
    torch.testing.assert_close(hessians, [torch.tensor([0.0, 3.0, 3.0, 12.0]), torch.full((4,), 3.0)])


def ranks_agree_on_a_win_rate(_: Path) -> None:
    split, plain = nn.Parameter(shard(torch.ones(5), Shard(0))), nn.Parameter(torch.ones(3))
    optimizer = gradkit.Sophia([split, plain], betas=(0.0, 0.0), gamma=1.0)
    split.grad, plain.grad = shard(torch.ones(5), Shard(0)), torch.ones(3)
    optimizer.step()
    optimizer.update_hessian(estimates=[shard(torch.arange(5.0), Shard(0)), torch.full((3,), 2.0)])
    assert optimizer.win_rate() == 6 / 8  # 2, 3, 4 and three of 2 are above 1


LAWS = (
    rows_that_are_cut_are_refused,
    an_embedding_that_is_cut_between_its_rows_is_refused,
    state_by_role_is_that_of_this_rank,
    an_estimate_with_a_nan_on_one_rank_is_left_out_on_all,
    ranks_agree_on_a_win_rate,
    meshes_of_one_and_two_dimensions_step_together,
    ranks_agree_on_a_mean_though_one_lacks_a_gradient,
    rank_with_gradients_of_plain_parameters_only_joins_in,
)
