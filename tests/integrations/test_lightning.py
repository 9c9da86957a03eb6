"""gradkit under Lightning's Trainer: the one line that changes, precision, checkpoints, callbacks, several losses."""

import copy
import difflib
import importlib
import inspect
import sys
import warnings
from typing import Any
from unittest.mock import PropertyMock, patch

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

import gradkit
from gradkit import multiloss, stats
from gradkit.attach import handles
from gradkit.integrations import curvature
from gradkit.integrations.lightning import GradientTransforms, MultiLoss, OptimizerMonitor, SophiaHessian
from gradkit.transforms import cautious, clip_by_norm, clip_by_value, grokfast_ema, spike_clip, zclip
from tests.integrations.lightning_modules import (
    BATCHES,
    FEW_WORKERS,
    OWN_PYTREE,
    Automatic,
    Clipping,
    Curved,
    Manual,
    ManualTasks,
    Tasks,
    TorchAutomatic,
    TorchManual,
    data,
    fit,
    torch_trainer,
    trainer,
)
from tests.tolerance import assert_equal

pytestmark = [pytest.mark.filterwarnings(FEW_WORKERS), pytest.mark.filterwarnings(OWN_PYTREE)]
PAIRS = {"automatic": (TorchAutomatic, Automatic), "manual": (TorchManual, Manual)}


def weights(module: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def near(these: Any, those: Any, relative: float = 1e-5) -> None:
    for a, b in zip(these, those, strict=True):
        torch.testing.assert_close(a, b, rtol=relative, atol=relative)


def same(these: Any, those: Any) -> None:
    assert all(torch.equal(a, b) for a, b in zip(these, those, strict=True))


def moved(module: torch.nn.Module) -> bool:
    return not any(torch.equal(a, b) for a, b in zip(weights(module), weights(type(module)()), strict=True))


def scaling(**options: Any) -> MixedPrecision:
    """Real float16: the flag alone is bf16 on a CPU."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", **options))


def batch(*tensors: torch.Tensor) -> DataLoader:
    """A loader of this one batch."""
    return DataLoader([tensors], batch_size=None)


def said(call: Any) -> str:
    """The error that a call ends with."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


class Seen(Logger):
    """Keeps what it is told."""

    name, version = "seen", "0"

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        assert step is not None
        self.rows.setdefault(step, {}).update(metrics)

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass


@pytest.mark.parametrize("kind", [*PAIRS, "callback"])
def test_one_line_changes(kind):
    """The optimizer's, or the Trainer's callbacks."""
    pair = PAIRS.get(kind, (torch_trainer, trainer))
    before, after = (inspect.getsource(it).splitlines()[1:] for it in pair)  # but for the names
    changed = [x for x in difflib.ndiff(before, after) if x[0] in "-+"]
    assert [x[0] for x in changed] == ["-", "+"], changed
    assert ("callbacks=[]" if kind == "callback" else "torch.optim.AdamW(") in changed[0]
    assert ("GradientTransforms(" if kind == "callback" else "gradkit.AdamW(") in changed[1]


RUNS: dict[str, tuple[str, dict[str, Any], float]] = {
    "closure": ("automatic", {}, 1e-5),
    "accumulation": ("automatic", {"accumulate_grad_batches": 4}, 1e-5),
    "clip by the Trainer": ("automatic", {"gradient_clip_val": 0.1}, 1e-5),
    "manual": ("manual", {}, 1e-5),
    "bf16-mixed": ("automatic", {"precision": "bf16-mixed"}, 1e-3),
    "bf16-true": ("automatic", {"precision": "bf16-true"}, 2.0**-7),
}


@pytest.mark.parametrize("mode", RUNS)
def test_weights_are_those_that_torchs_optimizer_reaches(mode):
    kind, options, relative = RUNS[mode]
    theirs, mine = (cls() for cls in PAIRS[kind])
    fit(theirs, **options)
    run = fit(mine, **options)
    near(weights(mine), weights(theirs), relative)
    optimizer = run.optimizers[0]
    steps = {"accumulation": 2, "manual": BATCHES / 2}.get(mode, BATCHES)
    assert optimizer.clock == run.global_step == steps and moved(mine)
    if mode == "bf16-true":
        assert {p.dtype for p in mine.parameters()} == {torch.bfloat16}
        assert {optimizer.state[p]["exp_avg"].dtype for p in mine.parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", PAIRS)
def test_a_scaler_skips_the_step_of_an_overflow(kind):
    reached = []
    for module in (cls() for cls in PAIRS[kind]):
        after = {"automatic": 3, "manual": 2}[kind]  # steps; then the factor grows too far, and the next overflows
        plugin = scaling(init_scale=2.0**10, growth_factor=2.0**40, growth_interval=after, backoff_factor=2.0**-40)
        run = fit(module, plugins=[plugin])
        assert plugin.scaler.get_scale() == 2.0**10
        reached.append(weights(module))
    assert run.optimizers[0].clock == run.global_step - 1
    near(*reached, 1e-3)


def test_the_clip_in_the_step_is_the_trainers():
    inside, outside = Clipping(), Automatic()
    outside.configure_optimizers = lambda: gradkit.AdamW(outside.parameters(), lr=1e-2)
    fit(inside)
    fit(outside, gradient_clip_val=0.1)
    near(weights(inside), weights(outside))
    unclipped = Automatic()
    unclipped.configure_optimizers = lambda: gradkit.AdamW(unclipped.parameters(), lr=1e-2)
    fit(unclipped)
    assert not torch.allclose(weights(inside)[0], weights(unclipped)[0])


def resumed(module: type[pl.LightningModule], file: Any, options: Any = dict) -> pl.LightningModule:
    """Four epochs are two, a file, and two more in objects made anew; these are returned."""
    straight, first, second = module(), module(), module()
    whole = fit(straight, max_epochs=4, **options())
    fit(first, max_epochs=2, **options()).save_checkpoint(file)
    halfway = weights(first)
    torch.manual_seed(17)  # a resumed run finds torch's generator anywhere
    run = fit(second, max_epochs=4, ckpt_path=file, **options())
    assert run.current_epoch == 4 and not all(map(torch.equal, halfway, weights(second)))
    same(weights(second), weights(straight))
    states = [r.optimizers[0].state_dict()["state"] for r in (run, whole)]
    for held, wanted in zip(*(s.values() for s in states), strict=True):
        assert held.keys() == wanted.keys()
        for name, x in wanted.items():
            assert_equal(torch.as_tensor(held[name]), torch.as_tensor(x), name)
    return second


class Spiked(Automatic):
    def configure_optimizers(self):
        optimizer = gradkit.SPAM(self.parameters(), lr=1e-2, reset_every=7, warmup_after_reset=3, density=0.5)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


class CurvedWithoutDropout(Curved):
    def __init__(self):
        super().__init__(dropout=0.0)


def test_a_run_resumes_bitwise(tmp_path):
    """bf16 parameters with their float32 state, too."""
    resumed(Automatic, tmp_path / "it.ckpt", lambda: {"precision": "bf16-true"})
    resumed(Spiked, tmp_path / "it.ckpt", lambda: {"accumulate_grad_batches": 2})


def test_a_run_with_a_scaler_resumes_bitwise(tmp_path):
    resumed(Automatic, tmp_path / "it.ckpt", lambda: {"plugins": [scaling(init_scale=2.0**10, growth_interval=5)]})


def test_estimates_and_figures_resume_bitwise(tmp_path):
    resumed(CurvedWithoutDropout, tmp_path / "it.ckpt", lambda: {"callbacks": [SophiaHessian()]})


def test_orders_of_several_losses_resume_bitwise(tmp_path):
    assert resumed(Tasks, tmp_path / "it.ckpt").method.calls == 4 * BATCHES


# GradientTransforms


def clipped_by_hand(accumulate: int = 1, norm: float = 0.1) -> TorchAutomatic:
    """By value, then by norm, in front of torch's optimizer."""
    module = TorchAutomatic()
    (optimizer,), (config,) = module.configure_optimizers()
    for i, (x, y) in enumerate(data()):
        (F.cross_entropy(module(x), y) / accumulate).backward()
        if i % accumulate == accumulate - 1:
            torch.nn.utils.clip_grad_value_(module.parameters(), 0.02)
            torch.nn.utils.clip_grad_norm_(module.parameters(), norm)
            optimizer.step()
            optimizer.zero_grad()
            config["scheduler"].step()
    return module


@pytest.mark.filterwarnings("ignore:GradientTransforms. clip_by_value and the Trainer's")
@pytest.mark.parametrize("kind", ["closure", "accumulation", "scaler", "fused", "fused, scaler"])
def test_transforms_run_once_before_the_trainers_clip(kind):
    module, options = (
        TorchAutomatic(),
        {"gradient_clip_val": 0.1, "callbacks": [GradientTransforms(clip_by_value(0.02))]},
    )
    if kind == "accumulation":
        options["accumulate_grad_batches"] = 2
    if "scaler" in kind:
        plugin = scaling(init_scale=2.0**10)
        plugin.autocast_context_manager = lambda: torch.autocast("cpu", enabled=False)
        options["plugins"] = [plugin]
    if "fused" in kind:
        make = module.configure_optimizers
        (optimizer,), schedulers = make()
        fused = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.1, fused=True)
        schedulers[0]["scheduler"] = torch.optim.lr_scheduler.StepLR(fused, 2, 0.5)
        module.configure_optimizers = lambda: ([fused], schedulers)
    if kind == "fused, scaler":
        del options["gradient_clip_val"]  # which Lightning refuses there
    run = fit(module, **options)
    hand = clipped_by_hand(2 if kind == "accumulation" else 1, 0.1 if "gradient_clip_val" in options else 1e9)
    near(weights(module), weights(hand))
    (handle,) = options["callbacks"][0].handles
    assert handle.clock == run.global_step > 0
    if kind != "fused, scaler":
        assert (
            "before Lightning's own clip (gradient_clip_val=0.1): attached to AdamW"
            in options["callbacks"][0].explain()
        )


def test_transforms_run_once_with_manual_optimization():
    module, hand = TorchManual(), TorchManual()
    callback = GradientTransforms(clip_by_value(0.02))
    fit(module, callbacks=[callback])
    optimizer = hand.configure_optimizers()
    for i, (x, y) in enumerate(data()):
        (F.cross_entropy(hand.layers(x), y) / 2).backward()
        if i % 2:
            torch.nn.utils.clip_grad_norm_(hand.parameters(), 0.1)  # the script's own
            torch.nn.utils.clip_grad_value_(hand.parameters(), 0.02)
            optimizer.step()
            optimizer.zero_grad()
    near(weights(module), weights(hand))
    assert callback.handles[0].clock == BATCHES / 2


def test_a_run_behind_transforms_resumes_bitwise(tmp_path):
    """With slots, float32 ones of bf16 parameters too, and with numbers of a measure; state is in the checkpoint."""
    resumed(
        TorchAutomatic,
        tmp_path / "it.ckpt",
        lambda: {"callbacks": [GradientTransforms(grokfast_ema())], "precision": "bf16-true"},
    )
    resumed(
        TorchAutomatic,
        tmp_path / "it.ckpt",
        lambda: {
            "callbacks": [GradientTransforms(grokfast_ema(), zclip(warmup_steps=3))],
            "plugins": [scaling(init_scale=2.0**10)],
        },
    )
    (saved,) = torch.load(tmp_path / "it.ckpt", weights_only=True)["optimizer_states"]
    assert all("gradkit_grokfast_ema_grad_ema" in entry for entry in saved["state"].values())
    assert saved["param_groups"][0]["gradkit.grokfast_ema.clock"] == 2 * BATCHES


@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_does_not_reach_the_transforms(fused):
    module, callback = TorchManual(), GradientTransforms(grokfast_ema())
    module.configure_optimizers = lambda: torch.optim.AdamW(module.parameters(), fused=fused)
    module.clip_gradients = lambda *_: None
    plugin = scaling(init_scale=2.0**10, growth_factor=2.0**40, growth_interval=2, backoff_factor=2.0**-40)
    run = fit(module, plugins=[plugin], callbacks=[callback], max_epochs=2)
    (handle,) = callback.handles
    assert handle.clock == run.global_step - 2 == 4
    assert all(s["grad_ema"].isfinite().all() and s["grad_ema"].any() for s in handle.state.values())
    assert all(p.isfinite().all() for p in module.parameters())


def test_two_clips_are_named_once():
    for transform, words in ((clip_by_norm(1.0), "clip_by_norm"), (zclip(), "zclip"), (spike_clip(), "spike_clip")):
        with pytest.warns(
            UserWarning, match=f"GradientTransforms: {words} and the Trainer's gradient_clip_val"
        ) as told:
            fit(TorchAutomatic(), gradient_clip_val=0.1, callbacks=[GradientTransforms(transform)])
        assert len([w for w in told if "GradientTransforms" in str(w.message)]) == 1
    callback = GradientTransforms(grokfast_ema())  # no clip: nothing to say
    trainer().fit(TorchAutomatic(), data())
    fit(TorchAutomatic(), callbacks=[GradientTransforms(clip_by_norm(1.0))])
    with pytest.raises(RuntimeError, match="nothing is attached before"):
        callback.explain()


class Mixed(TorchManual):
    """One optimizer of torch and one of ours."""

    def configure_optimizers(self):
        self.plain = torch.optim.SGD(self.layers[0].parameters(), 0.1)
        return [self.plain, gradkit.Lion(self.layers[2].parameters())]


def test_what_cannot_be_attached_stops_before_training_and_leaves_nothing():
    module = Mixed()
    before, groups = weights(module), {*torch.optim.SGD(module.parameters(), 0.1).param_groups[0]}
    with pytest.raises(TypeError, match=r"Lion is gradkit's own, .* Lion\(\.\.\., transforms=\[\.\.\.\]\)"):
        fit(module, callbacks=[GradientTransforms(clip_by_norm(1.0))])
    assert not module.plain._optimizer_step_pre_hooks and {*module.plain.param_groups[0]} == groups
    with pytest.raises(ValueError, match=r"cautious\.agreement works at the stage UPDATE"):
        fit(TorchAutomatic(), callbacks=[GradientTransforms(cautious())])
    same(weights(module), before)
    with pytest.raises(TypeError, match="GradientTransforms: give at least one"):
        GradientTransforms()
    with pytest.raises(TypeError, match="GradientTransforms: .* is no chain or transform"):
        GradientTransforms(clip_by_norm)


def test_what_runs_now_does_not_run_again_in_the_coming_step():
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([p], 1.0)
    handle = gradkit.attach(optimizer, grokfast_ema(lamb=1.0))  # doubles what stays
    for step in (1, 2, 3):
        p.grad = torch.ones(2)
        if step == 1:
            handle.now()
            assert p.grad.tolist() == [2.0, 2.0]
        optimizer.step(handle.now if step == 2 else None)  # within a closure, as Lightning does
        assert p.tolist() == [-2.0 * step] * 2 and handle.clock == step
    handle.detach()
    with pytest.raises(RuntimeError, match="attached to SGD: it was detached; call gradkit.attach again"):
        handle.now()


def test_a_second_fit_goes_on_with_what_is_attached():
    module, callback = TorchAutomatic(), GradientTransforms(grokfast_ema())
    kept = torch.optim.SGD(module.parameters(), 0.1)
    module.configure_optimizers = lambda: kept
    for _ in range(2):
        fit(module, callbacks=[callback])
    assert callback.handles[0].clock == 2 * BATCHES
    fit(TorchAutomatic(), callbacks=[callback])
    assert callback.handles[0].clock == BATCHES and callback.handles[0].optimizer is not kept


class Staged(TorchManual):
    """Its second optimizer is the same in every fit, its first a new one."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = torch.optim.SGD(self.layers[2].parameters(), 0.1)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(F.cross_entropy(self.layers(batch[0]), batch[1]))
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        self.new = torch.optim.SGD(self.layers[0].parameters(), 0.1)
        return [self.new, self.kept]


def test_a_second_callback_for_the_same_optimizer_is_told_of_the_first():
    module, first, second = Staged(), *(GradientTransforms(zclip()) for _ in range(2))
    fit(module, callbacks=[first])
    before, kept = weights(module), handles(module.kept)
    match = r"attach: SGD has a 'zclip' already: call \.detach\(\) of its handle .*callback\.handles"
    with pytest.raises(ValueError, match=match):
        fit(module, callbacks=[second])
    same(weights(module), before)
    assert handles(module.kept) == kept == [first.handles[1]] and not second.handles
    assert not handles(module.new) and not any("gradkit" in key for key in module.new.param_groups[0])
    for handle in first.handles:
        handle.detach()
    fit(module, callbacks=[second])
    assert [handle.clock for handle in second.handles] == [BATCHES, BATCHES]


def test_a_copy_attaches_anew():
    """Also that of a whole Trainer, whose callbacks and optimizers are copies together."""
    module, callback = Staged(), GradientTransforms(grokfast_ema())
    run = fit(module, callbacks=[callback])
    alone, twin = copy.deepcopy(callback), copy.deepcopy(run)
    assert all(handle in handles(handle.optimizer) for handle in callback.handles)
    fit(Staged(), callbacks=[alone])
    assert [handle.clock for handle in alone.handles] == [BATCHES, BATCHES]
    (copied,) = (x for x in twin.callbacks if isinstance(x, GradientTransforms))
    other = twin.lightning_module
    assert copied.handles[1].optimizer is other.kept is not module.kept and not handles(other.kept)
    twin.fit_loop.max_epochs = 2
    twin.fit(other, data())
    assert [handles(optimizer) for optimizer in (other.new, other.kept)] == [[x] for x in copied.handles]
    assert all(s["grad_ema"].any() for handle in copied.handles for s in handle.state.values())


def test_a_handle_that_was_detached_is_replaced_at_the_next_fit():
    module, callback = Staged(), GradientTransforms(grokfast_ema())
    fit(module, callbacks=[callback])
    callback.handles[1].detach()
    fit(module, callbacks=[callback])
    assert [handle.clock for handle in callback.handles] == [BATCHES, BATCHES]


# OptimizerMonitor


def test_figures_of_the_counted_steps_reach_the_logger():
    module, seen = Clipping(), Seen()
    with patch.object(stats.Counted, "read", autospec=True, side_effect=stats.Counted.read) as read:
        run = fit(module, logger=seen, callbacks=[OptimizerMonitor(every=4)], max_epochs=2)
        assert read.call_count == 3, "the steps between must not wait"
    counted = {step for step, row in seen.rows.items() if any(name.startswith("AdamW") for name in row)}
    assert counted == {3, 7, 11} and set(seen.rows) == set(range(12)), "under the number of that batch's losses"
    row, mine = seen.rows[11], run.optimizers[0].stats()
    for name, figures in mine.items():
        assert name in dict(module.named_parameters())
        for figure, value in figures.items():
            assert row[f"AdamW/{figure}/{name}"] == value
        assert row[f"AdamW/update_to_weight/{name}"] == figures["update_norm"] / figures["weight_norm"]
        assert figures["clip_by_global_norm.clipped"] == 1.0
    whole = {n: torch.tensor([f[n] for f in mine.values()]).norm().item() for n in ("update_norm", "weight_norm")}
    assert row["AdamW/weight_norm"] == pytest.approx(whole["weight_norm"])
    assert row["AdamW/update_to_weight"] == pytest.approx(whole["update_norm"] / whole["weight_norm"])
    assert row["AdamW/grad_norm"] > 0.1


def test_of_torchs_optimizers_there_is_what_is_attached():
    seen = Seen()
    callbacks = [GradientTransforms(clip_by_value(0.02)), OptimizerMonitor(every=2)]
    fit(TorchAutomatic(), logger=seen, callbacks=callbacks, accumulate_grad_batches=2)
    counted = {step: row for step, row in seen.rows.items() if any(name.startswith("AdamW") for name in row)}
    assert {*counted} == {1}
    row = counted[1]
    assert 0 < row["AdamW/clip_by_value.clipped/layers.0.weight"] <= 1 and "AdamW/update_norm" not in row
    assert 0 < row["AdamW/norm_after"] < row["AdamW/grad_norm"]


class TwoOptimizers(Manual):
    """Two steps of one and one of the other for each batch, without names; one weight is 0."""

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        for optimizer in (first, second, first):
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self.layers(batch[0]), batch[1]))
            optimizer.step()

    def configure_optimizers(self):
        torch.nn.init.zeros_(self.layers[2].bias)
        ways = self.layers[0].parameters(), self.layers[2].parameters()
        return [gradkit.Lion(params, lr=lr) for params, lr in zip(ways, (1e-3, 0.0), strict=True)]


def test_two_optimizers_have_two_names_and_each_its_own_steps():
    seen = Seen()
    fit(TwoOptimizers(), logger=seen, callbacks=[OptimizerMonitor(every=3)])
    first, second = (
        {step for step, row in seen.rows.items() if any(n.startswith(label) for n in row)}
        for label in ("Lion/", "Lion-1/")
    )
    assert first == {1, 2, 4, 5} and second == {2, 5}, "the third step of the first is in the second batch"
    assert "Lion/grad_norm/layers.0.weight" in seen.rows[2] and "Lion-1/grad_norm/layers.2.bias" in seen.rows[2]
    assert "Lion-1/update_to_weight/layers.2.weight" in seen.rows[2]
    assert "Lion-1/update_to_weight/layers.2.bias" not in seen.rows[2], "its weight is 0"


def test_conflicts_reach_the_logger_beside_any_optimizer():
    seen = Seen()
    with patch.object(multiloss.Last, "conflict_rate", PropertyMock(side_effect=lambda: torch.tensor(0.5))) as asked:
        fit(Tasks(), logger=seen, callbacks=[OptimizerMonitor(every=2)])
    rates = {step: row["PCGrad/conflict_rate"] for step, row in seen.rows.items() if "PCGrad/conflict_rate" in row}
    assert rates == dict.fromkeys((1, 3, 5), 0.5)
    assert asked.call_count == 3


def test_a_monitor_with_nothing_to_log_stops_before_training():
    module = TorchAutomatic()
    before = weights(module)
    with pytest.raises(MisconfigurationException, match=r"torch's AdamW counts nothing; use an optimizer of gradkit"):
        fit(module, logger=Seen(), callbacks=[OptimizerMonitor()])
    with pytest.raises(MisconfigurationException, match=r"OptimizerMonitor: the Trainer has no logger"):
        fit(module, callbacks=[OptimizerMonitor()])
    same(weights(module), before)
    with pytest.raises(ValueError, match=r"OptimizerMonitor: every=0: give a whole number >= 1"):
        OptimizerMonitor(every=0)


@pytest.mark.parametrize("module", [Automatic, Tasks])
def test_a_run_too_short_for_the_monitor_is_named_once(module):
    with pytest.warns(
        UserWarning, match="OptimizerMonitor: nothing was logged.*every=7 counts; give a smaller"
    ) as told:
        fit(module(), logger=Seen(), callbacks=[OptimizerMonitor(every=BATCHES + 1)])
    assert len([w for w in told if "OptimizerMonitor" in str(w.message)]) == 1
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fit(module(), logger=Seen(), callbacks=[OptimizerMonitor(every=BATCHES - 1)])
        fit(module(), logger=Seen(), callbacks=[OptimizerMonitor()], fast_dev_run=True)  # which logs nothing anyway
    assert not [w for w in told if "OptimizerMonitor" in str(w.message)]


# SophiaHessian


def likeliest(logits: torch.Tensor, ignore_index: int, *, targets: torch.Tensor) -> torch.Tensor:
    """Labels that aren't drawn."""
    return logits.argmax(-1).masked_fill(targets == ignore_index, ignore_index)


def by_hand(accumulate: int = 1) -> tuple[Curved, gradkit.Sophia]:
    """The loop of Sophia's page."""
    module = Curved(dropout=0.0)
    optimizer = module.configure_optimizers()
    for i, (x, y) in enumerate(data()):
        if i % accumulate == 0:
            optimizer.zero_grad()
            if optimizer.hessian_due:
                logits = module(x)
                labels = likeliest(logits, -100, targets=y)
                F.cross_entropy(logits, labels).backward()
                optimizer.update_hessian(batch_size=int((labels != -100).sum()))
                optimizer.zero_grad()
        (F.cross_entropy(module(x), y) / accumulate).backward()
        if i % accumulate == accumulate - 1:
            optimizer.step()
    return module, optimizer


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"plugins": "scaler"}], ids=str)
def test_estimates_are_those_of_the_loop_by_hand(options):
    if "plugins" in options:  # of float32 all the same, so that only the factor is new
        plugin = scaling(init_scale=2.0**10)
        options = {"plugins": [plugin]}
        plugin.autocast_context_manager = lambda: torch.autocast("cpu", enabled=False)
    module = Curved(dropout=0.0)
    with patch.object(curvature, "gnb_labels", likeliest):
        run = fit(module, callbacks=[SophiaHessian()], **options)
    hand, optimizer = by_hand(options.get("accumulate_grad_batches", 1))
    near(weights(module), weights(hand), 1e-6)
    for p, q in zip(module.parameters(), hand.parameters(), strict=True):
        h = run.optimizers[0].state[p]["hessian"]
        assert h.any()
        torch.testing.assert_close(h, optimizer.state[q]["hessian"])


def test_an_estimate_after_an_overflow_comes_with_the_repeated_step():
    plugin = scaling(init_scale=2.0**60, backoff_factor=2.0**-50)
    run = fit(Curved(dropout=0.0, hessian_every=1000), plugins=[plugin], callbacks=[SophiaHessian()])
    assert plugin.scaler.get_scale() == 2.0**10
    assert all(s["hessian"].isfinite().all() and s["hessian"].any() for s in run.optimizers[0].state.values())


class Probe(pl.Callback):
    """In front of the estimates, and behind: what they may not touch."""

    def __init__(self) -> None:
        self.seen: list[tuple[torch.Tensor, list[Any]]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.seen.append((torch.get_rng_state(), [p.grad for p in pl_module.parameters()]))


def test_estimates_leave_gradients_and_random_numbers_alone_and_follow_from_seed_and_step():
    drawn = []
    for outside, seed in ((1, 0), (2, 0), (2, 1)):
        module, probes, labels = Curved(seed=seed), [Probe(), Probe()], []
        torch.manual_seed(outside)

        def logits(module: Any, batch: Any, labels: list = labels) -> Any:
            labels.append(torch.rand(8))
            return module(batch[0]), batch[1]

        fit(module, callbacks=[probes[0], SophiaHessian(logits), probes[1]])
        for (before, held), (after, now) in zip(*(probe.seen for probe in probes), strict=True):
            assert torch.equal(before, after)
            assert all(a is b for a, b in zip(held, now, strict=True))
        assert any(g is not None for g in held)
        drawn.append(labels)
    assert len(drawn[0]) == 3
    same(drawn[0], drawn[1])
    assert not torch.equal(drawn[0][0], drawn[2][0]) and not torch.equal(drawn[0][0], drawn[0][1])


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
@pytest.mark.parametrize("callback", [GradientTransforms(zclip()), OptimizerMonitor(), SophiaHessian()])
def test_a_module_without_an_optimizer_is_told(callback):
    class Without(TorchAutomatic):
        def configure_optimizers(self):
            return None

    with pytest.raises(MisconfigurationException, match=f"{type(callback).__name__}: configure_optimizers returned no"):
        fit(Without(), logger=Seen(), callbacks=[callback])


def test_a_clip_of_ones_own_may_replace_gradients():
    class Own(TorchAutomatic):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            for p in self.parameters():
                p.grad = p.grad * 1.0

    plain, own = TorchAutomatic(), Own()
    for module in (plain, own):
        transforms = GradientTransforms(grokfast_ema())
        fit(module, callbacks=[transforms])
        assert transforms.handles[0].clock == BATCHES
    near(weights(own), weights(plain), 0.0)


def test_a_batch_without_labels_gives_no_estimate():
    module = Curved()
    run = fit(module, batch(torch.randn(2, 4), torch.full((2,), -100)), callbacks=[SophiaHessian()])
    assert not any(s["hessian"].any() for s in run.optimizers[0].state.values())


def test_estimates_for_what_takes_none_stop_before_training():
    with pytest.raises(MisconfigurationException, match=r"SophiaHessian: gradkit's AdamW takes no estimates; return"):
        fit(Automatic(), callbacks=[SophiaHessian()])
    with pytest.raises(TypeError, match=r"SophiaHessian: a batch is no pair \(x, y\); give SophiaHessian\(lambda"):
        fit(Curved(), batch(torch.randn(2, 4)), callbacks=[SophiaHessian()])
    with pytest.raises(TypeError, match="SophiaHessian: logits=4: give a function"):
        SophiaHessian(4)
    with pytest.raises(TypeError, match=r"SophiaHessian: logits= returned a Tensor .*: .* pair \(logits, labels\)"):
        fit(Curved(), callbacks=[SophiaHessian(lambda module, batch: module(batch[0]))])


# MultiLoss


def tasks_by_hand(accumulate: int = 1) -> Tasks:
    module = Tasks()
    optimizer = module.configure_optimizers()
    for i, batch in enumerate(data()):
        gradkit.backward([loss / accumulate for loss in module.each(batch)], optimizer, module.method)
        if i % accumulate == accumulate - 1:
            optimizer.step()
            optimizer.zero_grad()
    return module


@pytest.mark.parametrize("kind", ["automatic", "accumulation", "manual", "scaler"])
def test_several_losses_are_combined_as_by_hand(kind):
    module = ManualTasks() if kind == "manual" else Tasks()
    options: dict[str, Any] = {"accumulate_grad_batches": 2} if kind == "accumulation" else {}
    if kind == "scaler":
        plugin = scaling(init_scale=2.0**10)
        plugin.autocast_context_manager = lambda: torch.autocast("cpu", enabled=False)
        options["plugins"] = [plugin]
    fit(module, **options)
    hand = tasks_by_hand(2 if kind in ("accumulation", "manual") else 1)
    same(weights(module), weights(hand))
    assert module.method.calls == BATCHES and moved(module)
    plain = Tasks()
    plain.losses = lambda *losses: sum(losses)
    plain.backward = lambda loss: loss.backward()
    fit(plain, **options)
    assert not torch.allclose(weights(plain)[0], weights(hand)[0], rtol=1e-3)


def test_an_overflow_of_one_task_skips_the_step():
    module = Tasks()
    plugin = scaling(init_scale=2.0**10, backoff_factor=0.5)
    each, after = module.each, []
    module.each = lambda batch: [x * (float("inf") if len(after) == k == 1 else 1) for k, x in enumerate(each(batch))]

    class Snap(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            after.append(weights(module))

    fit(module, plugins=[plugin], callbacks=[Snap()])
    same(after[0], after[1])
    assert not torch.equal(after[1][0], after[2][0]) and plugin.scaler.get_scale() == 2.0**9


def test_the_logged_loss_is_the_sum():
    module, batch = Tasks(), next(iter(data()))
    each = module.each(batch)
    assert torch.equal(module.losses(*each).detach(), sum(each).detach())
    with torch.no_grad():
        assert not module.losses(*module.each(batch)).requires_grad


def test_shared_parameters_are_the_users():
    module, hand = Tasks(), Tasks()
    module.shared_parameters = lambda: [module.trunk.weight]
    batch = next(iter(data()))
    module.backward(module.losses(*module.each(batch)))
    gradkit.backward(hand.each(batch), hand.parameters(), hand.method, shared=[hand.trunk.weight])
    same([p.grad for p in module.parameters()], [p.grad for p in hand.parameters()])
    default = Tasks()
    default.backward(default.losses(*default.each(batch)))
    assert not torch.equal(default.trunk.bias.grad, module.trunk.bias.grad)


def test_one_loss_is_an_ordinary_one():
    module, hand = Tasks(), Tasks()
    batch = next(iter(data()))
    module.backward(module.losses(module.each(batch)[0]) * 3)
    (hand.each(batch)[0] * 3).backward()
    assert module.heads[1].weight.grad is None and module.method.calls == 0
    same([module.trunk.weight.grad, module.heads[0].bias.grad], [hand.trunk.weight.grad, hand.heads[0].bias.grad])


def test_what_several_losses_cannot_be_is_said_before_any_gradient():
    module, batch = Tasks(), next(iter(data()))
    each = module.each(batch)
    penalty = module.trunk.weight.square().sum()
    wrong: list[tuple[str, Any]] = [
        ("RuntimeError: MultiLoss: a loss that is more, or other, than", lambda: module.backward(sum(each))),
        ("RuntimeError: MultiLoss: a loss that is more", lambda: module.backward(module.losses(*each) + penalty)),
        ("RuntimeError: MultiLoss: a backward that knows nothing", lambda: module.losses(*each).backward()),
        ("TypeError: MultiLoss: backward got", lambda: module.backward(module.losses(*each), retain_graph=True)),
        ("ValueError: MultiLoss.losses: give the loss of each", lambda: module.losses()),
        ("TypeError: MultiLoss.losses: give the losses one by one: self.losses(a, b)", lambda: module.losses(each)),
        ("TypeError: MultiLoss.losses: losses[0]=1.0: give the tensor", lambda: module.losses(1.0)),
        ("ValueError: MultiLoss.losses: losses[1] has", lambda: module.losses(each[0], torch.ones(2))),
    ]
    for words, call in wrong:
        assert said(call).startswith(words)
    assert all(p.grad is None for p in module.parameters())
    loss = module.losses(*each)
    module.backward(loss)
    with pytest.raises(RuntimeError, match="this loss has gone backward already"):
        module.backward(loss)
    module.method = None
    with pytest.raises(TypeError, match=r"self\.method=None: set it in __init__"):
        module.losses(*each)


def test_a_users_own_hooks_are_kept():
    """Those of a base class behind the mixin, with what it saves."""

    class Base(pl.LightningModule):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["mine"] = 1

    class Net(MultiLoss, Base):
        method = multiloss.PCGrad()

    checkpoint: dict[str, Any] = {}
    Net().on_save_checkpoint(checkpoint)
    assert checkpoint == {"mine": 1, "gradkit.method": {"calls": 0}}


# The package


def test_without_lightning_the_import_says_what_to_install():
    with patch.dict(sys.modules, {"lightning": None}):
        del sys.modules["gradkit.integrations.lightning"]
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'gradkit\[lightning\]'"):
            importlib.import_module("gradkit.integrations.lightning")
