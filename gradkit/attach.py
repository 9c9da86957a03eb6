"""Transforms in front of any torch.optim.Optimizer: hooks of its step, its state dict and its loading."""

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import sharding
from .chain import Chain, Placed, chain, distinct
from .machine import Machine, checked_chain
from .optimizer import Optimizer
from .options import DTYPES, IN_GROUPS, brief, builtin, listed
from .plan import Program
from .selection import turn_of
from .transform import Measure, Stage, rule

IN_STATE, IN_GROUP = "gradkit_", "gradkit."  # what names of ours begin with, in an entry of the state and in a group
log = logging.getLogger("gradkit")


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
    while "_optimizer_step_pre_hooks" not in vars(optimizer):
        inner = getattr(optimizer, "optimizer", None)
        if not isinstance(inner, torch.optim.Optimizer):
            raise TypeError(f"attach: {type(optimizer).__name__} runs no hooks: give the optimizer that it wraps")
        optimizer = inner
    who = type(optimizer).__name__
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


def handles(optimizer: torch.optim.Optimizer) -> "list[Attached]":
    """Those that are attached to an optimizer, in the order in which they run."""
    owners = (getattr(hook, "__self__", None) for hook in optimizer._optimizer_step_pre_hooks.values())
    return [x for x in owners if isinstance(x, Attached)]


class Loaded(NamedTuple):
    """What a state dict holds of ours, until torch has loaded the rest."""

    state: dict[Tensor, dict[str, Tensor]]
    arguments: list[dict[str, Any]]  # of each group, as they were before


class Attached(Machine):
    """Transforms in front of an optimizer; made by `gradkit.attach`."""

    target = "g"

    def __init__(self, optimizer: torch.optim.Optimizer, transforms: Sequence[Any]):
        if not transforms:
            raise TypeError("attach: give at least one transform, e.g. attach(optimizer, clip_by_global_norm(1.0))")
        super().__init__([checked_chain("attach", x) for x in transforms], "auto")
        self.optimizer, self.state, self.defaults, self._hooks = optimizer, defaultdict(dict), {}, []
        self._loaded: Loaded | None = None
        self._marked = False  # whether the optimizer's state may hold marks of what was ours
        self._unscales = bool(getattr(optimizer, "_step_supports_amp_scaling", False))
        distinct(self.transforms)
        self._pieces = [x for c in self.transforms for x in c.place()]
        for x in self._pieces:
            if x.stage != Stage.GRAD:
                raise ValueError(
                    f"attach: {x.label} works at the stage {x.stage.name}, which only gradkit's own optimizers have: "
                    f"give it to one of those as transforms=[...]"
                )
        labels = list(dict.fromkeys(map(label, self._pieces)))
        for taken in (x for other in handles(optimizer) for x in map(label, other._pieces) if x in labels):
            raise ValueError(
                f"attach: {type(optimizer).__name__} has a {taken!r} already: call .detach() of its handle, or give "
                f"this one another name="
            )
        for p in (p for g in optimizer.param_groups for p in g["params"]):
            if p.dtype not in DTYPES:
                use = "torch.view_as_real" if p.is_complex() else f"one of {listed(DTYPES)}"
                raise TypeError(f"attach: a parameter of dtype {p.dtype} is not supported: use {use}")
        chains = [c for x in self.transforms for c in x.walk()]
        self._arguments = {f"{c.name}.{n}": builtin(v) for c in chains for n, v in c.arguments.items()}
        self._clock = f"{IN_GROUP}{labels[0]}.clock"
        groups = self._groups(optimizer.param_groups)
        programs = [self.check_group(g, groups) for g in groups]
        self._check_names(groups)
        self._kept = {*programs[0].shared}
        self._numbers = {*programs[0].scalars.counters, *programs[0].memory}
        self._names = names_of(programs[0])  # ours -> a file's
        entries = [optimizer.state.get(p, {}) for g in groups for p in g["params"]]
        found = self._read(self._groups(optimizer.param_groups), entries)
        # nothing has changed up to here
        self._adopt(found, entries)
        for name, value in (*self._arguments.items(), (self._clock.removeprefix(IN_GROUP), 0.0)):
            optimizer.param_groups[0].setdefault(IN_GROUP + name, value)
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_state_dict_post_hook(self._save),
            optimizer.register_load_state_dict_pre_hook(self._before_load),
            optimizer.register_load_state_dict_post_hook(self._after_load),
        ]
        self._refresh()

    @property
    def who(self) -> str:
        return f"attached to {type(self.optimizer).__name__}"

    def detach(self) -> None:
        """Take the transforms away from the optimizer, with their state and arguments; a second time does nothing."""
        self._sweep()
        for hook in self._hooks:
            hook.remove()
        for group in self.optimizer.param_groups if self._hooks else ():
            for key in self._keys() & {*group}:
                del group[key]
        self._hooks = []
        self._drop_plans()
        self.state.clear()

    def pieces(self, group: Mapping[str, Any]) -> list[Placed]:
        """The transforms' links, behind one that unscales where the optimizer itself would."""
        return UNSCALE.place() * self._unscales + self._pieces

    def gets_state(self, p: Tensor, g: Tensor | None) -> bool:
        """As torch's: a file's entry of a parameter that never had a gradient must not hold ours alone."""
        return g is not None

    def explain(self) -> str:
        self._refresh()
        return super().explain()

    def trace(self, p: Tensor) -> list[tuple[str, Tensor]]:
        """One parameter's gradient after each link, as the coming step would make it, on cloned state."""
        self._refresh()
        return super().trace(p)

    def _keys(self) -> set[str]:
        """What groups hold of ours."""
        return {self._clock, *(IN_GROUP + n for n in (*self._arguments, *self._kept))}

    def _groups(self, foreign: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """What the machine runs on: an optimizer's groups, with the values of ours that they or the first one hold."""
        made = []
        for group in foreign:
            own: dict[str, Any] = {k: group[k] for k in ("params", "param_names", "lr") if k in group}
            if isinstance(lr := own.get("lr"), Tensor) and lr.is_cuda:
                del own["lr"]  # reading it would wait for the device
            for name, default in self._arguments.items():
                own[name] = group.get(IN_GROUP + name, foreign[0].get(IN_GROUP + name, default))
            made.append({**IN_GROUPS, "decay": "none", "inverse_scale": 1.0, **own})
        kept = {n: foreign[0][IN_GROUP + n] for n in self._kept if IN_GROUP + n in foreign[0]}
        clock = torch.tensor(float(foreign[0].get(self._clock, 0.0)), dtype=torch.float64)
        made[0] |= {**kept, "clock": clock}
        return made

    def _refresh(self) -> None:
        """Read the optimizer's groups."""
        if not self._hooks:
            raise RuntimeError(f"{self.who}: it was detached; call gradkit.attach again")
        self.param_groups = self._groups(self.optimizer.param_groups)

    @torch._disable_dynamo
    def _before_step(self, _: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        self._sweep()
        if kwargs.get("closure") is not None:
            return args, {**kwargs, "closure": self._behind(kwargs["closure"])}
        if callable(next(iter(args[1:]), None)):
            return (args[0], self._behind(args[1]), *args[2:]), kwargs
        self._transform()
        return None

    def _behind(self, closure: Callable[..., Any]) -> Callable[..., Any]:
        def both(*args: Any, **kwargs: Any) -> Any:
            loss = closure(*args, **kwargs)
            self._transform()
            return loss

        return both

    @torch._disable_dynamo
    @torch.no_grad()
    def _transform(self) -> None:
        """Rewrite the gradients."""
        optimizer, scale = self.optimizer, None
        grads = [p.grad for g in optimizer.param_groups for p in g["params"]]
        if all(g is None for g in grads):
            return
        if self._unscales:
            scale, found = (getattr(optimizer, n, None) for n in ("grad_scale", "found_inf"))
            numbers = [x.reshape(()) for x in (scale, found) if x is not None]
            read = iter(torch.stack(numbers).tolist() if numbers else ())  # one wait for both
            scale, found = (x if x is None else next(read) for x in (scale, found))
            if found:
                return
        self._refresh()
        if scale is not None:
            for x in self._pieces:
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
        first[self._clock] = self.clock
        first.update({IN_GROUP + n: self.param_groups[0][n] for n in self._kept})

    def _save(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        """Write our state beside the optimizer's: slots as tensors; numbers as Python's, which loading doesn't cast."""
        self._sweep()
        state, groups = state_dict["state"], state_dict["param_groups"]
        keys = [key for g in groups for key in g["params"]]
        params = [p for g in optimizer.param_groups for p in g["params"]]
        for key, p in zip(keys, params, strict=True):
            if mine := self.state.get(p):
                named = {self._names[n]: float(v) if n in self._numbers else v for n, v in mine.items()}
                state[key] = {**state.get(key, {}), **named}
        for key in {IN_GROUP + n for n in self._kept} & {*groups[0]}:
            groups[0][key] = float(groups[0][key])

    def _before_load(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
        """Check and take out what is ours, before torch casts it."""
        groups = state_dict["param_groups"]
        if [len(g["params"]) for g in groups] != [len(g["params"]) for g in optimizer.param_groups]:
            return None  # torch says so
        keys, keep = [key for g in groups for key in g["params"]], self._keys()
        arguments = [{k: g[k] for k in keep & {*g}} for g in optimizer.param_groups]
        for before in arguments:  # how far the file is, the file says
            for name in (self._clock, *(IN_GROUP + n for n in self._kept)):
                before.pop(name, None)
        merged = [
            {**g, **before, **{k: saved[k] for k in keep & {*saved}}}
            for g, before, saved in zip(optimizer.param_groups, arguments, groups, strict=True)
        ]
        state = self._read(self._groups(merged), [state_dict["state"].get(key, {}) for key in keys])
        begun = state_dict["state"] and float(groups[0].get(self._clock, 1.0))
        fresh = {IN_GROUP + n for n in self._kept} - {*groups[0]} | ({*self._names.values()} if not state else set())
        if begun and fresh:
            log.warning("%s: the state dict lacks %s: it starts fresh", self.who, ", ".join(sorted(fresh)))
        others = handles(optimizer)
        known = {x for h in others for x in h._names.values()}, {x for h in others for x in h._keys()}
        entries = {
            key: e for key, e in state_dict["state"].items() if isinstance(e, Mapping)
        }  # an optimizer's own stay
        held = ((k, v) for e in entries.values() for k, v in e.items() if v is not None)
        lost = {k for k, _ in held if str(k).startswith(IN_STATE)} - known[0]
        lost |= {k for g in groups for k in g if k.startswith(IN_GROUP)} - known[1]
        if lost:
            log.warning(
                "%s: the state dict's %s belongs to nothing attached here: attach the same transforms",
                self.who,
                ", ".join(sorted(lost)),
            )
        self._loaded = Loaded(state, arguments)
        ours = {*self._names.values(), *lost}
        self._marked = type(optimizer).load_state_dict is not torch.optim.Optimizer.load_state_dict
        rest = {key: {k: v for k, v in e.items() if k not in ours} for key, e in entries.items()}
        if self._marked:  # its own load goes on behind torch's, and may look for every key of the file
            rest = {key: {k: None if k in ours else v for k, v in e.items()} for key, e in entries.items()}
        gone = {key for key, e in rest.items() if entries[key] and not e}  # the optimizer had no state there
        left = [{k: v for k, v in g.items() if k not in lost} for g in groups]
        state = {key: rest.get(key, e) for key, e in state_dict["state"].items() if key not in gone}
        return {**state_dict, "state": state, "param_groups": left}

    def _after_load(self, optimizer: torch.optim.Optimizer) -> None:
        """Put back what torch's load has taken no notice of."""
        if self._loaded is not None:
            for group, before in zip(optimizer.param_groups, self._loaded.arguments, strict=True):
                for key, value in before.items():
                    group.setdefault(key, value)
            self._drop_plans()
            self.state, self._counted = defaultdict(dict, self._loaded.state), None
            self._loaded = None

    def _sweep(self) -> None:
        """Take out the marks that a load has left for what was ours."""
        state = self.optimizer.state
        for p, entry in list(state.items()) if self._marked else ():
            items = entry.items() if isinstance(entry, Mapping) else ()
            marks = [k for k, v in items if v is None and str(k).startswith(IN_STATE)]
            for key in marks:
                del entry[key]
            if marks and not entry:
                del state[p]  # or the optimizer would think that it has state
        self._marked = False

    def _read(self, groups: list[dict[str, Any]], entries: Sequence[Mapping[str, Any]]) -> dict[Tensor, dict]:
        """What the entries of parameters hold of ours, at declared dtypes; raises where it belongs to another model."""
        state = {}
        for _, program, member in self.seats(groups, partial(turn_of, clock=1.0)):
            p, group, entry, mine = member.p, groups[member.group], entries[member.at], {}
            for name, key in self._names.items():
                if entry.get(key) is None:
                    continue
                if name in self._numbers:
                    memory = name in program.memory
                    device = p.device if memory else "cpu"
                    dtype = torch.float64 if memory else torch.float32
                    mine[name] = torch.tensor(float(entry[key]), dtype=dtype, device=device)
                    continue
                value, length = entry[key], program.ring_length(name, group)
                wanted = p.shape if length is None else (length, *p.shape)
                if value.shape != wanted or sharding.is_sharded(value) != sharding.is_sharded(p):
                    raise ValueError(
                        f"{self.who}: {key!r} of parameter {member.at} has shape {tuple(value.shape)}, it needs "
                        f"{tuple(wanted)}, sharded as the parameter is; load what was saved for this model"
                    )
                dtype = program.slot_dtype(name, p, group)
                mine[name] = value.detach().to(device=p.device, dtype=dtype, copy=True)
            if mine:
                state[p] = mine
        return state

    def _adopt(self, found: dict[Tensor, dict], entries: Sequence[dict[str, Any]]) -> None:
        """Take over what a load, before anything was attached, has left with the optimizer."""
        params = [p for g in self.optimizer.param_groups for p in g["params"]]
        rounded = set()
        for p, entry in zip(params, entries, strict=True):
            for name, value in found.get(p, {}).items():
                given = entry.pop(self._names[name])
                if name not in self._numbers and given.dtype != value.dtype:
                    rounded.add(self._names[name])
            if p in found and not entry:
                del self.optimizer.state[p]  # or the optimizer would think that it has state
        if rounded:
            log.warning(
                "%s: load_state_dict has rounded %s to the parameters' dtype: attach before it",
                self.who,
                ", ".join(sorted(rounded)),
            )
        self.state.update(found)


def label(piece: Placed) -> str:
    """What a link's arguments and state go by."""
    return piece.chain.name or piece.link.name


def names_of(program: Program) -> dict[str, str]:
    """What a file calls our slots, counters and numbers of measures."""
    names = {}
    for x in program.pieces:
        link, derive = x.link, x.chain.derive
        numbers = link.state if isinstance(link, Measure) and link.scope == "tensor" else ()
        for name in (*(s.name for s in link.slots), *numbers):
            names[x.prefix + name] = f"{IN_STATE}{label(x)}_{name}"
        for name in derive.counters if derive else ():
            names.setdefault(x.counter(name), f"{IN_STATE}{label(x)}_{name}")
    return names
