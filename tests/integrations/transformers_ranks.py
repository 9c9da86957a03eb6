"""Trainer and accelerate on each of two ranks: DDP, and accelerate's FSDP2, which swaps the optimizer's parameters."""

import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from accelerate.utils.fsdp_utils import load_fsdp_optimizer, save_fsdp_optimizer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

import gradkit
from gradkit.integrations import curvature
from gradkit.integrations.transformers import GradientTransforms, OptimizerMonitor, SophiaHessian
from gradkit.multiloss import PCGrad
from gradkit.transforms import clip_by_global_norm
from tests.integrations.test_parts import likeliest
from tests.integrations.transformers_models import (
    TwoLosses,
    arguments,
    assert_same_way,
    language_model,
    sentences,
    two_losses,
)
from tests.sharding.units import full
from tests.sharding.world import RANKS, Case

NEAR = {"rtol": 2e-4, "atol": 2e-6}


def launched(case: Callable[[Path], None]) -> Case:
    """As torchrun starts it; the process group is there already."""

    @wraps(case)
    def run(folder: Path) -> None:
        rank = str(dist.get_rank())
        os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=str(RANKS), OMP_NUM_THREADS="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        try:
            case(folder)
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)

    return run


def near(left: nn.Module, right: nn.Module) -> None:
    for name, p in left.named_parameters():
        torch.testing.assert_close(full(p.detach()), full(right.get_parameter(name).detach()), **NEAR, msg=name)


def same_on_all_ranks(model: nn.Module) -> None:
    mine = torch.cat([p.detach().flatten() for p in model.parameters()])
    everyones = [torch.zeros_like(mine) for _ in range(RANKS)]
    dist.all_gather(everyones, mine)
    assert all(torch.equal(mine, other) for other in everyones)


def of_all_ranks(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The ranks' batches as one."""
    out = {}
    for name in ("input_ids", "labels"):
        parts = [torch.zeros_like(batch[name]) for _ in range(RANKS)]
        dist.all_gather(parts, batch[name].contiguous())
        out[name] = torch.cat(parts)
    return out


@launched
def trainer_under_ddp(folder: Path) -> None:
    """As with torch's AdamW and a callback; the same on each rank; what is resumed is what did not stop."""
    ours = gradkit.AdamW, {"lr": 1e-2, "transforms": [clip_by_global_norm(0.1)]}
    theirs = torch.optim.AdamW, {"lr": 1e-2}
    trained: list[nn.Module] = []
    for chosen, callbacks in (theirs, [GradientTransforms(clip_by_global_norm(0.1))]), (ours, []), (ours, []):
        model = language_model()
        args = arguments(folder, max_steps=4, max_grad_norm=0.0, save_strategy="steps", save_steps=2)
        assert args.world_size == RANKS and args.parallel_mode.name == "DISTRIBUTED"
        how: Any = {"train_dataset": sentences(64), "optimizer_cls_and_kwargs": chosen, "callbacks": callbacks}
        again = len(trained) == 2
        Trainer(model, args, **how).train(resume_from_checkpoint=str(folder / "checkpoint-2") if again else None)
        same_on_all_ranks(model)
        trained.append(model)
        dist.barrier()
    assert_same_way(*trained[:2])
    for name, p in trained[2].named_parameters():
        assert torch.equal(p, trained[1].get_parameter(name)), name


class Keeping(TrainerCallback):
    """The weights before the last step, and the inputs."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        given["model"].register_forward_pre_hook(lambda m, a, k: self.seen.append(k), with_kwargs=True)


@launched
def sophias_estimate_is_over_all_ranks(folder: Path) -> None:
    """Labels of unlike number on the ranks: each counts the same."""
    model, keeping, data = language_model(), Keeping(), sentences(64)
    for row in data[::3]:
        row["labels"] = torch.cat((torch.full((4,), -100), row["labels"][4:]))
    how: Any = {"train_dataset": data, "optimizer_cls_and_kwargs": (gradkit.Sophia, {"lr": 1e-2})}
    args = arguments(folder, max_steps=1)
    twin = language_model()
    with patch.object(curvature, "gnb_labels", likeliest):
        trainer = Trainer(model, args, callbacks=[keeping, SophiaHessian(), OptimizerMonitor(every=1)], **how)
        trainer.train()
    assert len(keeping.seen) == 2, "the step, and the estimate"
    batch = of_all_ranks(keeping.seen[0])
    logits, targets = twin(input_ids=batch["input_ids"]).logits[:, :-1], batch["labels"][:, 1:]
    labels = likeliest(logits, targets=targets)
    counts = (labels != -100).unflatten(0, (RANKS, -1)).sum((1, 2))
    assert counts[0] != counts[1], counts
    F.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    other = gradkit.Sophia(twin.parameters())
    other.update_hessian(batch_size=int(counts.sum()))
    state = trainer.optimizer.optimizer.state
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(state[p]["hessian"], other.state[q]["hessian"], rtol=1e-3, atol=1e-9)
    same_on_all_ranks(model)
    (row,) = [row for row in trainer.state.log_history if "Sophia/update_to_weight" in row]
    assert row["Sophia/update_norm"] > 0


@launched
def several_losses_under_ddp(folder: Path) -> None:
    model, method = language_model(), PCGrad()
    args = arguments(folder, max_steps=2, gradient_accumulation_steps=2, lr_scheduler_type="constant")
    how: Any = {"train_dataset": sentences(64), "optimizer_cls_and_kwargs": (gradkit.AdamW, {"lr": 1e-2})}
    trainer = TwoLosses(model, args, method=method, **how)
    trainer.train()
    same_on_all_ranks(model)
    twin, own = language_model(), PCGrad()
    optimizer = gradkit.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.0)
    for pair in zip(trainer.seen[::2], trainer.seen[1::2], strict=True):
        for inputs in pair:
            losses = [loss / 2 for loss in two_losses(twin, inputs)]
            gradkit.backward(losses, optimizer, own)
        nn.utils.clip_grad_norm_(twin.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    near(model, twin)


@launched
def accelerates_fsdp2(folder: Path) -> None:
    """Its own path, which it takes on accelerators alone: two attributes say that this is one.

    It puts placeholders into the groups, shards the model, and puts the sharded parameters in their place.
    """

    def prepared(lr: float = 1e-2) -> tuple[Any, Any, Any]:
        accelerator = Accelerator(cpu=True)
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            state_dict_type="SHARDED_STATE_DICT",
        )
        accelerator.state.distributed_type = DistributedType.FSDP
        model = language_model()
        optimizer = gradkit.AdamW(model.parameters(), lr=lr, transforms=[clip_by_global_norm(0.1)])
        return accelerator, *accelerator.prepare(model, optimizer)

    def train(accelerator: Any, model: Any, optimizer: Any, batches: list[Any]) -> None:
        for batch in batches:
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()

    batches = list(DataLoader(sentences(16), batch_size=4))
    straight = prepared()
    train(*straight, batches[:2])
    save_fsdp_optimizer(straight[0].state.fsdp_plugin, *(straight[i] for i in (0, 2, 1)), folder)
    weights = {name: p.detach().clone() for name, p in straight[1].named_parameters()}
    train(*straight, batches[2:])

    resumed = prepared(lr=1.0)
    with torch.no_grad():
        for name, p in resumed[1].named_parameters():
            p.copy_(weights[name])
    load_fsdp_optimizer(resumed[0].state.fsdp_plugin, *(resumed[i] for i in (0, 2, 1)), folder)
    train(*resumed, batches[2:])

    twin = language_model()
    optimizer = gradkit.AdamW(twin.parameters(), lr=1e-2, transforms=[clip_by_global_norm(0.1)])
    for batch in batches:
        twin(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    near(straight[1], twin)
    assert straight[2].optimizer.clock == resumed[2].optimizer.clock == 4
    for name, p in resumed[1].named_parameters():
        assert isinstance(p, DTensor) and torch.equal(p.full_tensor(), straight[1].get_parameter(name).full_tensor()), (
            name
        )
    assert all(isinstance(s["exp_avg"], DTensor) for s in straight[2].optimizer.state.values())


CASES: dict[str, Case] = {
    case.__name__: case
    for case in (
        trainer_under_ddp,
        sophias_estimate_is_over_all_ranks,
        several_losses_under_ddp,
        accelerates_fsdp2,
    )
}
