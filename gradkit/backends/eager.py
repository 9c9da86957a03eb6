"""Parameter by parameter, link by link, plain torch: the reference; a breakpoint in a rule works here."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import random
from ..transform import Stage

if TYPE_CHECKING:
    from ..plan import Batch, Pass
    from ..scalars import Column

WRITE_STREAM = random.stream("write")


@dataclass
class Part:
    """A tensor, or a slice of it, with what one walk over the chain needs."""

    p: Tensor
    g: Tensor
    slots: dict[str, Tensor]
    residual: Tensor | None  # Kahan: what the parameter's dtype could not hold
    row: Tensor  # the host's scalars, [columns]
    measured: Tensor  # what measures gave, [columns]
    rows: slice  # which ones, among those of the whole batch
    index: int | Tensor  # where its first element, or each, stands in the full tensor

    def slices(self, size: int) -> Iterator["Part"]:
        """The same in pieces of consecutive memory: matrices of whole rows, or of a part of one, where rows matter."""
        numel, count = self.p.numel(), self.rows.stop - self.rows.start
        as_rows = count > 0 and self.p.dim() > 1
        length = max(1, numel // count) if as_rows else 1
        for start, n in pieces(numel, length, size):
            row = self.rows.start + start // length
            rows = slice(row, row + -(-n // length)) if as_rows else self.rows
            shape = (rows.stop - rows.start, -1) if as_rows else (-1,)

            def piece(t: Tensor) -> Tensor:
                return t.as_strided((n,), (1,), t.storage_offset() + start).view(shape)  # noqa: B023  # used at once

            slots = {name: piece(t) for name, t in self.slots.items()}
            rest = None if self.residual is None else piece(self.residual)
            yield Part(piece(self.p), piece(self.g), slots, rest, self.row, self.measured, rows, self.index + start)


def pieces(numel: int, length: int, size: int) -> Iterator[tuple[int, int]]:
    """Where pieces of about `size` elements start, and their lengths: whole rows, or within one that is longer."""
    if length <= size:
        step = size // length * length
        yield from ((start, min(step, numel - start)) for start in range(0, numel, step))
    else:
        for row in range(0, numel, length):
            yield from ((row + start, min(size, length - start)) for start in range(0, length, size))


def folded(x: Tensor, how: str, by_row: bool) -> Tensor:
    """The reduction of all elements, or of each row, in float64."""
    x = x.double()
    if by_row and x.dim() > 1:
        return x.flatten(1).amax(1) if how == "max" else x.flatten(1).sum(1)
    if how == "max":
        return x.max()[None]
    # by pieces that torch gives to one thread: the same sum for any number of them
    return torch.stack([c.sum() for c in x.flatten().split(1 << 15)]).sum()[None]


class Eager:
    name = "eager"

    def __init__(self, batch: "Batch"):
        self.batch = batch

    def begin(self) -> None:
        """Send the step's table."""
        self.table = torch.from_numpy(self.batch.table).to(self.batch.device, non_blocking=True)

    def parts(self, ps: "Pass", t: int) -> Iterator[Part]:
        b = self.batch
        kept = b.slots["compensation"][t] if b.rounding == "kahan" else None
        slots = {n: b.entry(n, t) for n in ps.slots}
        rows = slice(b.first_row[t], b.first_row[t + 1])
        yield Part(b.params[t], b.grads[t], slots, kept, self.table[b.row[t]], b.measured[t], rows, b.logical[t])

    def walk(self, ps: "Pass", part: Part, note: Callable[[str, Tensor], None] | None = None) -> dict[str, Tensor]:
        """Run the rules of a pass on one part -> u, p, g and the new slots, in the arithmetic type."""
        b = self.batch
        p, g = part.p.to(b.compute), part.g.to(b.compute)
        if part.residual is not None:
            p = p + part.residual.to(b.compute)
        if b.program.maximize:
            g = -g
        seen = {"u": g, "p": p, "g": g, "before": g, **{f"slot {n}": t.to(b.compute) for n, t in part.slots.items()}}
        for i, placed in ps.rules:
            rule, held = placed.link, [f"slot {n}" for n in placed.holds]
            scalars = [self.scalar(part, c) for c in b.program.scalars.of[i]]
            out = rule.fn(seen["u"], *(seen[n] for n in (*rule.sees, *held)), *scalars)
            results = out if isinstance(out, tuple) else (out,)
            seen["before"] = seen["u"]
            flows = "p" if rule.stage == Stage.WRITE else "u"
            seen.update(zip((flows, *held), results, strict=True))
            if note:
                note(placed.label, seen[flows])
        return seen

    def scalar(self, part: Part, column: "Column") -> Tensor:
        """One of the host's table or of a measure; of rows a column beside the part."""
        if column.table != "r":
            return (part.measured if column.table == "m" else part.row)[column.at]
        given = self.batch.by_row[part.rows, column.at]
        return given.view(-1, *[1] * (part.p.dim() - 1)) if part.p.dim() > 1 else given[0]

    def reduce(self, ps: "Pass") -> Tensor:
        """The totals of the pass's measure, float64 [tensors or rows, reductions]."""
        b, link = self.batch, ps.measure.link
        by_row = link.scope == "row"
        count = len(b.by_row) if by_row else len(b.params)
        totals = torch.zeros(count, len(link.reduce), dtype=torch.float64, device=b.device)
        for t in range(len(b.params)):
            for part in self.parts(ps, t):
                at = part.rows if by_row else slice(t, t + 1)
                values = link.map(**self.walk(ps, part))
                for j, (how, x) in enumerate(zip(link.reduce.values(), values, strict=True)):
                    if x.numel():
                        new, old = folded(x, how, by_row), totals[at, j]
                        totals[at, j] = torch.maximum(old, new) if how == "max" else old + new
        return totals

    def apply(self, ps: "Pass") -> None:
        """Run the whole chain and store the parameters and slots."""
        for t in range(len(self.batch.params)):
            for part in self.parts(ps, t):
                seen = self.walk(ps, part)
                old = [part.slots[name] for name in ps.stores]
                new = [seen["p"], *(seen[f"slot {name}"] for name in ps.stores)]
                # a rule may hand on one slot's tensor as another's new value
                p, *new = [x.clone() if any(x is y for y in part.slots.values()) else x for x in new]
                for slot, x in zip(old, new, strict=True):
                    slot.copy_(x)
                if ps.writes:
                    self.write(part, p, t)

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
