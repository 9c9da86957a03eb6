"""Parameter by parameter, link by link, plain torch: the reference; a breakpoint in a rule works here."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import random
from ..transform import AXES, Stage
from .blocks import ONES, box_of, corners

if TYPE_CHECKING:
    from ..chain import Placed
    from ..plan import Batch, Pass, Units
    from ..scalars import Column
    from ..selection import Choice

WRITE_STREAM = random.stream("write")
Note = Callable[[str, Tensor], None]


@dataclass
class Low:
    """What a split selects of a tensor's elements from `start` to `end`, which are multiples of 8 or its ends."""

    names: Sequence[str]  # of slots that cover that alone
    choice: "Choice"
    bits: Tensor  # the choice's, on the device
    start: int
    end: int

    @property
    def count(self) -> int:
        return int(ONES[self.choice.bits[self.start // 8 : -(-self.end // 8)]].sum())

    def places(self) -> Tensor:
        """Counted from `start`; made anew each time, for they take more memory than what is held there."""
        bytes_ = self.bits[self.start // 8 : -(-self.end // 8), None]
        marks = (bytes_ >> torch.arange(8, dtype=torch.uint8, device=bytes_.device) & 1).flatten()
        return torch.nonzero_static(marks, size=self.count)[:, 0]  # nonzero would wait for the device


@dataclass
class Part:
    """A tensor, or a slice of it, with what one walk over the chain needs."""

    p: Tensor
    g: Tensor
    slots: dict[str, Tensor]
    residual: Tensor | None  # Kahan: what the parameter's dtype could not hold
    row: Tensor  # the host's scalars, [columns]
    measured: Tensor  # what measures gave, [columns]
    units: slice  # its rows or columns, among those of the whole batch
    axis: int | None  # along which they lie here; None: it is part of one
    index: int | Tensor  # where its first element, or each, stands in the full tensor
    low: "Low | None" = None

    def pieces(self, size: int, units: "Units", lies: bool) -> Iterator["Part"]:
        """The same in pieces of memory: consecutive, or where units matter boxes [outer, units, inner].

        lies: each element's index is asked for.
        """
        if self.low is not None:
            flat, before = {name: t.view(-1) for name, t in self.slots.items()}, 0
            for start in range(0, self.p.numel(), size):
                end = min(start + size, self.p.numel())
                low = replace(self.low, start=start, end=end)
                mine, before = slice(before, before + low.count), before + low.count
                slots = {n: t[mine] if n in low.names else t[start:end] for n, t in flat.items()}
                p, g = self.p.view(-1)[start:end], self.g.view(-1)[start:end]
                rest = None if self.residual is None else self.residual.view(-1)[start:end]
                yield replace(self, p=p, g=g, slots=slots, residual=rest, index=self.index + start, low=low)
            return
        if self.axis is None:
            units = units._replace(outer=1, number=1, inner=self.p.numel())
        box = box_of(units, size)
        steps = units.number * units.inner, units.inner, 1
        for corner in corners(units, box):
            shape = [min(b, n - c) for b, n, c in zip(box, units, corner, strict=True)]
            start = sum(c * step for c, step in zip(corner, steps, strict=True))

            def piece(t: Tensor, shape: Any = shape, start: int = start) -> Tensor:
                return t.as_strided(shape, steps, t.storage_offset() + start)

            first = self.units.start + corner[1]
            mine, axis = (slice(first, first + shape[1]), 1) if self.axis is not None else (self.units, None)
            index = self.index + start
            if lies and self.axis is not None:
                ranges = (torch.arange(n, device=self.p.device) * step for n, step in zip(shape, steps, strict=True))
                index = index + sum(torch.meshgrid(*ranges, indexing="ij"))
            slots = {name: piece(t) for name, t in self.slots.items()}
            rest = None if self.residual is None else piece(self.residual)
            yield Part(piece(self.p), piece(self.g), slots, rest, self.row, self.measured, mine, axis, index)


def folded(x: Tensor, how: str, axis: int | None) -> Tensor:
    """The reduction of all elements, or of all but an axis, in float64."""
    x = x.double()
    if axis is not None:
        x = x.movedim(axis, 0).flatten(1)
        return x.amax(1) if how == "max" else x.sum(1)
    if how == "max":
        return x.max()[None]
    # by pieces that torch gives to one thread: the same sum for any number of them
    return torch.stack([c.sum() for c in x.flatten().split(1 << 15)]).sum()[None]


def joined(rest: Tensor, chosen: Tensor, places: Tensor) -> Tensor:
    """A tensor in which what a split selects is replaced."""
    flat = rest.reshape(-1).clone()
    flat[places] = chosen
    return flat.view(rest.shape)


class Eager:
    name = "eager"

    def __init__(self, batch: "Batch"):
        self.batch = batch
        self.bits = [torch.from_numpy(x.bits).to(batch.device) for x in batch.choices]

    def begin(self) -> None:
        """Send the step's table."""
        self.table = torch.from_numpy(self.batch.table).to(self.batch.device, non_blocking=True)

    def parts(self, ps: "Pass", t: int) -> Iterator[Part]:
        b = self.batch
        kept = b.slots["compensation"][t] if b.rounding == "kahan" else None
        slots = {n: b.entry(n, t) for n in ps.slots}
        units, axis = slice(b.first_unit[t], b.first_unit[t + 1]), b.program.axis if b.params[t].dim() > 1 else None
        row, measured = self.table[b.row[t]], b.measured[t]
        low = Low(ps.low, b.choices[t], self.bits[t], 0, b.sizes[t]) if ps.splits else None
        yield Part(b.params[t], b.grads[t], slots, kept, row, measured, units, axis, b.logical[t], low)

    def walk(self, ps: "Pass", part: Part, note: Note | None = None) -> dict[str, Tensor]:
        """Run the rules of a pass on one part -> u, p, g and the new slots, in the arithmetic type."""
        b = self.batch
        p, g = part.p.to(b.compute), part.g.to(b.compute)
        if part.residual is not None:
            p = p + part.residual.to(b.compute)
        if b.program.maximize:
            g = -g
        seen = {"u": g, "p": p, "g": g, "before": g, **{f"slot {n}": t.to(b.compute) for n, t in part.slots.items()}}
        before, inside, outside, after = ps.parts()
        self.run(before, part, seen, note)
        if part.low is not None:
            rest, places, lows = seen["u"], part.low.places(), [f"slot {n}" for n in part.low.names]
            chosen = {n: x.reshape(-1)[places] for n, x in seen.items() if n not in lows}
            chosen |= {n: seen[n].reshape(-1) for n in lows}

            def whole(name: str, x: Tensor) -> None:
                if note:
                    note(name, joined(rest, x, places))

            self.run(inside, part, chosen, whole)
            self.run(outside, part, seen, note)
            seen |= {n: chosen[n] for n in lows} | {"u": joined(seen["u"], chosen["u"], places), "before": rest}
        self.run(after, part, seen, note)
        return seen

    def run(
        self, rules: Sequence[tuple[int, "Placed"]], part: Part, seen: dict[str, Tensor], note: Note | None
    ) -> None:
        """Run rules on u, p, g and slots, which they replace."""
        for i, placed in rules:
            rule, held = placed.link, [f"slot {n}" for n in placed.holds]
            scalars = [self.scalar(part, c) for c in self.batch.program.scalars.of[i]]
            out = rule.fn(seen["u"], *(seen[n] for n in (*rule.sees, *held)), *scalars)
            results = out if isinstance(out, tuple) else (out,)
            seen["before"] = seen["u"]
            flows = "p" if rule.stage == Stage.WRITE else "u"
            seen.update(zip((flows, *held), results, strict=True))
            if note:
                note(placed.label, seen[flows])

    def scalar(self, part: Part, column: "Column") -> Tensor:
        """One of the host's table or of a measure; of units as many as lie along the part's axis."""
        if column.table != "r":
            return (part.measured if column.table == "m" else part.row)[column.at]
        given = self.batch.by_unit[part.units, column.at]
        return given[0] if part.axis is None else given.view([-1 if d == part.axis else 1 for d in range(part.p.dim())])

    def takes(self, ps: "Pass") -> bool:
        """Whether a measure has a pass of its own: each has."""
        return True

    def reduce(self, ps: "Pass") -> Tensor:
        """The totals of the pass's measure, float64 [tensors or units, reductions]."""
        b, link = self.batch, ps.measure.link
        by_unit = link.scope in AXES
        count = len(b.by_unit) if by_unit else len(b.params)
        totals = torch.zeros(count, len(link.reduce), dtype=torch.float64, device=b.device)
        for t in range(len(b.params)):
            for part in self.parts(ps, t):
                at, axis = (part.units, part.axis) if by_unit else (slice(t, t + 1), None)
                values = link.map(**self.walk(ps, part))
                for j, (how, x) in enumerate(zip(link.reduce.values(), values, strict=True)):
                    if x.numel():
                        new, old = folded(x, how, axis), totals[at, j]
                        totals[at, j] = torch.maximum(old, new) if how == "max" else old + new
        return totals

    def apply(self, ps: "Pass") -> None:
        """Run the whole chain and store the parameters and slots."""
        for t in range(len(self.batch.params)):
            for part in self.parts(ps, t):
                seen = self.walk(ps, part)
                old = [part.slots[name] for name in ps.stores]
                written = seen["p" if ps.target == "p" else "u"]
                new = [written, *(seen[f"slot {name}"] for name in ps.stores)]
                # a rule may hand on one slot's tensor as another's new value
                written, *new = [x.clone() if any(x is y for y in part.slots.values()) else x for x in new]
                for slot, x in zip(old, new, strict=True):
                    slot.copy_(x.view(slot.shape))
                if ps.target == "p":
                    self.write(part, written, t)
                elif ps.target == "g":
                    part.g.copy_(written)

    def write(self, part: Part, p: Tensor, t: int) -> None:
        """Store a parameter as its rounding says."""
        b = self.batch
        if b.rounding == "stochastic":
            element = part.index
            if isinstance(element, int):
                element = torch.arange(element, element + p.numel(), device=p.device).view(p.shape)
            seed = int(b.groups[b.group[t]]["seed"])
            bits = random.philox(element, int(b.clock), b.index[t], seed, WRITE_STREAM)
            part.p.copy_(random.stochastic_round(p, bits, part.p.dtype))
        elif part.residual is not None:
            before = part.p.to(b.compute) + part.residual.to(b.compute)
            near = p.to(part.p.dtype)
            moved = p != before  # a parameter that did not move keeps its bits, also on a tie
            part.residual.copy_(torch.where(moved, (p - near.to(b.compute)).to(near.dtype), part.residual))
            part.p.copy_(torch.where(moved, near, part.p))
        else:
            part.p.copy_(p)
