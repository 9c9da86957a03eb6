"""What a step did, by the names of a model's parameters and over all of them, for a logger."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from math import sqrt
from typing import Any

from torch import nn

from ..attach import label
from ..chain import Chain

Seen = dict[str, dict[str, float]]
SHARES = ("clipped", "win_rate")


def by_name(optimizer: Any, model: nn.Module) -> Seen:
    """The last counted step, and `update_to_weight`, update_norm / weight_norm; waits for the device."""
    called = {id(p): name for name, p in model.named_parameters()}
    params = [p for group in optimizer.param_groups for p in group["params"]]
    out: Seen = {}
    for key, seen in optimizer.stats().items():
        name = called.get(id(params[int(key)]), key) if key.isdecimal() else key  # decimal: it was given no names
        out[name] = with_ratio(seen)
    return out


def overall(seen: Seen, model: nn.Module) -> dict[str, float]:
    """One number of each figure: norms of all parameters together, shares of all entries, the sum of spikes."""
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    of: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for name, mine in seen.items():
        for figure, value in mine.items():
            of[figure].append((value, sizes.get(name, 0)))
    out = {}
    for figure, found in of.items():
        kind = figure.rpartition(".")[2]
        if kind in SHARES:
            out[figure] = sum(share * n for share, n in found) / max(1, sum(n for _, n in found))
        elif kind == "spikes":
            out[figure] = sum(count for count, _ in found)
        elif kind == "resets":
            out[figure] = max(count for count, _ in found)
        elif kind != "update_to_weight":
            out[figure] = sqrt(sum(norm * norm for norm, _ in found))
    return with_ratio(out)


def with_ratio(seen: Mapping[str, float]) -> dict[str, float]:
    if not seen.get("weight_norm") or "update_norm" not in seen:
        return dict(seen)
    return {**seen, "update_to_weight": seen["update_norm"] / seen["weight_norm"]}


def clips(transforms: Iterable[Chain]) -> list[str]:
    """The names of those that clip, by what they count."""
    return [label(x) for c in transforms for x in c.place() if getattr(x.link, "counts", "")]


def too_short(every: int) -> str:
    """What a monitor warns of at the end of a run in which no step counted."""
    return (
        f"OptimizerMonitor: nothing was logged, as the run ended before a step that every={every} counts; "
        f"give a smaller every="
    )


def of_whom(*optimizers: Any) -> str:
    """Optimizers and their packages, in a message."""
    return ", ".join(f"{type(opt).__module__.partition('.')[0]}'s {type(opt).__name__}" for opt in optimizers)
