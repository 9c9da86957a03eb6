"""Transforms attached to torch's own optimizer on sharded parameters."""

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

import gradkit
from gradkit.transforms import clip_by_global_norm, clip_by_value, grokfast_ma, zclip
from tests.sharding.units import equal, full, line, near, shard


class Run:
    """A model, torch's AdamW, and two transforms in front of it."""

    def __init__(self, sharded: bool = True):
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))  # 7 rows over two ranks are 4 and 3
        if sharded:
            fully_shard(self.net, mesh=line())
        self.opt = torch.optim.AdamW(self.net.parameters(), lr=0.01, foreach=False)
        self.handle = gradkit.attach(self.opt, grokfast_ma(window=2), zclip(warmup_steps=2, z_thresh=0.3))

    def train(self, steps: range) -> None:
        for step in steps:
            x = torch.randn(6, 5, generator=torch.Generator().manual_seed(step))
            self.net(x).square().mean().backward()
            self.opt.step()
            self.opt.zero_grad()

    def values(self) -> list[Tensor]:
        return [full(p.detach()).clone() for p in self.net.parameters()]

    def numbers(self) -> list[float]:
        return [v for k, v in self.opt.state_dict()["param_groups"][0].items() if k.startswith("gradkit.zclip.")]


def an_attached_optimizer_is_that_of_one_process(_: Path) -> None:
    runs = [Run(), Run(sharded=False)]
    for run in runs:
        run.train(range(4))
    near(runs[0].values(), runs[1].values())
    assert any((a != b).any() for a, b in zip(runs[0].values(), Run().values(), strict=True))
    p = next(runs[0].net.parameters())
    assert isinstance(runs[0].handle.state[p]["grad_ring"], DTensor)


def an_attached_optimizer_resumes_from_a_distributed_checkpoint(folder: Path) -> None:
    """Not a flattened one: torch reads that by the keys of `optimizer.state`, which are the optimizer's own."""
    options = StateDictOptions()
    straight, stopped, resumed = Run(), Run(), Run()
    straight.train(range(6))
    stopped.train(range(3))
    dcp.save(get_optimizer_state_dict(stopped.net, stopped.opt, options=options), checkpoint_id=folder)
    with torch.no_grad():
        for p, q in zip(resumed.net.parameters(), stopped.net.parameters(), strict=True):
            p.copy_(q)
    state = get_optimizer_state_dict(resumed.net, resumed.opt, options=options)
    dcp.load(state, checkpoint_id=folder)
    set_optimizer_state_dict(resumed.net, resumed.opt, state, options=options)
    resumed.train(range(3, 6))
    equal(straight.values(), resumed.values())
    assert straight.numbers() == resumed.numbers()


def a_gradient_placed_otherwise_gets_its_values(_: Path) -> None:
    torch.manual_seed(3)
    start, row = torch.randn(7, 4), torch.randn(7, 4)
    for place in (Replicate(), Shard(1)):
        p, q = nn.Parameter(shard(start, Shard(0))), nn.Parameter(start.clone())
        p.grad, q.grad = shard(row, place), row.clone()
        for x in (p, q):
            optimizer = torch.optim.SGD([x], lr=1.0, foreach=False)
            gradkit.attach(optimizer, clip_by_value(0.3), clip_by_global_norm(0.5))
            optimizer.step()
        near([full(p.detach()), full(p.grad)], [q.detach(), q.grad])
        assert not torch.equal(q.grad, row)


LAWS = (
    an_attached_optimizer_is_that_of_one_process,
    an_attached_optimizer_resumes_from_a_distributed_checkpoint,
    a_gradient_placed_otherwise_gets_its_values,
)
