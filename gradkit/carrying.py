"""What another optimizer's state dict holds of what is attached to it: written, taken out before torch casts it."""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import sharding
from .chain import Placed
from .plan import Program
from .selection import turn_of
from .transform import Measure

if TYPE_CHECKING:
    from .attach import Attached

IN_STATE, IN_GROUP = "gradkit_", "gradkit."  # what names of ours begin with, in an entry of the state and in a group
log = logging.getLogger("gradkit")


class Loaded(NamedTuple):
    """What a state dict holds of ours, until torch has loaded the rest."""

    state: dict[Tensor, dict[str, Tensor]]
    arguments: list[dict[str, Any]]  # of each group, as they were before


def label(piece: Placed) -> str:
    """What a link's arguments and state go by."""
    return piece.chain.name or piece.link.name


def warn_of_strange(handle: "Attached", beside: "Sequence[Attached]") -> None:
    """Name keys of groups that look like ours and are nobody's: misspelt, or left by a load; each once."""
    held = {k for g in handle.optimizer.param_groups for k in g if k.startswith(IN_GROUP)}
    strange = held - {x for h in beside for x in h.keys()} - handle._strange
    if strange:
        handle._strange |= strange
        log.warning(
            "%s: %s in param_groups belongs to nothing attached here: it does nothing",
            handle.who,
            ", ".join(sorted(strange)),
        )


def names_of(program: Program) -> list[dict[str, str]]:
    """What a file calls our slots, counters and numbers of measures: of each link, or chain with counters."""
    parts: dict[str, dict[str, str]] = {}
    for x in program.pieces:
        link, derive = x.link, x.chain.derive
        numbers = link.state if isinstance(link, Measure) and link.scope == "tensor" else ()
        mine = parts.setdefault(label(x), {})
        for name in (*(s.name for s in link.slots), *numbers):
            mine[x.prefix + name] = f"{IN_STATE}{label(x)}_{name}"
        for name in derive.counters if derive else ():
            if not any(x.counter(name) in part for part in parts.values()):
                mine[x.counter(name)] = f"{IN_STATE}{label(x)}_{name}"
    return [part for part in parts.values() if part]


def parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for g in optimizer.param_groups for p in g["params"]]


def save(handle: "Attached", state_dict: dict[str, Any]) -> None:
    """Write our state beside the optimizer's: slots as tensors; numbers as Python's, which loading doesn't cast."""
    state, groups = state_dict["state"], state_dict["param_groups"]
    keys = [key for g in groups for key in g["params"]]
    for key, p in zip(keys, parameters(handle.optimizer), strict=True):
        if mine := handle.state.get(p):
            named = {handle.names[n]: float(v) if n in handle.numbers else v for n, v in mine.items()}
            state[key] = {**state.get(key, {}), **named}
    for key in {IN_GROUP + n for n in handle._kept} & {*groups[0]}:
        groups[0][key] = float(groups[0][key])


def read(
    handle: "Attached", foreign: Sequence[Mapping[str, Any]], entries: Sequence[Any]
) -> tuple[dict[Tensor, dict], set[str]]:
    """What the entries of parameters hold of ours, at declared dtypes; raises where it belongs to another model.

    Of a link of which an entry lacks something nothing is taken: a slot without its count would be another average.
    Gives the keys that lack, too.
    """
    state, lost, groups = {}, set(), handle.groups(foreign)
    for _, program, member in handle.seats(groups, partial(turn_of, clock=1.0)):
        p, group, entry = member.p, groups[member.group], entries[member.at]
        mine: dict[str, Tensor] = {}
        for name, key in handle.names.items() if isinstance(entry, Mapping) else ():
            value = entry.get(key)
            if value is None:
                continue
            if name in program.memory:
                mine[name] = torch.tensor(float(value), dtype=torch.float64, device=p.device)
            elif name in handle.numbers:
                mine[name] = torch.tensor(float(value), dtype=torch.float32, device="cpu")
            else:
                length = program.ring_length(name, group)
                wanted, shape = p.shape if length is None else (length, *p.shape), getattr(value, "shape", ())
                if shape != wanted or sharding.is_sharded(value) != sharding.is_sharded(p):
                    raise ValueError(
                        f"{handle.who}: {key!r} of parameter {member.at} has shape {tuple(shape)}, it needs "
                        f"{tuple(wanted)}, sharded as the parameter is; load what was saved for this model"
                    )
                dtype = program.slot_dtype(name, p, group)
                mine[name] = value.detach().to(device=p.device, dtype=dtype, copy=True)
        for names in handle.parts:
            if lacking := names - {*mine} if names & {*mine} else None:
                lost |= {handle.names[n] for n in lacking}
                mine = {n: x for n, x in mine.items() if n not in names}
        if mine:
            state[p] = mine
    return state, lost


def take(handle: "Attached", beside: "Sequence[Attached]", state_dict: dict[str, Any]) -> tuple[Loaded, dict[str, Any]]:
    """Ours of a state dict that is about to be loaded, checked, and the rest for torch.

    beside: all that is attached to the optimizer.
    """
    groups, here = state_dict["param_groups"], handle.optimizer.param_groups
    keep, counted = handle.keys(), {handle.clock_key, *(IN_GROUP + n for n in handle._kept)}
    arguments = [{k: g[k] for k in keep - counted & {*g}} for g in here]  # how far the file is, the file says
    merged = [
        {**g, **dict.fromkeys(counted, 0.0), **before, **{k: saved[k] for k in keep & {*saved}}}
        for g, before, saved in zip(here, arguments, groups, strict=True)
    ]
    keys = [key for g in groups for key in g["params"]]
    state, lost = read(handle, merged, [state_dict["state"].get(key) for key in keys])
    loaded = Loaded(state, arguments)
    lacking = lost | {IN_GROUP + n for n in handle._kept} - {*groups[0]}
    lacking |= {*handle.names.values()} if not loaded.state else set()
    if lacking and state_dict["state"] and float(groups[0].get(handle.clock_key, 1.0)):
        log.warning("%s: the state dict lacks %s: its link starts fresh", handle.who, ", ".join(sorted(lacking)))
    entries = {key: e for key, e in state_dict["state"].items() if isinstance(e, Mapping)}
    strange = {k for e in entries.values() for k, v in e.items() if str(k).startswith(IN_STATE) and v is not None}
    strange -= {x for h in beside for x in h.names.values()}
    strange |= {k for g in groups for k in g if k.startswith(IN_GROUP)} - {x for h in beside for x in h.keys()}
    if strange:
        log.warning(
            "%s: the state dict's %s belongs to nothing attached here: attach the same transforms",
            handle.who,
            ", ".join(sorted(strange)),
        )
    ours = set() if loads_itself(handle.optimizer) else {*handle.names.values(), *strange}
    rest = {key: {k: v for k, v in e.items() if k not in ours} for key, e in entries.items()}
    gone = {key for key, e in rest.items() if entries[key] and not e}  # the optimizer had no state there
    kept = {key: rest.get(key, e) for key, e in state_dict["state"].items() if key not in gone}
    left = [{k: v for k, v in g.items() if k not in strange} for g in groups]
    return loaded, {**state_dict, "state": kept, "param_groups": left}


def loads_itself(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its class goes on behind torch's load, and may look for each key of the file: ours stay until `sweep`."""
    return type(optimizer).load_state_dict is not torch.optim.Optimizer.load_state_dict


def sweep(optimizer: torch.optim.Optimizer) -> None:
    """Take out what was left for such a class, some of which keep other things in `state` than their parameters'."""
    for p, entry in list(optimizer.state.items()):
        left = [k for k in entry if str(k).startswith(IN_STATE)] if isinstance(entry, Mapping) else []
        for key in left:
            del entry[key]
        if left and not entry:
            del optimizer.state[p]  # or the optimizer would think that it has state


def adopt(handle: "Attached") -> dict[Tensor, dict]:
    """Take out what a load, before anything was attached, has left with the optimizer."""
    optimizer, rounded = handle.optimizer, set()
    found, lost = read(handle, optimizer.param_groups, [optimizer.state.get(p) for p in parameters(optimizer)])
    if lost:
        log.warning("%s: what was loaded lacks %s: its link starts fresh", handle.who, ", ".join(sorted(lost)))
    first = optimizer.param_groups[0]
    for name, given in handle.arguments.items():
        if first.get(IN_GROUP + name, given) != given:
            log.warning("%s: %s is %s, as loaded, not %s", handle.who, name, first[IN_GROUP + name], given)
    for p, mine in found.items():  # nothing has changed up to here
        entry = optimizer.state[p]
        given = {name: entry.pop(handle.names[name]) for name in mine}
        rounded |= {handle.names[n] for n in {*mine} - handle.numbers if given[n].dtype != mine[n].dtype}
        if not entry:
            del optimizer.state[p]
    if rounded:
        log.warning(
            "%s: load_state_dict has rounded %s to the parameters' dtype: attach before it",
            handle.who,
            ", ".join(sorted(rounded)),
        )
    return found
