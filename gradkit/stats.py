"""What a step did, counted on every N-th: norms, what was clipped, resets. More measures in the plan of those steps."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from .chain import Placed, chain
from .ops import absolute, maximum, sign, sqrt
from .scalars import derived
from .transform import Rule, Stage, measure

if TYPE_CHECKING:
    from .plan import Batch, Plan


def counted(smaller, before, after):
    return smaller, sqrt(before), sqrt(after)


@measure(
    scope="tensor",
    reduce={"smaller": "sum", "before": "sum", "after": "sum"},
    gives=("count", "norm_before", "norm_after"),
    finish=counted,
)
def shrunk(u, before):
    """What the rule in front has made smaller."""
    return maximum(sign(absolute(before) - absolute(u)), 0.0), before * before, u * u


def sizes(gradient, update, weight, lr):
    return sqrt(gradient), lr * sqrt(update), sqrt(weight)


@measure(
    scope="tensor",
    reduce={"gradient": "sum", "update": "sum", "weight": "sum"},
    gives=("grad_norm", "update_norm", "weight_norm"),
    finish=sizes,
    stage=Stage.UPDATE,
)
def norms(u, p, g):
    return g * g, u * u, p * p


def sizes_in_front(gradient, after, weight, inverse_scale):
    return inverse_scale * sqrt(gradient), sqrt(after), sqrt(weight)


@measure(
    scope="tensor",
    reduce={"gradient": "sum", "after": "sum", "weight": "sum"},
    gives=("grad_norm", "norm_after", "weight_norm"),
    finish=sizes_in_front,
)
def norms_in_front(u, p, g):
    """Of a chain that leaves its result in the gradient: what an optimizer makes of that it doesn't know."""
    return g * g, u * u, p * p


def counting(pieces: Sequence[Placed]) -> list[Placed]:
    """A chain with a measure behind each rule that counts, and one before the write, or at the end."""
    out: list[Placed] = []
    labels: list[str] = []
    for piece in pieces:
        if piece.stage == Stage.WRITE and norms not in [x.link for x in out]:
            out.append(Placed(norms, chain(norms), Stage.UPDATE))
        out.append(piece)
        if counts(piece):
            label = piece.chain.name or piece.link.name
            same = labels.count(label)
            labels.append(label)
            label += f"_{same + 1}" * bool(same)
            out.append(Placed(shrunk, chain(shrunk, name=label), piece.stage))
    return out if norms in [x.link for x in out] else [*out, *chain(norms_in_front).place()]


def counts(piece: Placed) -> bool:
    """Whether what it makes smaller is counted: in a split nothing is measured."""
    return isinstance(piece.link, Rule) and bool(piece.link.counts) and not piece.side


class Counted(NamedTuple):
    """What a step left: the tables of its batches, which may lie on a device, and how often each tensor was reset."""

    batches: "list[Batch]"
    resets: list[list[float | None]]

    @classmethod
    def of(cls, plan: "Plan", groups: Sequence[Any]) -> "Counted":
        """To be taken before the step counts."""
        return cls(plan.batches, [resets(b, groups) for b in plan.batches])

    def read(self) -> dict[str, dict[str, float]]:
        """By parameter; waits for the device."""
        out = {}
        for batch, resets_ in zip(self.batches, self.resets, strict=True):
            kinds_of = [x.link.counts for x in batch.program.pieces if counts(x)]
            columns = batch.program.scalars.measured
            for t, cells in enumerate(batch.measured.tolist()):
                kinds, mine = iter(kinds_of), {}
                for (owner, name), value in zip(columns, cells, strict=False):
                    if owner.items in ((norms,), (norms_in_front,)):
                        mine[name] = value
                    elif owner.items == (shrunk,):
                        at = shown(next(kinds), value, batch.owners[t].numel()) if name == "count" else (name, value)
                        mine[f"{owner.name}.{at[0]}"] = at[1]
                if resets_[t] is not None:
                    mine["resets"] = resets_[t]
                name = batch.names[t] or str(batch.index[t])
                out[name if name not in out else f"{name} (parameter {batch.index[t]})"] = mine
        return out


def shown(kind: str, count: float, numel: int) -> tuple[str, float]:
    """How a rule's count of what it made smaller is called, and what it is."""
    share = count / max(1, numel)
    return kind, {"clipped": share, "spikes": count, "win_rate": 1 - share}[kind]


def resets(batch: "Batch", groups: Sequence[Any]) -> list[float | None]:
    """What a chain's derive gives by that name."""
    of_rows: list[float | None] = []
    for t in batch.first.tolist():
        counters = {name: float(v[t]) for name, v in batch.after.items()}
        made = [derived(x, groups[batch.group[t]], counters, batch.clock) for x in batch.program.scalars.derived]
        of_rows.append(next((float(d["resets"]) for d in made if "resets" in d), None))
    return [of_rows[r] for r in batch.row]
