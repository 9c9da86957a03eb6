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
    index: int | Tensor  # where its first element, or each, stands in the full tensor

    def slices(self, size: int) -> Iterator["Part"]:
        """The same in pieces of consecutive memory."""

        def flat(t: Tensor) -> Tensor:
            return t.as_strided((t.numel(),), (1,))

        whole = [flat(self.p), flat(self.g), *map(flat, self.slots.values())]
        rest = None if self.residual is None else flat(self.residual)
        for o in range(0, self.p.numel(), size):
            p, g, *slots = (t[o : o + size] for t in whole)
            kept = None if rest is None else rest[o : o + size]
            yield Part(p, g, dict(zip(self.slots, slots, strict=True)), kept, self.row, self.measured, self.index + o)


class Eager:
    name = "eager"

    def __init__(self, batch: "Batch"):
        self.batch = batch

    def begin(self) -> None:
        """Send the step's table."""
        self.rows = torch.from_numpy(self.batch.table).to(self.batch.device, non_blocking=True)

    def parts(self, ps: "Pass", t: int) -> Iterator[Part]:
        b = self.batch
        kept = b.slots["compensation"][t] if b.rounding == "kahan" else None
        slots = {n: b.entry(n, t) for n in ps.slots}
        yield Part(b.params[t], b.grads[t], slots, kept, self.rows[b.row[t]], b.measured[t], b.logical[t])

    def walk(self, ps: "Pass", part: Part, note: Callable[[str, Tensor], None] | None = None) -> dict[str, Tensor]:
        """Run the rules of a pass on one part -> u, p, g and the new slots, in the arithmetic type."""
        b = self.batch
        p, g = part.p.to(b.compute), part.g.to(b.compute)
        if part.residual is not None:
            p = p + part.residual.to(b.compute)
        if b.program.maximize:
            g = -g
        seen = {"u": g, "p": p, "g": g, **{f"slot {n}": t.to(b.compute) for n, t in part.slots.items()}}
        for i, placed in ps.rules:
            rule, held = placed.link, [f"slot {n}" for n in placed.holds]
            scalars = [(part.measured if c.measured else part.row)[c.at] for c in b.program.scalars.of[i]]
            out = rule.fn(seen["u"], *(seen[n] for n in (*rule.sees, *held)), *scalars)
            results = out if isinstance(out, tuple) else (out,)
            flows = "p" if rule.stage == Stage.WRITE else "u"
            seen.update(zip((flows, *held), results, strict=True))
            if note:
                note(placed.label, seen[flows])
        return seen

    def reduce(self, ps: "Pass") -> Tensor:
        """The totals of the pass's measure, float64 [tensors, reductions]."""
        measure = ps.measure.link
        how = list(measure.reduce.values())
        totals = torch.zeros(len(self.batch.params), len(how), dtype=torch.float64, device=self.batch.device)
        for t in range(len(self.batch.params)):
            for part in self.parts(ps, t):
                seen = self.walk(ps, part)
                for j, (kind, x) in enumerate(zip(how, measure.map(**seen), strict=True)):
                    if x.numel() and kind == "max":
                        totals[t, j] = torch.maximum(totals[t, j], x.double().max())
                    elif x.numel():  # by pieces that torch gives to one thread: the same sum for any number of them
                        totals[t, j] += torch.stack([c.sum() for c in x.double().flatten().split(1 << 15)]).sum()
        return totals

    def apply(self, ps: "Pass") -> None:
        """Run the whole chain and store the parameters and slots."""
        for t in range(len(self.batch.params)):
            for part in self.parts(ps, t):
                seen = self.walk(ps, part)
                old = list(part.slots.values())
                new = [seen["p"], *(seen[f"slot {name}"] for name in part.slots)]
                # a rule may hand on one slot's tensor as another's new value
                p, *new = [x.clone() if any(x is y for y in old) else x for x in new]
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
