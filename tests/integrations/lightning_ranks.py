"""What has to hold under Lightning's DDP, on each of two ranks, whose halves make one process's batch."""

import os
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import gradkit
from gradkit import multiloss
from gradkit.integrations import curvature
from gradkit.integrations.lightning import GradientTransforms, OptimizerMonitor, SophiaHessian
from gradkit.transforms import clip_by_value
from tests.integrations.lightning_modules import (
    FEW_WORKERS,
    OWN_PYTREE,
    Automatic,
    Curved,
    ManualTasks,
    Tasks,
    TorchAutomatic,
    fit,
)
from tests.sharding.units import near
from tests.sharding.world import RANKS

STEPS, WHOLE = 4, 8


def rows(ignored: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(STEPS * WHOLE, 4, generator=generator), torch.randint(3, (STEPS * WHOLE,), generator=generator)
    y[: 2 * ignored : 2] = -100  # of the first rank
    return x, y


def both(module: pl.LightningModule, x: Tensor, y: Tensor, ckpt_path: Any = None, **options: Any) -> pl.Trainer:
    """On both ranks, each of which takes every second row."""
    part = slice(dist.get_rank(), None, RANKS)  # Lightning's own sampler would shuffle
    loader = DataLoader(TensorDataset(x[part], y[part]), WHOLE // RANKS)
    of_ddp = {name: options.pop(name) for name in ("find_unused_parameters", "static_graph") if name in options}
    strategy = DDPStrategy(cluster_environment=LightningEnvironment(), **of_ddp)
    environment = {"LOCAL_RANK": str(dist.get_rank())}  # the processes are there already
    with patch.dict(os.environ, environment), warnings.catch_warnings():
        for message in (FEW_WORKERS, OWN_PYTREE):
            warnings.filterwarnings("ignore", message.removeprefix("ignore:"))
        trainer = fit(
            module, loader, ckpt_path, devices=RANKS, strategy=strategy, use_distributed_sampler=False, **options
        )
    assert trainer.world_size == RANKS
    return trainer


def weights(module: torch.nn.Module) -> list[Tensor]:
    return [p.detach() for p in module.parameters()]


def alike_on_all_ranks(module: torch.nn.Module) -> None:
    mine = torch.cat([p.flatten() for p in weights(module)])
    everyones = [torch.zeros_like(mine) for _ in range(RANKS)]
    dist.all_gather(everyones, mine)
    assert all(torch.equal(mine, other) for other in everyones)


def halves_train_as_one_process(folder: Path) -> None:
    """And a run goes on from a file bitwise."""
    x, y = rows()
    module, alone = Automatic(), Automatic()
    (optimizer,), (scheduler,) = alone.configure_optimizers()
    for at in range(0, len(x), WHOLE):
        optimizer.zero_grad()
        F.cross_entropy(alone(x[at : at + WHOLE]), y[at : at + WHOLE]).backward()
        optimizer.step()
        scheduler["scheduler"].step()
    trainer = both(module, x, y, callbacks=[OptimizerMonitor(2)], logger=True, default_root_dir=str(folder))
    near(weights(module), weights(alone))
    alike_on_all_ranks(module)
    trainer.save_checkpoint(folder / "it.ckpt")
    straight, resumed = Automatic(), Automatic()
    both(straight, x, y, max_epochs=2)
    both(resumed, x, y, folder / "it.ckpt", max_epochs=2)
    assert all(torch.equal(a, b) for a, b in zip(weights(straight), weights(resumed), strict=True))


def transforms_see_the_gradient_of_the_whole_batch(_: Path) -> None:
    x, y = rows()
    module, alone = TorchAutomatic(), TorchAutomatic()
    both(module, x, y, callbacks=[GradientTransforms(clip_by_value(0.02))])
    (optimizer,), (scheduler,) = alone.configure_optimizers()
    for at in range(0, len(x), WHOLE):
        optimizer.zero_grad()
        F.cross_entropy(alone(x[at : at + WHOLE]), y[at : at + WHOLE]).backward()
        torch.nn.utils.clip_grad_value_(alone.parameters(), 0.02)
        optimizer.step()
        scheduler["scheduler"].step()
    near(weights(module), weights(alone))
    alike_on_all_ranks(module)


def several_losses_are_combined_over_all_ranks(_: Path) -> None:
    x, y = rows()
    for kind, each, options in (
        (Tasks, 1, {}),
        (Tasks, 1, {"find_unused_parameters": True}),
        (Tasks, 1, {"static_graph": True}),
        (Tasks, 2, {"accumulate_grad_batches": 2}),
        (ManualTasks, 2, {}),
    ):
        module, alone = kind(), Tasks()
        optimizer = alone.configure_optimizers()
        with patch.object(multiloss, "average", lambda rows: None):
            for n, at in enumerate(range(0, len(x), WHOLE)):
                losses = alone.each((x[at : at + WHOLE], y))
                gradkit.backward([loss / each for loss in losses], optimizer, alone.method)
                if n % each == each - 1:
                    optimizer.step()
                    optimizer.zero_grad()
        both(module, x, y, **options)
        near(weights(module), weights(alone))
        alike_on_all_ranks(module)
        assert module.method.calls == STEPS


def an_estimate_is_of_all_labels(_: Path) -> None:
    """Of which the first rank has fewer."""
    x, y = rows(ignored=3)
    module, alone = Curved(0.0, hessian_every=STEPS), Curved(0.0)

    def likeliest(logits: Tensor, ignore_index: int, *, targets: Tensor) -> Tensor:
        return logits.argmax(-1).masked_fill(targets == ignore_index, ignore_index)

    with patch.object(curvature, "gnb_labels", likeliest):
        trainer = both(module, x, y, callbacks=[SophiaHessian()])
    optimizer = alone.configure_optimizers()
    logits = alone(x[:WHOLE])
    labels = likeliest(logits, -100, targets=y[:WHOLE])
    F.cross_entropy(logits, labels).backward()
    optimizer.update_hessian(batch_size=int((labels != -100).sum()))
    found = [s["hessian"] for s in trainer.optimizers[0].state.values()]
    assert all(h.any() for h in found)
    near(found, [s["hessian"] for s in optimizer.state.values()])
    alike_on_all_ranks(module)


def ranks_draw_labels_of_their_own(_: Path) -> None:
    drawn: list[Tensor] = []

    def logits(module: Any, batch: Any) -> Any:
        drawn.append(torch.rand(8))
        return module(batch[0]), batch[1]

    both(Curved(0.0), *rows(), callbacks=[SophiaHessian(logits)])
    everyones = [torch.zeros(8) for _ in range(RANKS)]
    dist.all_gather(everyones, drawn[0])
    assert not torch.equal(*everyones)


LAWS = {
    law.__name__: law
    for law in (
        halves_train_as_one_process,
        transforms_see_the_gradient_of_the_whole_batch,
        several_losses_are_combined_over_all_ranks,
        an_estimate_is_of_all_labels,
        ranks_draw_labels_of_their_own,
    )
}
