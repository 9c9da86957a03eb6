"""gradkit in Lightning's Trainer: transforms for any optimizer, statistics, Sophia's estimates, several losses.

gradkit's optimizers need nothing of this: return one from `configure_optimizers`. For the package `lightning`;
callbacks of the same names for transformers' Trainer are in `gradkit.integrations.transformers`.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..attach import Attached, attach, handles
from ..chain import Chain
from ..graph import check_loss
from ..machine import checked_chain
from ..multiloss import Method, backward
from ..optim.sophia import Sophia
from ..optimizer import Optimizer
from ..options import STEPS, brief, check_number
from ..sharding import refuse_sharded
from .curvature import estimate
from .figures import by_name, clips, of_whom, overall, too_short

try:
    import lightning.pytorch as pl
    from lightning.pytorch.loggers.logger import DummyLogger
    from lightning.pytorch.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.utilities.rank_zero import rank_zero_warn
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"gradkit.integrations.lightning: there is no module {error.name!r}; pip install 'gradkit[lightning]'",
        name=error.name,
    ) from error

__all__ = ["GradientTransforms", "MultiLoss", "OptimizerMonitor", "SophiaHessian"]

LogitsOf = Callable[[pl.LightningModule, Any], tuple[Tensor, Tensor | None]]


def configured(who: str, trainer: pl.Trainer) -> list[Any]:
    """The module's optimizers; Lightning's stand-in for none has no groups."""
    if not (found := [opt for opt in trainer.optimizers if opt.param_groups]):
        raise MisconfigurationException(f"{who}: configure_optimizers returned no optimizer")
    return found


class GradientTransforms(pl.Callback):
    """For Lightning's Trainer: `gradkit.attach` on whatever optimizers the module configures.

        Trainer(callbacks=[GradientTransforms(zclip())])

    The transforms rewrite `p.grad` once a step: behind accumulation and the scaler's unscaling, before Lightning's
    own clip (`gradient_clip_val`). Their state is in the checkpoint, with the optimizer's. gradkit's own optimizers
    take `transforms=[...]` instead.
    """

    def __init__(self, *transforms: Chain) -> None:
        if not transforms:
            raise TypeError("GradientTransforms: give at least one, e.g. GradientTransforms(clip_by_global_norm(1.0))")
        self.transforms = [checked_chain("GradientTransforms", x) for x in transforms]
        self.handles: list[Attached] = []
        self._clip_val: float | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Behind configure_optimizers, in front of the loading of their states.
        made: list[Attached] = []
        optimizers = configured("GradientTransforms", trainer)
        # Of a fit before, with the same optimizer. A copy of this callback has handles that are detached.
        held = {id(handle.optimizer): handle for handle in self.handles if handle in handles(handle.optimizer)}
        try:
            for opt in optimizers:
                if id(opt) not in held:
                    made.append(attach(opt, *self.transforms))
        except Exception:
            for handle in made:
                handle.detach()
            raise
        kept = [held[id(opt)] for opt in optimizers if id(opt) in held]
        self.handles, self._clip_val = [*kept, *made], trainer.gradient_clip_val
        if self._clip_val and (both := clips(self.transforms)):
            rank_zero_warn(
                f"GradientTransforms: {', '.join(both)} and the Trainer's gradient_clip_val={self._clip_val} both "
                f"clip, in this order; leave one of them out"
            )

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and scaler.is_enabled() and not unscaled(scaler, optimizer):
            return  # no step follows, or it unscales by itself, which is left to the hook in front of it
        for handle in self.handles:
            if handle.optimizer is optimizer:
                handle.now()

    def explain(self) -> str:
        """What runs, for each optimizer: as `handle.explain()`."""
        if not self.handles:
            raise RuntimeError("GradientTransforms.explain: nothing is attached before trainer.fit()")
        where = f"before Lightning's own clip (gradient_clip_val={self._clip_val}): "
        return "\n".join(where + handle.explain() for handle in self.handles)


def unscaled(scaler: Any, optimizer: torch.optim.Optimizer) -> bool:
    """Whether a scaler has unscaled this step's gradients, and found them finite: the wait that it has by itself."""
    found = scaler._per_optimizer_states.get(id(optimizer), {}).get("found_inf_per_device")
    return bool(found) and not sum(x.item() for x in found.values())


class OptimizerMonitor(pl.Callback):
    """For Lightning's Trainer: what a step did, to its loggers.

    These are `opt.stats` of gradkit's optimizers, and how often several losses conflict. For each optimizer
    `<class>/<figure>/<parameter>`, and `<class>/<figure>` of all parameters together; `update_to_weight` is
    update_norm / weight_norm. Of a `MultiLoss` module `<method>/conflict_rate`.
    An optimizer of others has the figures of what is attached to it (`GradientTransforms`), and no `update_norm`;
    where there is nothing to log, training doesn't start.

    every: steps from one count to the next; the steps between wait for nothing.
    """

    def __init__(self, every: int = 100) -> None:
        check_number("OptimizerMonitor", "every", every, STEPS)
        self.every = int(every)
        self._counting: dict[str, Optimizer | Attached] = {}
        self._read: dict[str, float] = {}  # the clock at which figures were last read
        self._logged = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.loggers:
            raise MisconfigurationException("OptimizerMonitor: the Trainer has no logger; give it one, or True")
        self._counting, self._logged = {}, False
        for opt in trainer.optimizers:
            for counting in [opt] if isinstance(opt, Optimizer) else handles(opt):
                name = type(opt).__name__
                same = sum(known.partition("-")[0] == name for known in self._counting)
                self._counting[f"{name}-{same}" if same else name] = counting
        if not self._counting and not isinstance(pl_module, MultiLoss):
            raise MisconfigurationException(
                f"OptimizerMonitor: {of_whom(*configured('OptimizerMonitor', trainer))} counts nothing; use an "
                f"optimizer of gradkit, or GradientTransforms"
            )
        for counting in self._counting.values():
            counting.stats(every=self.every)
        self._read = dict.fromkeys(self._counting, 0.0) | {"losses": trainer.global_step}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer.is_global_zero:
            return
        found: dict[str, float] = {}
        for of, counting in self._counting.items():
            if self._due(of, counting.clock):
                found |= figures(of, counting, pl_module)
        if isinstance(pl_module, MultiLoss) and self._due("losses", trainer.global_step):
            method = pl_module.method
            if method is not None and method.last is not None:
                found[f"{type(method).__name__}/conflict_rate"] = method.last.conflict_rate.item()
        if found:
            self._logged = True
            for logger in trainer.loggers:
                # What self.log has of this batch goes under the same number, which no property gives.
                logger.log_metrics(found, step=trainer.fit_loop.epoch_loop._batches_that_stepped)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._logged and not all(isinstance(x, DummyLogger) for x in trainer.loggers):  # of fast_dev_run
            rank_zero_warn(too_short(self.every))

    def _due(self, of: str, clock: float) -> bool:
        """Whether a step has counted since the last time; several may lie in one batch."""
        before, self._read[of] = self._read[of], clock
        return clock // self.every > before // self.every


def figures(of: str, counting: Optimizer | Attached, module: torch.nn.Module) -> dict[str, float]:
    """The last counted step, by name in a logger."""
    seen = by_name(counting, module)
    out = {f"{of}/{figure}/{name}": value for name, mine in seen.items() for figure, value in mine.items()}
    return out | {f"{of}/{figure}": value for figure, value in overall(seen, module).items()}


def of_pair(module: pl.LightningModule, batch: Any) -> tuple[Tensor, Tensor | None]:
    """Logits and labels, where a batch is (x, y) and the module's forward gives the logits of x."""
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise TypeError(
            "SophiaHessian: a batch is no pair (x, y); give SophiaHessian(lambda module, batch: (logits, labels))"
        )
    return module(batch[0]), batch[1]


class SophiaHessian(pl.Callback):
    """For Lightning's Trainer: gives `gradkit.Sophia` its estimates.

    That is one more pass in front of every `hessian_every`-th step, over all ranks, with labels drawn from the model's
    own softmax. What is drawn, dropout included, follows from the optimizer's seed, the step and the rank; `p.grad`
    and the random numbers of the training are left as they are.

    logits: a function (module, batch) -> (logits [..., classes], the labels of the data [...] or None), of a part of
        the batch if you like; None: `module(x)` and y of a batch (x, y).
    ignore_index: labels of the data that don't count.
    """

    def __init__(self, logits: LogitsOf | None = None, *, ignore_index: int = -100) -> None:
        if logits is not None and not callable(logits):
            raise TypeError(f"SophiaHessian: logits={brief(logits)}: give a function of (module, batch), or None")
        self.logits, self.ignore_index = logits or of_pair, ignore_index
        self._step = -1

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        optimizers = configured("SophiaHessian", trainer)
        found = [opt for opt in optimizers if isinstance(opt, Sophia)]
        if not found:
            raise MisconfigurationException(
                f"SophiaHessian: {of_whom(*optimizers)} takes no estimates; return gradkit.Sophia from "
                f"configure_optimizers, or leave this callback out"
            )
        for p in (p for opt in found for group in opt.param_groups for p in group["params"]):
            refuse_sharded("SophiaHessian", p)
        self._step = -1

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:  # a further micro-batch
            return
        self._step = trainer.global_step
        for opt in trainer.optimizers:
            if isinstance(opt, Sophia) and opt.hessian_due:
                self.estimate(trainer, pl_module, opt, batch)

    def estimate(self, trainer: pl.Trainer, module: pl.LightningModule, opt: Sophia, batch: Any) -> None:
        """Let one estimate into the optimizer's state."""

        def predict() -> tuple[Tensor, Tensor | None]:
            with trainer.precision_plugin.train_step_context():
                return self.logits(module, batch)

        scaler = getattr(trainer.precision_plugin, "scaler", None)
        factor = 1.0 if scaler is None else scaler.get_scale()
        estimate(opt, predict, module.device, factor, self.ignore_index)


class MultiLoss(pl.LightningModule):
    """A module whose `training_step` returns `self.losses(one, two)`: its method combines their gradients.

        class Net(MultiLoss, LightningModule):
            def __init__(self):
                super().__init__()
                self.method = gradkit.multiloss.PCGrad()

    As `gradkit.backward` does, with the Trainer's accumulation, scaler and ranks. The checkpoint holds the method's
    state; your own `on_save_checkpoint` and `on_load_checkpoint` have to call super().

    method: `gradkit.multiloss.PCGrad()` or `CAGrad()`.
    """

    method: Method | None = None

    def losses(self, *losses: Tensor) -> Tensor:
        """Their sum, from which `backward` makes the gradient of each; one alone is an ordinary loss.

        It may be scaled (`self.losses(one, two) / 2`), but what is added to it has to be one of the losses.
        """
        if not losses:
            raise ValueError("MultiLoss.losses: give the loss of each task: self.losses(one, two)")
        if {list, tuple} & {type(loss) for loss in losses}:
            raise TypeError("MultiLoss.losses: give the losses one by one: self.losses(a, b)")
        for i, loss in enumerate(losses):
            check_loss("MultiLoss.losses", f"losses[{i}]", loss)
        if not isinstance(self.method, Method):
            raise TypeError(
                f"MultiLoss: self.method={brief(self.method)}: set it in __init__: "
                f"self.method = gradkit.multiloss.PCGrad() or CAGrad()"
            )
        if not torch.is_grad_enabled():
            return sum_of(losses)
        return Joined.apply(losses[0].new_zeros((), requires_grad=True), *losses)

    def shared_parameters(self) -> Iterable[Any] | None:
        """The parameters to combine; None: those that two losses or more reach. To be overridden."""
        return None

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """For the Trainer, and for `self.manual_backward`."""
        joined = behind(loss)
        if joined is None:
            raise RuntimeError(
                "MultiLoss: a loss that is more, or other, than self.losses(...): give each term to self.losses(); "
                "a loss without others is self.losses(loss)"
            )
        if not joined.losses:
            raise RuntimeError("MultiLoss: this loss has gone backward already, and its graphs are freed")
        joined.allowed = True
        if len(joined.losses) == 1:
            super().backward(loss, *args, **kwargs)
            return
        if args or kwargs:
            raise TypeError(
                f"MultiLoss: backward got {brief((*args, *kwargs))}: graphs are freed, and gradients have none; "
                f"call self.manual_backward(loss)"
            )
        (factor,) = torch.autograd.grad(loss, joined.start)  # of the scaler, of accumulation and of the user
        losses, joined.losses = joined.losses, ()
        assert self.method is not None
        backward([one * factor for one in losses], self.parameters(), self.method, shared=self.shared_parameters())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.method is not None:
            checkpoint["gradkit.method"] = self.method.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if self.method is not None and "gradkit.method" in checkpoint:
            self.method.load_state_dict(checkpoint["gradkit.method"])


def sum_of(losses: Iterable[Tensor]) -> Tensor:
    total: Any = sum(loss.reshape(()) for loss in losses)
    return total


class Joined(torch.autograd.Function):
    """A sum whose node knows the terms, and a start: the gradient there is the factor of what was made of the sum."""

    @staticmethod
    def forward(ctx: Any, start: Tensor, *losses: Tensor) -> Tensor:
        ctx.start, ctx.losses, ctx.allowed = start, losses, False
        return sum_of(losses)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        if not ctx.allowed:
            raise RuntimeError(
                "MultiLoss: a backward that knows nothing of the method, which would take the plain sum: in "
                "training_step call self.manual_backward(loss); strategies with a backward of their own are not "
                "supported"
            )
        return grad, *(grad.reshape(loss.shape) for loss in ctx.losses)


def behind(loss: Tensor) -> Any:
    """The node of the sum that this loss is, times a factor; None if it is anything else."""
    node, at = loss.grad_fn, loss.output_nr
    while node is not None and not hasattr(node, "losses"):
        following = [x for x in node.next_functions if x[0] is not None]
        if type(node).__name__ == "_DDPSinkBackward":  # DDP's, of all that training_step returns, unchanged
            following = [node.next_functions[at]]
        if len(following) != 1:
            return None
        node, at = following[0]
    return node
