"""Measures at the step: their order over the batches, their totals over shards, and their `finish`."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import sharding
from .backends.triton import measured
from .scalars import shared
from .transform import AXES

if TYPE_CHECKING:
    from .plan import Batch, Pass


class Reduction:
    """One link's measure, over all batches that hold it."""

    def __init__(self, parts: "list[tuple[Batch, Pass]]"):
        self.parts, self.placed = parts, parts[0][1].measure
        self.link = self.placed.link
        self.counts = "mean" in self.link.reduce.values()

    def attach(self, first: dict[str, Any]) -> None:
        """Over all tensors: one vector of what the measure keeps; the first group holds 0-d views of it."""
        batch, ps = self.parts[0]
        self.kept = torch.zeros(0)
        if self.link.scope == "all" and ps.memory:
            for name in ps.memory:
                first[name] = torch.as_tensor(first.get(name, 0.0), dtype=torch.float64, device=batch.device)
            self.kept = joined([first], ps.memory)[0]
            for batch, ps in self.parts:
                batch.shared[ps.end] = self.kept

    def begin(self, groups: Sequence[Mapping[str, Any]], clock: float) -> None:
        """Look up what `finish` asks for. Over all tensors that is one value."""
        self.cells = shared(self.placed, groups, clock) if self.link.scope == "all" else []
        for batch, ps in self.parts:
            batch.cells[ps.end] = self.cells

    def run(self, params: Sequence[Tensor], sharded: bool) -> None:
        """Reduce, complete over shards, and give the results to the batches."""
        if not sharded and measured(self.parts):
            return
        mine = [(b, ps) for b, ps in self.parts if b.backend.takes(ps)]
        if not mine:
            return
        by_unit, over_all = self.link.scope in AXES, self.link.scope == "all"
        parts = [b.backend.reduce(ps) for b, ps in mine]
        if self.counts:  # the last column
            parts = [
                torch.cat((x, b.unit_numel if by_unit else b.numel), 1) for x, (b, _) in zip(parts, mine, strict=True)
            ]
        if sharded:
            totals = torch.zeros(len(params), parts[0].shape[1], dtype=torch.float64, device=parts[0].device)
            places = [cut(b, by_unit) for b, _ in mine]
            for (index, at), part in zip(places, parts, strict=True):
                totals[index] = part[at].to(totals.device)
            sharding.complete(totals, [*self.link.reduce.values(), *["sum"] * self.counts], params)
            for (index, at), part in zip(places, parts, strict=True):
                part[at] = totals[index].to(part.device)
            parts = [totals] if over_all else parts
        if over_all:
            device = parts[0].device
            cells = [torch.tensor(c, dtype=torch.float64, device=device) for c in self.cells]
            values = self.finish(torch.cat([x.to(device) for x in parts]), [*self.kept, *cells])
            for cell, value in zip(self.kept, values[len(self.link.gives) :], strict=True):
                cell.copy_(value)
            given = [values[: len(self.link.gives)]] * len(mine)
        else:
            given = [self.finish(x, cells_of(b, ps)) for x, (b, ps) in zip(parts, mine, strict=True)]
        for (batch, ps), values in zip(mine, given, strict=True):
            scalars = batch.program.scalars
            table, names = (batch.by_unit, scalars.by_unit) if by_unit else (batch.measured, scalars.measured)
            for name, value in zip(self.link.gives, values, strict=False):
                table[:, names.index((ps.measure.chain, name))] = value
            for name, value in zip(ps.memory, values[len(self.link.gives) :], strict=False):
                batch.memory[:, batch.program.memory.index(name)] = value

    def finish(self, totals: Tensor, cells: list[Tensor]) -> tuple[Tensor, ...]:
        """Run `finish` on vectors [tensors], or over all on their total."""
        columns = []
        for j, how in enumerate(self.link.reduce.values()):
            column = totals[:, j]
            if self.link.scope == "all":
                column = column.max() if how == "max" else column.sum()
            if how == "mean":
                count = totals[:, -1].sum() if self.link.scope == "all" else totals[:, -1]
                column = column / count.clamp(min=1)
            columns.append(column)
        out = self.link.finish(*columns, *cells)
        return out if isinstance(out, tuple) else (out,)


def cut(batch: "Batch", by_unit: bool) -> tuple[list[int], list[int]]:
    """What shards may have parts of: places among all parameters, and among the totals. A matrix has its rows whole."""
    if not by_unit:
        return batch.index, list(range(len(batch.index)))
    vectors = [t for t, p in enumerate(batch.params) if p.dim() < 2]
    return [batch.index[t] for t in vectors], [batch.first_unit[t] for t in vectors]


def cells_of(batch: "Batch", ps: "Pass") -> list[Tensor]:
    """What `finish` takes beside the totals: vectors [tensors] or [units] in float64."""
    kept = [batch.memory[:, batch.program.memory.index(name)] for name in ps.memory]
    tables = {"h": torch.from_numpy(batch.table64[batch.row]).to(batch.device), "m": batch.measured, "r": batch.by_unit}
    cells = []
    for c in batch.program.scalars.of[ps.end]:
        cell = tables[c.table][:, c.at].double()
        cells.append(cell[batch.unit_owner] if ps.measure.link.scope in AXES and c.table != "r" else cell)
    return kept + cells


def joined(states: Sequence[dict[str, Any]], names: Sequence[str]) -> Tensor:
    """A table [states, names] of 0-d tensors, which become views of it, unless another plan has joined them already."""
    cells = [s[n] for s in states for n in names]
    base, shape = cells[0]._base, (len(states), len(names))
    fits = base is not None and base.shape == shape
    if not fits or any(x._base is not base or x.storage_offset() != i for i, x in enumerate(cells)):
        base = torch.stack(cells).view(shape).clone()
        for s, row in zip(states, base.unbind(), strict=True):
            s.update(zip(names, row.unbind(), strict=True))
    return base


def order(batches: "Sequence[Batch]") -> list[Reduction]:
    """The measures in an order that suits every chain; one link's measure runs over all its batches at once."""
    waiting = []
    for batch in batches:
        measures = [ps.measure for ps in batch.program.passes if ps.measure]
        keys = [(id(x.link), x.chain.name) for x in measures]
        named = [(*key, keys[:i].count(key)) for i, key in enumerate(keys)]
        waiting.append((batch, list(zip(named, batch.program.passes, strict=False))))
    ordered = []
    while heads := [queue[0] for _, queue in waiting if queue]:
        free = [
            key
            for key, ps in heads
            if ps.measure.link.scope != "all" or all(key not in dict(queue[1:]) for _, queue in waiting)
        ]
        if not free:
            names = ", ".join(sorted({ps.measure.label for _, ps in heads}))
            raise ValueError(f"the measures {names} stand in another order in another group: use one order")
        ready = [(b, queue.pop(0)[1]) for b, queue in waiting if queue and queue[0][0] == free[0]]
        ordered.append(Reduction(ready))
    return ordered
