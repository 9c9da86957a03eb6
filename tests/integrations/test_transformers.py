"""gradkit in transformers' Trainer and in accelerate's loop: what a user's script does, with one line changed."""

import copy
import difflib
import inspect
import warnings
from pathlib import Path
from types import SimpleNamespace
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
from gradkit.attach import handles
from gradkit.integrations import curvature
from gradkit.integrations.transformers import GradientTransforms, OptimizerMonitor, SophiaHessian, next_tokens
from gradkit.multiloss import PCGrad
from gradkit.transforms import cautious, clip_by_global_norm, grokfast_ema, zclip
from tests.integrations.test_parts import likeliest
from tests.integrations.transformers_models import (
    TwoLosses,
    arguments,
    assert_same_way,
    language_model,
    sentences,
    two_losses,
)


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


def clipped(folder: Path) -> nn.Module:
    model = language_model()
    args = arguments(folder, max_grad_norm=0.0)
    callbacks = None
    trainer = Trainer(model, args, train_dataset=sentences(), callbacks=callbacks)
    trainer.train()
    return model


def clipped_after(folder: Path) -> nn.Module:
    model = language_model()
    args = arguments(folder, max_grad_norm=0.0)
    callbacks = [GradientTransforms(clip_by_global_norm(0.1))]
    trainer = Trainer(model, args, train_dataset=sentences(), callbacks=callbacks)
    trainer.train()
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
    assert_same_way(before(tmp_path / "before"), after(tmp_path / "after"))


def test_a_callback_is_one_line_and_what_our_own_optimizer_does_inside_its_step(tmp_path):
    old, new = (inspect.getsource(script).splitlines()[1:] for script in (clipped, clipped_after))
    assert len([line for line in difflib.ndiff(old, new) if line[0] in "+-"]) == 2
    before, after = clipped(tmp_path / "before"), clipped_after(tmp_path / "after")
    model = language_model()
    how = (gradkit.AdamW, {"lr": 1e-3, "transforms": [clip_by_global_norm(0.1)]})
    args = arguments(tmp_path, max_grad_norm=0.0)
    Trainer(model, args, train_dataset=sentences(), optimizer_cls_and_kwargs=how).train()
    assert_same_way(after, model)
    with pytest.raises(AssertionError):
        assert_same_way(after, before, 1e-4)


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


FOREIGN = {
    "Trainer's own": lambda model: {},  # torch's AdamW, fused; attached when its state is loaded already
    "given": lambda model: {"optimizers": (torch.optim.AdamW(model.parameters(), lr=1e-3), None)},  # attached before
    "given bf16": lambda model: {"optimizers": (torch.optim.AdamW(model.parameters(), lr=1e-3), None)},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_resumed_run_of_torchs_adamw_with_two_transforms_is_the_run_that_never_stopped(name, tmp_path):
    def trainer() -> tuple[Trainer, GradientTransforms]:
        model = language_model(attention_dropout=0.1)
        model.to(torch.bfloat16 if name.endswith("bf16") else torch.float32)
        transforms = GradientTransforms(zclip(warmup_steps=2, max_grad_norm=0.5), grokfast_ema())
        given = {"max_steps": 5, "save_strategy": "steps", "save_steps": 3, "max_grad_norm": 0.0}
        args = arguments(tmp_path, gradient_accumulation_steps=2, **given)
        return Trainer(
            model, args, train_dataset=sentences(), callbacks=[transforms], **FOREIGN[name](model)
        ), transforms

    straight, _ = trainer()
    straight.train()
    resumed, transforms = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(straight.model, resumed.model)
    assert transforms.handle.clock == 5
    averages = [state["grad_ema"] for state in transforms.handle.state.values()]
    assert averages and all(a.dtype == torch.float32 and a.any() for a in averages)


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


# ---- accelerate: its scaler, and its swap of the parameters ----


def test_an_overflow_skips_the_step_as_it_does_for_torchs(tmp_path):
    """With a real scaler: accelerate has fp16 on accelerators alone, so the wrapper is made as it makes it there."""
    Accelerator(cpu=True)
    seen = []
    for cls in (torch.optim.AdamW, gradkit.AdamW):
        model, scaler = language_model(), torch.amp.GradScaler("cpu", init_scale=256.0)
        optimizer = AcceleratedOptimizer(cls(model.parameters(), lr=1e-2), scaler=scaler)
        skipped = []
        for step, batch in enumerate(torch.utils.data.DataLoader(sentences(16), batch_size=4)):
            scaler.scale(model(**batch).loss).backward()
            if step == 2:
                model.lm_head.weight.grad[0, 0] = torch.inf
            scaler.unscale_(optimizer.optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            skipped.append(optimizer.step_was_skipped)
        assert skipped == [False, False, True, False] and scaler.get_scale() == 128.0
        seen.append(model)
    assert optimizer.optimizer.clock == 3
    assert_same_way(*seen)


@pytest.mark.parametrize("late", [False, True], ids=["before the first step", "after two steps"])
def test_the_optimizer_goes_on_with_the_parameters_that_accelerate_swaps_in(late):
    """State is made at the first step, for the parameters that are there by then."""
    Accelerator(cpu=True)
    models = [language_model(), language_model()]
    optimizers = [AcceleratedOptimizer(gradkit.AdamW(model.parameters(), lr=1e-2)) for model in models]
    for step, batch in enumerate(torch.utils.data.DataLoader(sentences(16), batch_size=4)):
        if step == 2 * late:
            twin = copy.deepcopy(models[1])
            swap = dict(zip(models[1].parameters(), twin.parameters(), strict=True))
            optimizers[1]._switch_parameters(swap)
            state = optimizers[1].optimizer.state
            for p in list(state):  # theirs, too
                state[swap[p]] = state.pop(p)
            models[1] = twin
        for model, optimizer in zip(models, optimizers, strict=True):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same(*models)
    assert set(optimizers[1].optimizer.state) == set(models[1].parameters())


# ---- GradientTransforms ----


def clip_trainer(folder: Path, *transforms: Any, cls: Any = torch.optim.SGD, **given: Any) -> tuple[Trainer, Any]:
    callback = GradientTransforms(*transforms)
    how: Any = {"train_dataset": sentences(), "optimizer_cls_and_kwargs": (cls, {"lr": 0.1})}
    return Trainer(language_model(), arguments(folder, max_steps=2, **given), callbacks=[callback], **how), callback


def test_two_clips_are_named_in_one_warning(tmp_path):
    trainer, callback = clip_trainer(tmp_path, grokfast_ema(), zclip(), clip_by_global_norm(1.0))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trainer.train()
        trainer.train()  # which goes on with the same optimizer
    said = "GradientTransforms: Trainer's max_grad_norm=1.0 and zclip, clip_by_global_norm both clip, in this order"
    assert [str(w.message).partition(";")[0] for w in seen if "clip" in str(w.message)] == [said]
    assert callback.explain().startswith("behind Trainer's own clip (max_grad_norm=1.0): attached to SGD")


def test_one_clip_is_no_reason_to_warn(tmp_path):
    for transform, norm in ((zclip(), 0.0), (grokfast_ema(), 1.0)):
        trainer, callback = clip_trainer(tmp_path, transform, max_grad_norm=norm)
        with pytest.raises(RuntimeError, match="GradientTransforms.explain: nothing is attached before trainer.train"):
            callback.explain()
        trainer.train()
        assert callback.handle.clock == 2
        assert callback.explain().startswith("behind" if norm else "attached to SGD")


def test_each_optimizer_is_attached_to_once_and_a_new_one_anew(tmp_path):
    callback = GradientTransforms(grokfast_ema())
    args = arguments(tmp_path, max_steps=2)
    trainer = Trainer(args=args, model_init=lambda: language_model(), train_dataset=sentences(), callbacks=[callback])
    trainer.train()
    first = callback.handle
    assert first.clock == 2 and first.optimizer is trainer.optimizer.optimizer
    trainer.train()
    assert callback.handle is not first and callback.handle.clock == 2 and first.clock == 2
    given = torch.optim.SGD(language_model().parameters(), lr=0.1)
    how: Any = {"train_dataset": sentences(), "optimizers": (given, None), "callbacks": [callback]}
    trainer = Trainer(nn.Linear(1, 1), args, **how)
    early = callback.handle
    assert early.optimizer is given, "before its state is loaded"
    callback.on_train_begin(args, None, None, optimizer=given)
    assert callback.handle is early


def test_transforms_that_do_not_fit_leave_the_optimizer_alone(tmp_path):
    with pytest.raises(TypeError, match="GradientTransforms: give at least one"):
        GradientTransforms()
    with pytest.raises(TypeError, match="GradientTransforms: .* is no chain or transform; call it"):
        GradientTransforms(zclip)
    match = r"attach: AdamW is gradkit's own, which runs transforms in its step: AdamW\(..., transforms=\[...\]\)"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of two clips nothing is said where one of them can't be
        raised(tmp_path, GradientTransforms(clip_by_global_norm(1.0)), TypeError, match, cls=gradkit.AdamW)
    optimizer = torch.optim.SGD(language_model().parameters(), lr=0.1)
    how: Any = {"optimizers": (optimizer, None), "callbacks": [GradientTransforms(grokfast_ema(), cautious())]}
    with pytest.raises(ValueError, match="attach: cautious"):
        Trainer(language_model(), arguments(tmp_path), **how)
    assert not optimizer._optimizer_step_pre_hooks and not any("gradkit" in key for key in optimizer.param_groups[0])


def given_trainer(folder: Path, optimizer: Any, callback: TrainerCallback, model: nn.Module) -> Trainer:
    how: Any = {"train_dataset": sentences(), "optimizers": (optimizer, None), "callbacks": [callback]}
    return Trainer(model, arguments(folder, max_steps=2, max_grad_norm=0.0), **how)


def test_a_second_callback_for_the_same_optimizer_is_told_of_the_first(tmp_path):
    model = language_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first, second = (GradientTransforms(zclip()) for _ in range(2))
    given_trainer(tmp_path, optimizer, first, model).train()
    group = dict(optimizer.param_groups[0])
    with pytest.raises(ValueError, match=r"attach: SGD has a 'zclip' already: call \.detach\(\) .*callback\.handle"):
        given_trainer(tmp_path, optimizer, second, model)
    assert handles(optimizer) == [first.handle] and second.handle is None
    assert {k: v for k, v in optimizer.param_groups[0].items() if k != "params"} == {
        k: v for k, v in group.items() if k != "params"
    }
    given_trainer(tmp_path, optimizer, first, model).train()
    assert handles(optimizer) == [first.handle] and first.handle.clock == 4
    first.handle.detach()
    given_trainer(tmp_path, optimizer, second, model).train()
    assert handles(optimizer) == [second.handle] and second.handle.clock == 2


def test_a_copy_attaches_anew(tmp_path):
    """To an optimizer that was copied with it, too."""
    model = language_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    callback = GradientTransforms(grokfast_ema())
    given_trainer(tmp_path, optimizer, callback, model).train()
    alone, (copied, twin, other) = copy.deepcopy(callback), copy.deepcopy((callback, optimizer, model))
    assert handles(optimizer) == [callback.handle]
    assert copied.handle.optimizer is twin and not handles(twin)
    fresh = language_model()
    given_trainer(tmp_path, torch.optim.SGD(fresh.parameters(), lr=0.1), alone, fresh).train()
    assert alone.handle.clock == 2
    given_trainer(tmp_path, twin, copied, other).train()
    assert handles(twin) == [copied.handle]
    assert all(s["grad_ema"].any() for s in copied.handle.state.values())


def test_an_overflow_leaves_the_transforms_statistics_alone():
    Accelerator(cpu=True)
    model, scaler = language_model(), torch.amp.GradScaler("cpu", init_scale=256.0)
    optimizer = AcceleratedOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), scaler=scaler)
    callback = GradientTransforms(grokfast_ema())
    callback.on_train_begin(SimpleNamespace(max_grad_norm=0.0), None, None, optimizer=optimizer)
    for step, batch in enumerate(torch.utils.data.DataLoader(sentences(12), batch_size=4)):
        before = [state["grad_ema"].clone() for state in callback.handle.state.values()]
        scaler.scale(model(**batch).loss).backward()
        if step == 1:
            model.lm_head.weight.grad[0, 0] = torch.inf
        optimizer.step()
        optimizer.zero_grad()
        after = [state["grad_ema"] for state in callback.handle.state.values()]
        assert all(a.isfinite().all() for a in after)
        if step:
            assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True)) is (step == 1)
    assert callback.handle.clock == 2


# ---- OptimizerMonitor ----


class Recorder(TrainerCallback):
    """As TensorBoard's callback: it stands before those of the user."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.logged.append({"step": state.global_step, **logs})


def test_the_monitor_logs_on_the_steps_that_count_and_reads_on_no_other(tmp_path, monkeypatch):
    recorder, monitor = Recorder(), OptimizerMonitor(every=3)
    model = language_model()
    optimizer = gradkit.AdamW(model.parameters(), lr=1e-2, transforms=[clip_by_global_norm(0.1)])
    args = arguments(tmp_path, max_steps=7, logging_steps=3, max_grad_norm=0.0)
    how = {"train_dataset": sentences(), "optimizers": (optimizer, None), "callbacks": [recorder, monitor]}
    trainer = Trainer(model, args, **how)
    monitor.log = trainer.log
    read, clipped = [], optimizer.stats
    monkeypatch.setattr(
        optimizer, "stats", lambda *a, **k: read.append((a, k, trainer.state.global_step)) or clipped(*a, **k)
    )
    trainer.train()
    assert read == [((), {"every": 3}, 0), ((), {}, 3), ((), {}, 6)]
    rows = [row for row in recorder.logged if "AdamW/update_norm" in row]
    assert [row["step"] for row in rows] == [3, 6] and rows == [
        {"step": row["step"], **row} for row in trainer.state.log_history if "AdamW/update_norm" in row
    ]
    losses = [row["step"] for row in recorder.logged if "loss" in row]
    assert losses == [3, 6], "Trainer's own rows are as they would be without"
    last, norm = rows[-1], sum(seen["grad_norm"] ** 2 for seen in monitor.last.values()) ** 0.5
    assert last["AdamW/grad_norm"] == pytest.approx(norm) and norm > 0.1
    assert last["AdamW/clip_by_global_norm.norm_after"] == pytest.approx(0.1, rel=1e-3)
    assert 0.9 < last["AdamW/clip_by_global_norm.clipped"] <= 1.0
    assert last["AdamW/update_to_weight"] == last["AdamW/update_norm"] / last["AdamW/weight_norm"]
    assert set(monitor.last) == {name for name, _ in model.named_parameters()}


def test_of_an_optimizer_of_others_what_is_attached_is_logged(tmp_path):
    """Attached behind the monitor, and by two callbacks."""
    clip, smooth = GradientTransforms(clip_by_global_norm(0.1)), GradientTransforms(grokfast_ema(lamb=1.0))
    monitor, model = OptimizerMonitor(every=2), language_model()
    how: Any = {"train_dataset": sentences(), "callbacks": [monitor, clip]}
    trainer = Trainer(model, arguments(tmp_path, max_steps=5, max_grad_norm=0.0), **how)
    trainer.callback_handler.callbacks.append(smooth)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "AdamW/clip_by_global_norm.clipped" in row]
    assert [row["step"] for row in rows] == [2, 4]
    row = rows[0]
    assert row["AdamW/clip_by_global_norm.norm_after"] == pytest.approx(0.1, rel=1e-3)
    assert row["AdamW/grad_norm"] == row["AdamW/clip_by_global_norm.norm_before"] > 0.1
    assert 0.1 < row["AdamW/norm_after"] <= 0.2 + 1e-6 and "AdamW/update_to_weight" not in row
    assert set(monitor.last) == {name for name, _ in model.named_parameters()}


def test_without_log_figures_go_to_the_history_and_reporters_are_named(tmp_path):
    args = arguments(tmp_path, max_steps=2)
    how = {"train_dataset": sentences(), "optimizer_cls_and_kwargs": (gradkit.Lion, {"lr": 1e-3})}
    trainer = Trainer(language_model(), args, callbacks=[OptimizerMonitor(every=2)], **how)
    trainer.train()
    (row,) = [row for row in trainer.state.log_history if "Lion/update_norm" in row]
    assert row["step"] == 2 and row["Lion/update_to_weight"] > 0
    trainer.args.report_to = ["tensorboard"]
    with pytest.warns(
        UserWarning, match="OptimizerMonitor: tensorboard won't see its figures.*monitor.log = trainer.log"
    ):
        trainer.train()


def test_a_run_too_short_for_the_monitor_is_named_once(tmp_path):
    how = {"train_dataset": sentences(), "optimizer_cls_and_kwargs": (gradkit.Lion, {"lr": 1e-3})}
    args = arguments(tmp_path, max_steps=8, save_strategy="steps", save_steps=8)
    with pytest.warns(
        UserWarning, match="OptimizerMonitor: nothing was logged.*every=9 counts; give a smaller"
    ) as told:
        Trainer(language_model(), args, callbacks=[OptimizerMonitor(every=9)], **how).train()
    assert len([w for w in told if "OptimizerMonitor" in str(w.message)]) == 1
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        Trainer(language_model(), args, callbacks=[OptimizerMonitor(every=8)], **how).train()
        over = Trainer(language_model(), args, callbacks=[OptimizerMonitor(every=9)], **how)
        over.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))  # the epoch is over: no step is left
    assert not [w for w in told if "OptimizerMonitor" in str(w.message)]


def test_a_skipped_step_counts_nothing(tmp_path):
    """After an overflow the clock stands, and the figures of the step before are not logged again."""
    monitor, optimizer = OptimizerMonitor(every=1), gradkit.Lion([p := nn.Parameter(torch.ones(2))], lr=1e-3)
    args, state = arguments(tmp_path), type("State", (), {"log_history": [], "global_step": 1})()
    model = nn.Module()
    model.p = p
    monitor.on_train_begin(args, state, None)
    monitor.on_step_begin(args, state, None, optimizer=optimizer)
    p.grad = torch.ones(2)
    optimizer.step()
    for _ in range(2):
        monitor.on_step_end(args, state, None, optimizer=optimizer, model=model)
    assert len(state.log_history) == 1


# ---- SophiaHessian ----


def sophia_run(
    folder: Path, callbacks: list[TrainerCallback], dropout: float = 0.1, trainer: type[Trainer] = Trainer, **given: Any
) -> Trainer:
    model = language_model(attention_dropout=dropout)
    how = (gradkit.Sophia, {"lr": 1e-3, "hessian_every": 2})
    data = sentences()
    for row in data[::3]:
        row["labels"] = row["labels"].clone()
        row["labels"][:3] = -100
    args = arguments(folder, gradient_accumulation_steps=2, **given)
    return trainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=how, callbacks=callbacks)


def test_sophias_estimate_is_that_of_the_steps_last_micro_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(curvature, "gnb_labels", likeliest)
    seen: list[Any] = []

    class Twin(TrainerCallback):
        """The page's loop on a copy, with the batch that compute_loss has had."""

        def on_pre_optimizer_step(self, args, state, control, **given):
            model, sophia = given["model"], given["optimizer"].optimizer
            twin = copy.deepcopy(model)
            other = gradkit.Sophia(twin.parameters())
            batch = seen[-1]
            logits, targets = twin(input_ids=batch["input_ids"]).logits[:, :-1], batch["labels"][:, 1:]
            labels = likeliest(logits, targets=targets)
            F.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
            other.update_hessian(batch_size=int((labels != -100).sum()))
            self.due = sophia.hessian_due
            self.expected = [other.state[p]["hessian"] for p in twin.parameters()]
            self.grads = [p.grad.clone() for p in model.parameters()]
            self.before = [sophia.state[p]["hessian"].clone() if p in sophia.state else 0.0 for p in model.parameters()]

    class Compare(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **given):
            sophia = given["optimizer"].optimizer
            for p, h, g, old in zip(given["model"].parameters(), twin.expected, twin.grads, twin.before, strict=True):
                assert torch.equal(p.grad, g)
                if twin.due:
                    torch.testing.assert_close(sophia.state[p]["hessian"], h + 0.99 * old, rtol=1e-4, atol=1e-9)
            steps.append(twin.due)

    class Looking(Trainer):
        def compute_loss(self, model, inputs, **given):
            seen.append(inputs)
            return super().compute_loss(model, inputs, **given)

    twin, steps = Twin(), []
    trainer = sophia_run(tmp_path, [twin, SophiaHessian(), Compare()], 0.0, Looking, max_steps=4)
    trainer.train()
    assert steps == [True, False, True, False]
    assert any(h.any() for h in twin.expected) and not trainer.model._forward_pre_hooks


def test_estimates_leave_the_trainings_random_numbers_alone_and_resume(tmp_path):
    def saving(**given: Any) -> Trainer:
        return sophia_run(tmp_path, [SophiaHessian()], max_steps=5, save_strategy="steps", save_steps=3, bf16=True)

    straight = saving()
    straight.train()
    after = torch.rand(4)
    resumed = saving()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(straight.model, resumed.model)
    hessians = [s["hessian"] for s in resumed.optimizer.optimizer.state.values()]
    assert all(h.any() for h in hessians)
    without = sophia_run(tmp_path / "without", [], max_steps=5, bf16=True)
    without.train()
    assert torch.equal(torch.rand(4), after), "as many numbers were drawn as without estimates"


# ---- several losses ----


def test_several_losses_go_through_trainer_as_through_a_loop_of_ones_own(tmp_path):
    model, method = language_model(), PCGrad()
    how: Any = {"optimizer_cls_and_kwargs": (gradkit.AdamW, {"lr": 1e-2}), "train_dataset": sentences()}
    args = arguments(tmp_path, max_steps=3, gradient_accumulation_steps=2, lr_scheduler_type="constant")
    trainer = TwoLosses(model, args, method=method, **how)
    trainer.train()
    assert method.calls == 6

    twin, own = language_model(), PCGrad()
    optimizer = gradkit.AdamW(twin.parameters(), lr=1e-2, weight_decay=args.weight_decay)
    for pair in zip(trainer.seen[::2], trainer.seen[1::2], strict=True):
        for inputs in pair:
            gradkit.backward([loss / 2 for loss in two_losses(twin, inputs)], optimizer, own)
        torch.nn.utils.clip_grad_norm_(twin.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    assert_same(model, twin)


# ---- what is wrong, before anything has changed ----


def raised(
    folder: Path, callback: TrainerCallback, error: type, match: str, model: Any = None, cls: Any = None
) -> None:
    model = model or language_model()
    how: Any = {"train_dataset": sentences(), "optimizer_cls_and_kwargs": (cls or torch.optim.AdamW, {"lr": 1e-3})}
    before = weights(model)
    with pytest.raises(error, match=match):
        Trainer(model, arguments(folder), callbacks=[callback], **how).train()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_what_does_not_fit_is_refused_before_training(tmp_path):
    raised(
        tmp_path, OptimizerMonitor(), TypeError, "OptimizerMonitor: torch's AdamW counts nothing; use an optimizer of"
    )
    raised(
        tmp_path, SophiaHessian(), TypeError, "SophiaHessian: torch's AdamW takes no estimates; give Trainer gradkit"
    )
    for every in (0, 1.5, "2"):
        with pytest.raises((TypeError, ValueError), match="OptimizerMonitor: every="):
            OptimizerMonitor(every=every)
    with pytest.raises(TypeError, match="OptimizerMonitor: log='wandb': give a function, e.g. trainer.log"):
        OptimizerMonitor(log="wandb")
    with pytest.raises(TypeError, match=r"SophiaHessian: logits=3: give a function of \(model, inputs\)"):
        SophiaHessian(3)
    model = language_model()
    model.__class__ = type("LlamaReader", (type(model),), {})
    match = r"SophiaHessian: LlamaReader may predict something else than the next token; give SophiaHessian\("
    raised(tmp_path, SophiaHessian(), ValueError, match, model=model, cls=gradkit.Sophia)
    match = r"SophiaHessian: logits= returned a CausalLMOutputWithPast: .* pair \(logits, labels\)"
    raised(tmp_path, SophiaHessian(lambda model, inputs: model(**inputs)), TypeError, match, cls=gradkit.Sophia)
    match = "SophiaHessian: Trainer's model was not called in this step"

    class Elsewhere(Trainer):
        def compute_loss(self, model, inputs, **given):
            return F.cross_entropy(model.model.embed_tokens.weight[:3], torch.arange(3))

    how: Any = {"optimizer_cls_and_kwargs": (gradkit.Sophia, {"lr": 1e-3}), "train_dataset": sentences()}
    with pytest.raises(RuntimeError, match=match):
        Elsewhere(language_model(), arguments(tmp_path), callbacks=[SophiaHessian()], **how).train()


def test_logits_of_ones_own_are_taken(tmp_path):
    model, asked = language_model(), []
    model.__class__ = type("LlamaForCausalReading", (type(model),), {})

    def logits(model: nn.Module, inputs: Any) -> tuple[Tensor, Tensor]:
        asked.append(set(inputs))
        return next_tokens(model, inputs)

    how: Any = {"optimizer_cls_and_kwargs": (gradkit.Sophia, {"lr": 1e-3}), "train_dataset": sentences()}
    Trainer(model, arguments(tmp_path, max_steps=2), callbacks=[SophiaHessian(logits)], **how).train()
    assert len(asked) == 1 and {"input_ids", "labels"} <= asked[0]


def test_a_smoothed_loss_hides_the_labels_and_the_error_says_what_to_give(tmp_path):
    how: Any = {"optimizer_cls_and_kwargs": (gradkit.Sophia, {"lr": 1e-3}), "train_dataset": sentences()}
    smooth = arguments(tmp_path, max_steps=2, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="the model was called without labels, as Trainer does with label_smoothing"):
        Trainer(language_model(), smooth, callbacks=[SophiaHessian()], **how).train()
    given = SophiaHessian(lambda model, inputs: (model(**inputs).logits, None))
    trainer = Trainer(language_model(), smooth, callbacks=[given], **how)
    trainer.train()
    assert any(s["hessian"].any() for s in trainer.optimizer.optimizer.state.values())
