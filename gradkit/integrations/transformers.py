"""gradkit in transformers' Trainer: transforms for any optimizer, figures of a step to its logs, Sophia's estimates.

gradkit's optimizers need nothing of this: give one to `Trainer(optimizers=(optimizer, None))`. Callbacks of the same
names for Lightning's Trainer are in `gradkit.integrations.lightning`.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..attach import Attached, attach, handles
from ..chain import Chain
from ..machine import checked_chain
from ..optim.sophia import Sophia
from ..optimizer import Optimizer
from ..options import STEPS, brief, check_number
from ..sharding import refuse_sharded
from .curvature import estimate
from .figures import Seen, by_name, clips, of_whom, overall, too_short

try:
    from accelerate.optimizer import AcceleratedOptimizer
    from transformers import TrainerCallback
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"gradkit.integrations.transformers: there is no module {error.name!r}; pip install 'gradkit[transformers]'",
        name=error.name,
    ) from error

__all__ = ["GradientTransforms", "OptimizerMonitor", "SophiaHessian", "next_tokens"]

LogitsOf = Callable[[nn.Module, Mapping[str, Any]], tuple[Tensor, Tensor | None]]


def unwrapped(optimizer: Any) -> Any:
    """The optimizer that accelerate has wrapped."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def attached(optimizer: Any) -> list[Attached]:
    """What is in front of an optimizer; DeepSpeed's, of which nothing is known, is none of torch's."""
    return handles(optimizer) if isinstance(optimizer, torch.optim.Optimizer) else []


class GradientTransforms(TrainerCallback):
    """For transformers' Trainer: `gradkit.attach` on whatever optimizer it has, when it is there.

        Trainer(..., callbacks=[GradientTransforms(zclip())])

    The transforms rewrite `p.grad` once a step, behind accumulation and **behind Trainer's own clip**:
    `max_grad_norm`, 1.0 unless you say 0.0. Their state is in the checkpoint, with the optimizer's. gradkit's own
    optimizers take `transforms=[...]` instead.
    """

    def __init__(self, *transforms: Chain) -> None:
        if not transforms:
            raise TypeError("GradientTransforms: give at least one, e.g. GradientTransforms(clip_by_global_norm(1.0))")
        self.transforms = tuple(checked_chain("GradientTransforms", x) for x in transforms)
        self.handle: Attached | None = None
        self._max_grad_norm = 0.0

    def on_init_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if given.get("optimizer") is not None:  # of Trainer(optimizers=...): before its state is loaded
            self._attach(args, given["optimizer"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self._attach(args, given["optimizer"])

    def _attach(self, args: Any, wrapped: Any) -> None:
        optimizer, self._max_grad_norm = unwrapped(wrapped), args.max_grad_norm or 0.0
        mine = [x for x in attached(optimizer) if x.transforms == self.transforms]
        self.handle = mine[0] if mine else attach(optimizer, *self.transforms)
        both = clips(self.transforms)
        if both and not mine and self._max_grad_norm > 0 and args.process_index == 0:
            warnings.warn(
                f"GradientTransforms: Trainer's max_grad_norm={self._max_grad_norm} and {', '.join(both)} both clip, "
                f"in this order; give TrainingArguments(max_grad_norm=0.0), or leave the transform out",
                stacklevel=2,
            )

    def explain(self) -> str:
        """What runs: as `handle.explain()`."""
        if self.handle is None:
            raise RuntimeError("GradientTransforms.explain: nothing is attached before trainer.train()")
        behind = f"behind Trainer's own clip (max_grad_norm={self._max_grad_norm}): " if self._max_grad_norm else ""
        return behind + self.handle.explain()


class OptimizerMonitor(TrainerCallback):
    """For transformers' Trainer: what a step did, to its logs.

        monitor = OptimizerMonitor(every=100)
        trainer = Trainer(..., callbacks=[monitor])
        monitor.log = trainer.log

    These are `opt.stats` of gradkit's optimizers, over all parameters: `<class>/<figure>`; `update_to_weight` is
    update_norm / weight_norm. `monitor.last` has each parameter's, by name.
    An optimizer of others has the figures of what is attached to it (`GradientTransforms`), and no `update_norm`;
    where there is nothing to count, training doesn't start.

    every: steps from one count to the next; the steps between wait for nothing.
    log: `trainer.log`, which reaches TensorBoard and other reporters; None: `trainer.state.log_history` alone.
    """

    def __init__(self, every: int = 100, log: Callable[[dict[str, float]], None] | None = None) -> None:
        check_number("OptimizerMonitor", "every", every, STEPS)
        if log is not None and not callable(log):
            raise TypeError(f"OptimizerMonitor: log={brief(log)}: give a function, e.g. trainer.log")
        self.every, self.log = int(every), log
        self.last: Seen = {}
        self._counting: list[Optimizer | Attached] = []
        self._read = 0.0  # the clock at which figures were last looked for
        self._logged = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self._counting, self._read, self._logged = [], 0.0, False
        if self.log is None and args.report_to and args.process_index == 0:
            warnings.warn(
                f"OptimizerMonitor: {', '.join(args.report_to)} won't see its figures, which go to "
                f"trainer.state.log_history; set monitor.log = trainer.log",
                stacklevel=2,
            )

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if self._counting:  # not at the beginning: what is attached by a callback behind this one would be missed
            return
        optimizer = unwrapped(given["optimizer"])
        self._counting = [optimizer] if isinstance(optimizer, Optimizer) else [*attached(optimizer)]
        if not self._counting:
            raise TypeError(
                f"OptimizerMonitor: {of_whom(optimizer)} counts nothing; use an optimizer of gradkit, or "
                f"GradientTransforms"
            )
        for counting in self._counting:
            counting.stats(every=self.every)

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        before, self._read = self._read, self._counting[0].clock
        if self._read // self.every <= before // self.every:
            return
        seen: Seen = {}
        for counting in self._counting:
            for name, mine in by_name(counting, given["model"]).items():
                came = seen.get(name, mine)["grad_norm"]  # to the first of several
                seen[name] = {**seen.get(name, {}), **mine, "grad_norm": came}
        if not seen:  # the first step of a resumed run may lie behind one that counted
            return
        self._logged = True
        self.last, label = seen, type(unwrapped(given["optimizer"])).__name__
        found = {f"{label}/{figure}": value for figure, value in overall(seen, given["model"]).items()}
        if self.log is None:
            state.log_history.append({**found, "step": state.global_step})
            return
        asked = control.should_log  # which logging clears
        self.log(found)
        control.should_log = asked

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if self._counting and not self._logged and args.process_index == 0:  # there was a step
            warnings.warn(too_short(self.every), stacklevel=2)


def next_tokens(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """A causal language model's logits, and the labels that they are to predict: at each position the next."""
    if "labels" not in inputs:
        raise ValueError(
            "SophiaHessian: the model was called without labels, as Trainer does with label_smoothing_factor= and "
            "compute_loss_func=: give SophiaHessian(lambda model, inputs: (model(**inputs).logits, None)), where every "
            "position counts"
        )
    asked = {name: value for name, value in inputs.items() if name not in ("labels", "num_items_in_batch")}
    return model(**asked).logits[:, :-1], inputs["labels"][:, 1:]


class SophiaHessian(TrainerCallback):
    """For transformers' Trainer: gives `gradkit.Sophia` its estimates.

    That is one more pass in front of every `hessian_every`-th step, over its last micro-batch, of all ranks, with
    labels drawn from the model's own softmax. What is drawn, dropout included, follows from the optimizer's seed, the
    step and the rank; `p.grad` and the random numbers of the training are left as they are.

    logits: a function (model, arguments of its forward) -> (logits [..., classes], the labels of the data [...] or
        None); None: `next_tokens`, for a causal language model. It may take a part of the batch.
    ignore_index: labels of the data that don't count.
    """

    def __init__(self, logits: LogitsOf | None = None, *, ignore_index: int = -100) -> None:
        if logits is not None and not callable(logits):
            raise TypeError(f"SophiaHessian: logits={brief(logits)}: give a function of (model, inputs)")
        self.logits, self.ignore_index = logits, ignore_index
        self._inputs: Mapping[str, Any] | None = None
        self._hook: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        sophia, model = unwrapped(given["optimizer"]), given["model"]
        if not isinstance(sophia, Sophia):
            raise TypeError(
                f"SophiaHessian: {of_whom(sophia)} takes no estimates; give Trainer gradkit.Sophia, or leave this "
                f"callback out"
            )
        if self.logits is None and "ForCausalLM" not in type(model).__name__:  # so transformers finds a model's loss
            raise ValueError(
                f"SophiaHessian: {type(model).__name__} may predict something else than the next token; give "
                f"SophiaHessian(lambda model, inputs: (logits, labels)), or SophiaHessian(next_tokens) if it doesn't"
            )
        if args.n_gpu > 1:
            raise RuntimeError("SophiaHessian: DataParallel is not supported; start a process for each GPU (torchrun)")
        for p in (p for group in sophia.param_groups for p in group["params"]):
            refuse_sharded("SophiaHessian", p)
        self.on_train_end()  # of a run that was broken off

        def keep(module: nn.Module, positional: tuple[Any, ...], inputs: Mapping[str, Any]) -> None:
            if module is model and sophia.hessian_due:  # a copy of the model has a copy of the hook
                self._inputs = inputs

        self._hook = model.register_forward_pre_hook(keep, with_kwargs=True)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        model, wrapped = given["model"], given["optimizer"]
        sophia, inputs, self._inputs = unwrapped(wrapped), self._inputs, None
        if not sophia.hessian_due:
            return
        if inputs is None:
            raise RuntimeError("SophiaHessian: Trainer's model was not called in this step; let compute_loss call it")
        scaler = getattr(wrapped, "scaler", None)
        factor = 1.0 if scaler is None else scaler.get_scale()  # the scaler itself has done with this step's gradients
        logits = self.logits or next_tokens
        estimate(sophia, lambda: logits(model, inputs), args.device, factor, self.ignore_index)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = self._inputs = None
