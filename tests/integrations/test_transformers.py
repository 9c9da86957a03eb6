"""gradkit in transformers' Trainer and in accelerate's loop: what a user's script does, with one line changed."""

import copy
import difflib
import inspect
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

import gradkit
from gradkit.integrations import curvature
from gradkit.integrations.transformers import OptimizerMonitor, SophiaHessian, next_tokens
from gradkit.multiloss import PCGrad
from gradkit.transforms import clip_by_global_norm
from tests.integrations.tiny import LENGTH, arguments, language_model, sentences


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(left: nn.Module, right: nn.Module) -> None:
    for name, p in left.named_parameters():
        assert torch.equal(p, right.get_parameter(name)), name


# ---- a user's script, before and after ----


def given_an_optimizer(folder: Path) -> nn.Module:
    model = language_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    args = arguments(folder, warmup_steps=2, lr_scheduler_type="cosine", gradient_accumulation_steps=2)
    trainer = Trainer(model, args, train_dataset=sentences(), optimizers=(optimizer, None))
    trainer.train()
    return model


def given_an_optimizer_after(folder: Path) -> nn.Module:
    model = language_model()
    optimizer = gradkit.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    args = arguments(folder, warmup_steps=2, lr_scheduler_type="cosine", gradient_accumulation_steps=2)
    trainer = Trainer(model, args, train_dataset=sentences(), optimizers=(optimizer, None))
    trainer.train()
    return model


def given_a_class(folder: Path) -> nn.Module:
    model = language_model()
    args = arguments(folder, bf16=True, weight_decay=0.1, max_grad_norm=0.5, optim="adamw_torch")
    how = (torch.optim.AdamW, {"lr": 1e-2, "betas": (0.9, 0.95)})
    trainer = Trainer(model, args, train_dataset=sentences(), optimizer_cls_and_kwargs=how)
    trainer.train()
    return model


def given_a_class_after(folder: Path) -> nn.Module:
    model = language_model()
    args = arguments(folder, bf16=True, weight_decay=0.1, max_grad_norm=0.5, optim="adamw_torch")
    how = (gradkit.AdamW, {"lr": 1e-2, "betas": (0.9, 0.95)})
    trainer = Trainer(model, args, train_dataset=sentences(), optimizer_cls_and_kwargs=how)
    trainer.train()
    return model


def accelerated(folder: Path) -> nn.Module:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    model = language_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loader = torch.utils.data.DataLoader(sentences(), batch_size=4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return model


def accelerated_after(folder: Path) -> nn.Module:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    model = language_model()
    optimizer = gradkit.AdamW(model.parameters(), lr=1e-2)
    loader = torch.utils.data.DataLoader(sentences(), batch_size=4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return model


SCRIPTS = (
    (given_an_optimizer, given_an_optimizer_after),
    (given_a_class, given_a_class_after),
    (accelerated, accelerated_after),
)


@pytest.mark.parametrize("before, after", SCRIPTS, ids=lambda script: script.__name__)
def test_one_line_changes_and_the_model_is_the_one_that_torchs_adamw_trains(before, after, tmp_path):
    old, new = (inspect.getsource(script).splitlines()[1:] for script in (before, after))
    changed = [line for line in difflib.ndiff(old, new) if line[0] in "+-"]
    assert len(changed) == 2 and changed[1].replace("gradkit.", "torch.optim.")[1:] == changed[0][1:], changed
    untrained, first, second = language_model(), before(tmp_path / "before"), after(tmp_path / "after")
    for name, p in first.named_parameters():
        torch.testing.assert_close(second.get_parameter(name), p, rtol=2e-4, atol=2e-6)
        assert not torch.equal(p, untrained.get_parameter(name)), name


# ---- checkpoints ----


def with_kwargs(cls: type, **given: Any) -> Any:
    return lambda model: {"optimizer_cls_and_kwargs": (cls, {"lr": 1e-3, **given})}


def with_roles(cls: type, **given: Any) -> Any:
    return lambda model: {"optimizers": (cls(gradkit.param_groups(model), lr=1e-3, **given), None)}


CLASSES = {
    "AdamW": with_kwargs(gradkit.AdamW, transforms=[clip_by_global_norm(0.5)], weight_decay=0.1),
    "Lion": with_kwargs(gradkit.Lion),
    "AdEMAMix": with_kwargs(gradkit.AdEMAMix, alpha_warmup=5, beta3_warmup=5),
    "StableSPAM": with_kwargs(gradkit.StableSPAM, reset_every=4),
    "SPAM": with_kwargs(gradkit.SPAM, reset_every=4, warmup_after_reset=2, clip_free_steps=1),
    "Grokfast": with_kwargs(gradkit.Grokfast),
    "SCALE": with_roles(gradkit.SCALE),
    "FRUGAL": with_roles(gradkit.FRUGAL, update_gap=2),
    "AdamW bf16": with_roles(gradkit.AdamW, rounding="stochastic"),
}


@pytest.mark.parametrize("name", CLASSES)
def test_a_resumed_run_is_the_run_that_never_stopped(name, tmp_path):
    def trainer() -> Trainer:
        model = language_model(attention_dropout=0.1)
        model.to(torch.bfloat16 if name.endswith("bf16") else torch.float32)
        given = {"bf16": True, "gradient_accumulation_steps": 2, "lr_scheduler_type": "cosine", "warmup_steps": 2}
        args = arguments(tmp_path, max_steps=5, save_strategy="steps", save_steps=3, **given)
        return Trainer(model, args, train_dataset=sentences(), **CLASSES[name](model))

    straight = trainer()
    straight.train()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(straight.model, resumed.model)
    optimizer = resumed.optimizer.optimizer
    assert optimizer.clock == 5
    slots = [s for state in optimizer.state.values() for s in state.values() if s.dim()]
    assert slots and all(s.dtype == torch.float32 for s in slots)


# ---- what Trainer makes of the parameters ----


def test_trainers_own_groups_decay_what_trainer_says(tmp_path):
    model = language_model()
    how = (gradkit.Lion, {"lr": 1e-4, "weight_decay": 0.3})
    trainer = Trainer(model, arguments(tmp_path, weight_decay=0.1), optimizer_cls_and_kwargs=how)
    decayed, rest = trainer.create_optimizer().param_groups
    assert decayed["weight_decay"] == 0.1 and rest["weight_decay"] == 0.0
    assert {p.dim() for p in decayed["params"]} == {2} and {p.dim() for p in rest["params"]} == {1}


def test_an_optimizer_of_roles_refuses_trainers_groups_and_takes_params(tmp_path):
    model = language_model()
    for cls in (gradkit.SCALE, gradkit.FRUGAL):
        how: Any = (cls, {"lr": 1e-3})
        trainer = Trainer(model, arguments(tmp_path), optimizer_cls_and_kwargs=how)
        with pytest.raises(ValueError, match=r"a group has no role: use gradkit.param_groups\(model\)"):
            trainer.create_optimizer()
        how = (cls, {"lr": 1e-3, "params": gradkit.param_groups(model)})
        groups = Trainer(model, arguments(tmp_path), optimizer_cls_and_kwargs=how).create_optimizer().param_groups
        assert [g["role"] for g in groups] == ["matrix", "embedding", "last", "vector"]
        assert "lm_head.weight" in groups[2]["param_names"]
