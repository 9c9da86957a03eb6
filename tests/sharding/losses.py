"""What has to hold of several losses under DDP, on each of two ranks."""

from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

import gradkit
from gradkit import multiloss
from tests.sharding.units import near, shard
from tests.sharding.world import RANKS


class Net(nn.Module):
    """A trunk and three heads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.heads = nn.Linear(4, 6), nn.ModuleList(nn.Linear(6, 1) for _ in range(3))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [head(self.trunk(x).tanh()) for head in self.heads]


def losses(outputs: list[Tensor]) -> list[Tensor]:
    return [(y.sigmoid() - k / 2).square().mean() for k, y in enumerate(outputs)]


def losses_are_combined_as_in_one_process(_: Path) -> None:
    """Three steps on halves of a batch: with each bucket of gradients its own message, and with one for all."""
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    for bucket in (1, multiloss.BUCKET):
        multiloss.BUCKET = bucket
        nets = [Net(), DistributedDataParallel(Net())]
        methods, conflicts = [multiloss.PCGrad(seed=4) for _ in nets], 0.0
        for net, part, method in zip(nets, (x, x[dist.get_rank() :: RANKS]), methods, strict=True):
            optimizer = torch.optim.SGD(net.parameters(), 0.5)
            alone = patch.object(multiloss, "average", lambda rows: None) if net is nets[0] else nullcontext()
            for _ in range(3):
                optimizer.zero_grad()
                with alone:
                    gradkit.backward(losses(net(part)), optimizer, method)
                optimizer.step()
                conflicts += method.last.conflict_rate.item()
        near(*([p.detach() for p in net.parameters()] for net in nets))
        assert conflicts > 0.5
        mine = torch.cat([p.detach().flatten() for p in nets[1].parameters()])
        everyones = [torch.zeros_like(mine) for _ in range(RANKS)]
        dist.all_gather(everyones, mine)
        assert all(torch.equal(mine, other) for other in everyones)


def sharded_parameters_are_refused(_: Path) -> None:
    p = nn.Parameter(shard(torch.ones(4, 2), Shard(0)))
    with pytest.raises(TypeError, match=r"backward: a parameter of shape \(4, 2\) is sharded"):
        gradkit.backward([p.sum(), p.square().sum()], [p], multiloss.PCGrad())


LAWS = (
    sharded_parameters_are_refused,
    losses_are_combined_as_in_one_process,
)
