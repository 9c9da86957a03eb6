"""Loading a state dict: merged with what the optimizer has, at declared dtypes, checked before anything changes."""

import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import sharding
from .chain import Placed
from .selection import Turn, turn_of

if TYPE_CHECKING:
    from .optimizer import Optimizer
    from .plan import Member, Program

CARRIED = ("lr", "initial_lr", "weight_decay", "maximize", "params", "param_names")
log = logging.getLogger("gradkit")


def same_class(optimizer: "Optimizer", state_dict: Mapping[str, Any]) -> bool:
    return all(g.get("algorithm") == type(optimizer).__name__ for g in state_dict["param_groups"])


class Saved(NamedTuple):
    """A parameter, its group as it will be, what that runs, and what the file has of its state."""

    member: "Member"
    group: dict[str, Any]
    whole: "Program"  # of the group
    program: "Program"
    state: Mapping[str, Any]


def pairs(optimizer: "Optimizer", state_dict: Mapping[str, Any]) -> Iterator[Saved]:
    """Each parameter."""
    same, final, keys = same_class(optimizer, state_dict), [], []
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        taken = {k: on_host(v) for k, v in saved.items() if same or k in CARRIED}
        final.append({**group, **taken, "params": group["params"]})
        keys += saved["params"]
    clock = max(1.0, float(final[0].get("clock", 0.0)))  # the last step's

    def laid_out_for(split: Placed, group: Mapping[str, Any]) -> Turn:
        return Turn(*group["turn"]) if "turn" in group else turn_of(split, group, clock)

    for (whole, program, member), key in zip(optimizer.seats(final, laid_out_for), keys, strict=True):
        yield Saved(member, final[member.group], whole, program, state_dict["state"].get(key, {}))


def check(optimizer: "Optimizer", state_dict: Mapping[str, Any]) -> None:
    """Raise if the file belongs to another model."""
    who = f"{type(optimizer).__name__}.load_state_dict"
    counts = [[len(g["params"]) for g in groups] for groups in (optimizer.param_groups, state_dict["param_groups"])]
    if counts[0] != counts[1]:
        raise ValueError(
            f"{who}: the state dict has groups of {counts[1]} parameters, this optimizer {counts[0]}; "
            f"make the optimizer for the same model and groups"
        )
    same = same_class(optimizer, state_dict)
    for member, group, whole, program, saved in pairs(optimizer, state_dict):
        p, n = member.p, member.at
        if same and (more := (whole.low - program.low) & {*saved}):
            raise ValueError(
                f"{who}: {sorted(more)[0]!r} of parameter {n} belongs to another selection than step "
                f"{float(group.get('clock', 0.0)):.0f} of seed {group['seed']} has; load it with what it was saved with"
            )
        for name in (n for n in program.layout(p, group) if isinstance(saved.get(n), Tensor)):
            value, length = saved[name], program.ring_length(name, group)
            if sharding.is_sharded(value) != sharding.is_sharded(p):
                raise ValueError(
                    f"{who}: {name!r} of parameter {n} and the parameter must both be sharded or plain; "
                    f"use torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
                )
            wanted = program.part(name, member.chosen) or (p.shape if length is None else (length, *p.shape))
            if same and value.shape != wanted:
                raise ValueError(
                    f"{who}: {name!r} of parameter {n} has shape {tuple(value.shape)}, it needs {tuple(wanted)}; "
                    f"load a state dict that was saved for this model"
                )


def merge(optimizer: "Optimizer", before: list[dict], state_dict: Mapping[str, Any]) -> None:
    """After torch's load, which replaced groups and cast every slot to its parameter's dtype: keep what is ours.

    Of the same class the file's values win. Of another, the schedule and the slots of our names and shapes.
    """
    same = same_class(optimizer, state_dict)
    stepped = float(state_dict["param_groups"][0].get("clock", 0.0)) > 0.0
    for group, old in zip(optimizer.param_groups, before, strict=True):
        for key in [k for k in group if not same and k not in CARRIED]:
            del group[key]
        for key, value in old.items():
            group.setdefault(key, value)
        if "param_names" in old:  # those of the model that is here
            group["param_names"] = old["param_names"]
        for key, value in group.items():
            group[key] = on_host(value)
    wanted: set[str] = set()
    lost: set[str] = set()
    idle: set[str] = set()
    arguments: set[str] = set()
    taken: set[str] = set()
    for member, group, _, program, saved in pairs(optimizer, state_dict):
        p = member.p
        dtypes, counters = program.layout(p, group), program.scalars.counters
        slots = {
            n: saved[n].detach().to(device=p.device, dtype=dtype, copy=True)
            for n, dtype in dtypes.items()
            if isinstance(saved.get(n), Tensor)
            and (same or saved[n].shape == (program.part(n, member.chosen) or p.shape))
        }
        numbers: dict[str, Tensor] = {}
        if slots or (same and saved):  # a count without its moments would switch the bias corrections off
            numbers = {n: torch.tensor(float(saved[n]), dtype=torch.float32) for n in counters if n in saved}
            for n in (n for n in program.memory if same and n in saved):
                numbers[n] = torch.tensor(float(saved[n]), dtype=torch.float64, device=p.device)
            optimizer.state[p] = {**numbers, **slots}
        elif same and stepped and p.requires_grad:
            optimizer.state[p] = {}  # of an optimizer without any state torch would think that it never stepped
        else:
            optimizer.state.pop(p, None)
        names = {*dtypes, *counters, *program.memory}
        lost |= names - {*saved} if same and (saved or (stepped and program.low and p.requires_grad)) else set()
        idle |= {*saved} - names
        arguments |= {*program.arguments, *program.shared}
        wanted, taken = wanted | names, taken | {*slots, *numbers}
    if same:
        lost |= optimizer._kept - {*state_dict["param_groups"][0]}
        idle |= {k for g in optimizer.param_groups for k in g if "." in k} - arguments
    if lost:
        log.warning("%s: the state dict lacks %s: it starts fresh", type(optimizer).__name__, ", ".join(sorted(lost)))
    if same and idle:
        log.warning(
            "%s: the state dict's %s belongs to no link here: give the same transforms=",
            type(optimizer).__name__,
            ", ".join(sorted(idle)),
        )
    if not same:
        log.info(
            "%s: took %s and lr, weight_decay, maximize from a state dict of another optimizer; %s%s",
            type(optimizer).__name__,
            ", ".join(sorted(taken)) or "no state",
            f"{', '.join(sorted(wanted - taken))} starts fresh" if wanted - taken else "nothing starts fresh",
            f"; {', '.join(sorted(idle))} left out" if idle else "",
        )


def on_host(value: Any) -> Any:
    """The host reads a group's numbers; `map_location` may have moved them."""
    return value.cpu() if isinstance(value, Tensor) else value
