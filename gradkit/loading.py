"""Loading a state dict: merged with what the optimizer has, at declared dtypes, checked before anything changes."""

import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import sharding

if TYPE_CHECKING:
    from .optimizer import Optimizer

CARRIED = ("lr", "initial_lr", "weight_decay", "maximize", "params", "param_names")
log = logging.getLogger("gradkit")


def same_class(optimizer: "Optimizer", state_dict: Mapping[str, Any]) -> bool:
    return all(g.get("algorithm") == type(optimizer).__name__ for g in state_dict["param_groups"])


def pairs(optimizer: "Optimizer", state_dict: Mapping[str, Any]) -> Iterator[tuple[Tensor, dict, Mapping[str, Any]]]:
    """Each parameter with its group as it will be, and what the file has of its state."""
    same = same_class(optimizer, state_dict)
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        for p, i in zip(group["params"], saved["params"], strict=True):
            yield p, {**group, **saved} if same else group, state_dict["state"].get(i, {})


def check(optimizer: "Optimizer", state_dict: Mapping[str, Any]) -> None:
    """Raise if the file belongs to another model."""
    who = type(optimizer).__name__
    counts = [[len(g["params"]) for g in groups] for groups in (optimizer.param_groups, state_dict["param_groups"])]
    if counts[0] != counts[1]:
        raise ValueError(
            f"{who}.load_state_dict: the state dict has groups of {counts[1]} parameters, this optimizer {counts[0]}; "
            f"make the optimizer for the same model and groups"
        )
    same = same_class(optimizer, state_dict)
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        optimizer._check_program({**group, **{k: v for k, v in saved.items() if same or k in CARRIED}})
    for n, (p, group, saved) in enumerate(pairs(optimizer, state_dict)):
        rings = optimizer.program(group).rings if same else ()
        for name, value in saved.items():
            if not isinstance(value, Tensor) or not value.dim():
                continue
            if sharding.is_sharded(value) != sharding.is_sharded(p):
                raise ValueError(
                    f"{who}.load_state_dict: {name!r} of parameter {n} and the parameter must both be sharded or "
                    f"plain; use torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
                )
            if same and value.shape[name in rings :] != p.shape:
                raise ValueError(
                    f"{who}.load_state_dict: {name!r} of parameter {n} has shape {tuple(value.shape)}, the parameter "
                    f"{tuple(p.shape)}; load a state dict that was saved for this model"
                )


def merge(optimizer: "Optimizer", before: list[dict], state_dict: Mapping[str, Any]) -> None:
    """After torch's load, which replaced groups and cast every slot to its parameter's dtype: keep what is ours.

    Of the same class the file's values win. Of another, the schedule and the slots of our names and shapes.
    """
    same = same_class(optimizer, state_dict)
    for group, old in zip(optimizer.param_groups, before, strict=True):
        for key in [k for k in group if not same and k not in CARRIED]:
            del group[key]
        for key, value in old.items():
            group.setdefault(key, value)
        for key, value in group.items():  # the host reads them; `map_location` may have moved them
            if isinstance(value, Tensor):
                group[key] = value.cpu()
    taken: set[str] = set()
    for p, group, saved in pairs(optimizer, state_dict):
        program = optimizer.program(group)
        declared = {n: program.slot_dtype(n, p, group) for n in program.slots}
        declared |= dict.fromkeys(program.scalars.counters, torch.float32)
        if group["rounding"] == "kahan":
            declared["compensation"] = p.dtype
        fits = {
            n: v
            for n, v in saved.items()
            if same or (n in declared and (n in program.scalars.counters or v.shape == p.shape))
        }
        if not same and not set(fits) - set(program.scalars.counters):
            fits = {}  # a count without the moments that it belongs to would switch the bias corrections off
        taken |= fits.keys()
        optimizer.state[p] = {n: copied(v, declared.get(n), p, n in program.scalars.counters) for n, v in fits.items()}
        if not fits:
            del optimizer.state[p]
    if not same:
        wanted = {n for g in optimizer.param_groups for n in optimizer.program(g).slots}
        log.info(
            "%s: took %s and lr, weight_decay, maximize from a state dict of another optimizer; %s",
            type(optimizer).__name__,
            ", ".join(sorted(taken)) or "no state",
            f"{', '.join(sorted(wanted - taken))} starts fresh" if wanted - taken else "nothing starts fresh",
        )


def copied(value: Any, dtype: torch.dtype | None, p: Tensor, counter: bool) -> Any:
    """The file's value as our own tensor, on the parameter's device; counters on the CPU."""
    if not isinstance(value, Tensor):
        return torch.tensor(float(value)) if counter else value
    return value.detach().to(device="cpu" if counter else p.device, dtype=dtype or value.dtype, copy=True)
