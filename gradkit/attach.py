"""Transforms in front of any torch.optim.Optimizer: hooks of its step, its state dict and its loading."""

import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import carrying
from .carrying import IN_GROUP, Loaded, label
from .chain import Chain, Placed, chain, distinct
from .machine import Machine, check_dtype, checked_chain
from .optimizer import Optimizer
from .options import IN_GROUPS, brief, builtin
from .transform import Stage, rule


@rule
def unscale(u, inverse_scale):
    return u * inverse_scale


UNSCALE = chain(unscale)


def attach(optimizer: torch.optim.Optimizer, *transforms: Chain) -> "Attached":
    """Put transforms of the gradient in front of any `torch.optim.Optimizer`, in order; returns a handle.

        handle = gradkit.attach(optimizer, clip_by_global_norm(1.0))

    Each `optimizer.step()` first rewrites `p.grad`, in place and in one pass: that is what the optimizer reads. With a
    closure that happens behind it. Arguments stand in `optimizer.param_groups[0]` as `"gradkit.<link>.<argument>"`,
    where schedules may edit them and other groups may hold their own; state travels in `optimizer.state_dict()`.

    handle: `.detach()` takes everything away again; `.explain()`, `.stats(every=N)` and `.trace(p)` are those of
        gradkit's optimizers, `.backend` is how it runs.
    A GradScaler works. With an optimizer that unscales by itself (`fused=True`) the gradients are unscaled here, and
    the host reads scale and overflow: the wait that the scaler itself has with every optimizer that is not fused.
    """
    return Attached(real(optimizer), transforms)


def real(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer whose hooks run, out of the wrappers of accelerate and Lightning; raises for what can't be used."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"attach: {brief(optimizer)} is no torch.optim.Optimizer: give attach(optimizer, transform, ...)"
        )
    while not vars(optimizer).keys() >= HOOKS:
        inner = getattr(optimizer, "optimizer", None)
        if not isinstance(inner, torch.optim.Optimizer):
            raise TypeError(f"attach: {type(optimizer).__name__} runs no hooks: give the optimizer that it wraps")
        optimizer = inner
    who = type(optimizer).__name__
    if not getattr(optimizer, "param_groups", None):
        raise ValueError(f"attach: {who} has no parameters")
    if isinstance(optimizer, Optimizer):
        raise TypeError(
            f"attach: {who} is gradkit's own, which runs transforms in its step: {who}(..., transforms=[...])"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError(
            "attach: LBFGS evaluates the closure many times a step, and compares gradients: it can't be used"
        )
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise TypeError(
            "attach: SparseAdam takes sparse gradients, and transforms take dense ones: use torch.optim.Adam"
        )
    return optimizer


KINDS = ("step_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post")
HOOKS = {f"_optimizer_{kind}_hooks" for kind in KINDS}  # where torch keeps ours


def handles(optimizer: torch.optim.Optimizer) -> "list[Attached]":
    """Those that are attached to an optimizer, in the order in which they run."""
    owners = (getattr(hook, "__self__", None) for hook in optimizer._optimizer_step_pre_hooks.values())
    return [x for x in owners if isinstance(x, Attached)]


STEP = torch.optim.Optimizer.profile_hook_step(lambda self: None).__code__  # in which torch runs the hooks of a step


def nested(optimizer: torch.optim.Optimizer) -> bool:
    """Whether this is a step within its own step: of a class whose step() calls super().step() torch runs hooks twice.

    Read off the stack: what a hook remembers would survive a step that raised.
    """
    steps, frame = 0, sys._getframe().f_back
    while frame is not None:
        steps += frame.f_code is STEP and frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return steps > 1


class Attached(Machine):
    """Transforms in front of an optimizer; made by `gradkit.attach`."""

    target = "g"
    forgetting = "call its handle's detach(), and attach again"
    _early: list[Tensor | None] | None = None  # the gradients that are rewritten already

    def __init__(self, optimizer: torch.optim.Optimizer, transforms: Sequence[Any]):
        super().__init__([checked_chain("attach", x) for x in transforms], "auto")
        distinct(self.transforms)
        self.optimizer, self.state, self.defaults, self._hooks = optimizer, defaultdict(dict), {}, []
        self.links = [x for c in self.transforms for x in c.place()]
        if not self.links:
            raise TypeError("attach: give at least one transform, e.g. attach(optimizer, clip_by_global_norm(1.0))")
        self._unscales = bool(getattr(optimizer, "_step_supports_amp_scaling", False))
        self._loaded: Loaded | None = None
        self._strange: set[str] = set()  # keys of groups that a warning has named
        self._marked = False  # whether the optimizer's state may hold copies of ours
        labels = list(dict.fromkeys(map(label, self.links)))
        self._check(labels)
        chains = [c for x in self.transforms for c in x.walk()]
        self.arguments = {f"{c.name}.{n}": builtin(v) for c in chains for n, v in c.arguments.items()}
        self.clock_key = f"{IN_GROUP}{labels[0]}.clock"
        groups = self.groups(optimizer.param_groups)
        program, *_ = [self.check_group(g, groups) for g in groups]
        self._check_names(groups)
        self._kept = {*program.shared}
        self.numbers = {*program.scalars.counters, *program.memory}  # of each parameter
        parts = carrying.names_of(program)
        self.parts = [{*part} for part in parts]  # what is saved and loaded together
        self.names = {name: key for part in parts for name, key in part.items()}  # of our state -> in a file
        self._check_files()
        for other in handles(optimizer):
            other._sweep()
        self.state.update(carrying.adopt(self))
        for key, value in (*((IN_GROUP + n, v) for n, v in self.arguments.items()), (self.clock_key, 0.0)):
            optimizer.param_groups[0].setdefault(key, value)
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_state_dict_post_hook(self._save),
            optimizer.register_load_state_dict_pre_hook(self._before_load),
            optimizer.register_load_state_dict_post_hook(self._after_load),
        ]
        self._refresh()

    def _check(self, labels: Sequence[str]) -> None:
        """Raise for links and parameters that can't stand here."""
        for x in self.links:
            if x.stage != Stage.GRAD:
                raise ValueError(
                    f"attach: {x.label} works at the stage {x.stage.name}, which only gradkit's own optimizers have: "
                    f"give it to one of those as transforms=[...]"
                )
        for taken in (x for other in handles(self.optimizer) for x in map(label, other.links) if x in labels):
            raise ValueError(
                f"attach: {type(self.optimizer).__name__} has a {taken!r} already: call .detach() of its handle (those "
                f"of a callback: callback.handle, callback.handles), or give the transform another name, e.g. "
                f"{taken}(..., name='second')"
            )
        if any(g.get("differentiable") for g in self.optimizer.param_groups):
            raise ValueError(
                "attach: differentiable=True: transforms keep no graph, so derivatives through the step would be wrong"
            )
        for p in carrying.parameters(self.optimizer):
            check_dtype("attach", p)

    def _check_files(self) -> None:
        """Raise if two names of state are one in a file."""
        taken = [*self.names.values(), *(x for other in handles(self.optimizer) for x in other.names.values())]
        if twice := [x for x in self.names.values() if taken.count(x) > 1]:
            raise ValueError(f"attach: two slots would be {twice[0]!r} in a file: give one transform another name=")

    @property
    def who(self) -> str:
        return f"attached to {type(self.optimizer).__name__}"

    def now(self) -> None:
        """Rewrite `p.grad` at once; the next `optimizer.step()` does not do so again.

        Unless every gradient is another tensor by then: of a new backward, where that step was left out.
        """
        if not self._hooks:
            raise RuntimeError(f"{self.who}: it was detached; call gradkit.attach again")
        self._early = self._gradients() if self._transform() else None

    def detach(self) -> None:
        """Take the transforms away from the optimizer, with their state and arguments; a second time does nothing."""
        self._sweep()
        for hook in self._hooks:
            hook.remove()
        for group in self.optimizer.param_groups if self._hooks else ():
            for key in self.keys() & {*group}:
                del group[key]
        self._hooks = []
        self._drop_plans()
        self.state.clear()

    def pieces(self, group: Mapping[str, Any]) -> list[Placed]:
        """The transforms' links, behind one that unscales where the optimizer itself would."""
        return UNSCALE.place() * self._unscales + self.links

    def gets_state(self, p: Tensor, g: Tensor | None) -> bool:
        """As torch's: a file's entry of a parameter that never had a gradient must not hold ours alone."""
        return g is not None

    def __repr__(self) -> str:
        return f"<{', '.join(dict.fromkeys(map(label, self.links)))} {self.who}{', detached' * (not self._hooks)}>"

    def explain(self) -> str:
        self._refresh()
        return super().explain()

    def stats(self, every: int | None = None) -> dict[str, dict[str, float]]:
        self._refresh()
        return super().stats(every)

    def trace(self, p: Tensor) -> list[tuple[str, Tensor]]:
        """One parameter's gradient after each link, as the coming step would make it, on cloned state."""
        self._refresh()
        return super().trace(p)

    def keys(self) -> set[str]:
        """What groups hold of ours."""
        return {self.clock_key, *(IN_GROUP + n for n in (*self.arguments, *self._kept))}

    def groups(self, foreign: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """What the machine runs on: an optimizer's groups, with the values of ours that they or the first one hold."""
        made: list[dict[str, Any]] = []
        for group in foreign:
            own = {k: group[k] for k in ("params", "param_names") if k in group}
            lr = group.get("lr")
            if isinstance(lr, float | int) or (isinstance(lr, Tensor) and lr.device.type == "cpu"):
                own["lr"] = float(lr)  # others leave it out, or on a device, which would be waited for
            for name, default in self.arguments.items():
                own[name] = group.get(IN_GROUP + name, foreign[0].get(IN_GROUP + name, default))
            made.append({**IN_GROUPS, "decay": "none", "inverse_scale": 1.0, **own})
        clock = torch.tensor(float(foreign[0].get(self.clock_key, 0.0)), dtype=torch.float64)
        kept = {n: foreign[0][IN_GROUP + n] for n in self._kept if IN_GROUP + n in foreign[0]}
        made[0] |= {**kept, "clock": clock}
        return made

    def _refresh(self) -> None:
        """Read the optimizer's groups."""
        if not self._hooks:
            raise RuntimeError(f"{self.who}: it was detached; call gradkit.attach again")
        self.param_groups = self.groups(self.optimizer.param_groups)

    def _gradients(self) -> list[Tensor | None]:
        return [p.grad for p in carrying.parameters(self.optimizer)]

    def __getstate__(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer, "transforms": self.transforms, "backend": self.backend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy is detached: torch's copy of an optimizer has no hooks."""
        super().__init__(state["transforms"], state["backend"])
        self.optimizer, self.state, self._hooks, self._marked = state["optimizer"], defaultdict(dict), [], False
        self.links = [x for c in self.transforms for x in c.place()]

    @torch._disable_dynamo
    def _before_step(self, _: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if nested(self.optimizer):
            return None
        self._sweep()
        if kwargs.get("closure") is not None:
            return args, {**kwargs, "closure": self._behind(kwargs["closure"])}
        if callable(next(iter(args[1:]), None)):
            return (args[0], self._behind(args[1]), *args[2:]), kwargs
        self._at_step()
        return None

    def _behind(self, closure: Callable[..., Any]) -> Callable[..., Any]:
        def both(*args: Any, **kwargs: Any) -> Any:
            self._early = None
            loss = closure(*args, **kwargs)
            done, self._early = self._early, None
            if done is None:  # a trainer's closure may call now(), and change gradients behind it
                self._transform()
            return loss

        return both

    def _at_step(self) -> None:
        done, self._early = self._early or (), None
        if not any(g is before for g, before in zip(self._gradients(), done, strict=False) if g is not None):
            self._transform()

    @torch._disable_dynamo
    @torch.no_grad()
    def _transform(self) -> bool:
        """Rewrite the gradients, if there are any and the step is to be."""
        optimizer, scale, grads = self.optimizer, None, self._gradients()
        if all(g is None for g in grads):
            return False
        if self._unscales:
            scale, found = (getattr(optimizer, n, None) for n in ("grad_scale", "found_inf"))
            numbers = [x.reshape(()) for x in (scale, found) if x is not None]
            read = iter(torch.stack(numbers).tolist() if numbers else ())  # one wait for both
            scale, found = (x if x is None else next(read) for x in (scale, found))
            if found:
                return False
        everyone = handles(optimizer)
        for handle in everyone[1:] if everyone[0] is self else ():  # before the first has rewritten anything
            handle._refresh()
            handle._check_edits()
        self._refresh()
        carrying.warn_of_strange(self, everyone)
        if scale is not None:
            for x in self.links:
                if "g" in x.link.sees:
                    raise RuntimeError(
                        f"{self.who}: {x.label} asks for g, which is still scaled: call scaler.unscale_(optimizer) "
                        f"before scaler.step(optimizer)"
                    )
            for group in self.param_groups:
                group["inverse_scale"] = 1.0 / scale
        self._run(grads)
        if scale is not None:
            optimizer.grad_scale = None  # type: ignore[attr-defined]  # it is done
        first = optimizer.param_groups[0]
        first[self.clock_key] = self.clock
        first.update({IN_GROUP + n: self.param_groups[0][n] for n in self._kept})
        return True

    def _sweep(self) -> None:
        if self._marked:
            carrying.sweep(self.optimizer)
            self._marked = False

    def _save(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        self._sweep()
        carrying.save(self, state_dict)

    def _before_load(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
        counts = [[len(g["params"]) for g in x] for x in (state_dict["param_groups"], optimizer.param_groups)]
        if counts[0] != counts[1]:
            return None  # torch says so
        self._loaded, rest = carrying.take(self, handles(optimizer), state_dict)
        self._marked = carrying.loads_itself(optimizer)
        return rest

    def _after_load(self, optimizer: torch.optim.Optimizer) -> None:
        if self._loaded is None:
            return
        for group, before in zip(optimizer.param_groups, self._loaded.arguments, strict=True):
            for key, value in before.items():
                group.setdefault(key, value)
        optimizer.param_groups[0].setdefault(self.clock_key, 0.0)
        self._drop_plans()
        self.state, self._counted, self._loaded = defaultdict(dict, self._loaded.state), None, None
        self._early = None
        self._refresh()
