"""The table: where each scalar of a chain comes from, and its value for each distinct (group, counters)."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from .chain import Chain, Placed
from .transform import AXES, Measure


class Column(NamedTuple):
    """Where a link finds a scalar: in the host's table, or in what measures gave each tensor, or each part of one."""

    table: str  # "h", "m" or "r"
    at: int

    @property
    def register(self) -> str:
        """What kernels call it."""
        return f"{self.table}{self.at}"


def plain(value: Any) -> Any:
    """A hyperparameter as plain Python: tensors (also in tuples) as floats."""
    if isinstance(value, torch.Tensor):
        return float(value)
    return tuple(map(plain, value)) if isinstance(value, tuple | list) else value


class Scalars:
    """Columns of one chain. Lookup: counters and clock, the chain's derive, measured, its arguments, the group."""

    def __init__(self, pieces: Sequence[Placed], group: Mapping[str, Any]):
        self.of: list[list[Column]] = []  # for each link, in the order of its scalars
        self.rows: list[tuple[Placed, str]] = []
        self.measured: list[tuple[Chain, str]] = []
        self.by_unit: list[tuple[Chain, str]] = []
        self.derived = list({scope(x): x for x in pieces if x.chain.derive}.values())  # one link for each chain
        counted = [x.counter(c) for x in self.derived if (d := x.chain.derive) for c in d.counters]
        self.counters = list(dict.fromkeys(counted))
        ones = dict.fromkeys(self.counters, 1.0)
        self.names = {(x.chain, n) for x in self.derived for n in (*derived(x, group, ones, 1.0), *ones)}
        for piece in pieces:
            over_all = isinstance(piece.link, Measure) and piece.link.scope == "all"
            self.of.append([] if over_all else [self.column(piece, name) for name in piece.link.scalars])
            if isinstance(piece.link, Measure):
                given = self.by_unit if piece.link.scope in AXES else self.measured
                given += [(piece.chain, name) for name in piece.link.gives]

    def column(self, piece: Placed, name: str) -> Column:
        wanted = piece.chain, name
        if wanted in self.by_unit and wanted not in self.names:
            if isinstance(piece.link, Measure) and piece.link.scope not in AXES:
                raise ValueError(
                    f"{piece.label} is over each {piece.link.scope}: {name!r} has a value for each part of one"
                )
            return Column("r", self.by_unit.index(wanted))
        if wanted in self.measured and wanted not in self.names:
            return Column("m", self.measured.index(wanted))
        known = [(scope(x), n) for x, n in self.rows]
        if (scope(piece), name) not in known:
            self.rows.append((piece, name))
            return Column("h", len(known))
        return Column("h", known.index((scope(piece), name)))

    def row(self, group: Mapping[str, Any], counters: Mapping[str, float], clock: float) -> tuple[list[float], dict]:
        """One row in float64, and the counters that a derive set."""
        made = {scope(x): derived(x, group, counters, clock) for x in self.derived}
        cells = []
        for piece, name in self.rows:
            mine = {} if piece.counter(name) in counters or name == "clock" else made.get(scope(piece), {})
            cells.append(number(piece, name, mine[name] if name in mine else look(piece, name, group, counters, clock)))
        returned = [
            (x.counter(n), float(v))
            for x in self.derived
            for n, v in made[scope(x)].items()
            if x.counter(n) in counters
        ]
        return cells, dict(returned)


def scope(piece: Placed) -> tuple:
    """Whose scalars a link reads: its chain's, at one side of a split."""
    return piece.chain, piece.side and piece.side.selected


def shared(piece: Placed, groups: Sequence[Mapping[str, Any]], clock: float) -> list[float]:
    """What `finish` of a measure over all tensors asks for: of the first group that holds the link, no counters."""
    keys = [f"{piece.chain.name}.{name}" for name in piece.chain.arguments]
    for key in keys:
        values = [plain(g[key]) for g in groups if key in g]
        if any(v != values[0] for v in values):
            raise ValueError(
                f"{key} is {values} in the groups: {piece.label} is over all tensors and has one value; set "
                f"it alike in every group"
            )
    group = next((g for g in groups if any(key in g for key in keys)), groups[0])
    return uncounted(piece, group, clock)


def uncounted(piece: Placed, group: Mapping[str, Any], clock: float) -> list[float]:
    """What a link asks for that is no parameter's own: without counters."""
    made = derived(piece, group, {}, clock)
    return [number(piece, n, made[n] if n in made else look(piece, n, group, {}, clock)) for n in piece.link.scalars]


def derived(piece: Placed, group: Mapping[str, Any], counters: Mapping[str, float], clock: float) -> dict[str, Any]:
    """What the chain's derive returns."""
    derive = piece.chain.derive
    return derive.fn(*[look(piece, n, group, counters, clock) for n in derive.params]) if derive else {}


def look(piece: Placed, name: str, group: Mapping[str, Any], counters: Mapping[str, float], clock: float) -> Any:
    """A scalar that no derive and no measure gives."""
    if piece.counter(name) in counters:
        return counters[piece.counter(name)]
    if name == "clock":
        return clock
    owner = piece.chain
    if name in owner.arguments:
        return plain(group.get(f"{owner.name}.{name}", owner.arguments[name]))
    if name in group and name != "params":
        return plain(group[name])
    raise ValueError(
        f"{piece.label} asks for the scalar {name!r}, which nobody gives (chain {owner.name or '(unnamed)'!r}): "
        f"return it from the chain's derive, give it as an argument, measure it before, or use one of the group's: "
        f"{', '.join(k for k in group if k != 'params' and '.' not in k)}"
    )


def number(piece: Placed, name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{piece.label}: the scalar {name!r} is {value!r}; a rule takes numbers only") from None
