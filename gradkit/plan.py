"""From groups and gradients to batches and passes: what runs, over which tensors, in which order. No math."""

from collections.abc import Mapping, Sequence
from itertools import chain
from operator import is_
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from . import sharding
from .chain import Placed, check_slots
from .scalars import Scalars, look, number
from .transform import Measure, Rule

if TYPE_CHECKING:
    from .backends import Eager, Native


class Pass:
    """The rules up to a measure, recomputed, which store nothing; or all rules, and the stores."""

    def __init__(self, pieces: Sequence[Placed], end: int):
        self.measure = pieces[end] if end < len(pieces) else None
        self.end = end
        self.rules = [(i, x) for i, x in enumerate(pieces[:end]) if isinstance(x.link, Rule)]
        self.slots = list(dict.fromkeys(x.slot(n) for _, x in self.rules for n in x.rule.holds))
        seen = [x.link.sees for x in (*(x for _, x in self.rules), *([self.measure] if self.measure else []))]
        self.reads_p = self.measure is None or any("p" in names for names in seen)

    @property
    def measured(self) -> Placed:
        assert self.measure is not None
        return self.measure


class Program:
    """A chain that was checked: its scalars, slots and passes."""

    def __init__(self, pieces: Sequence[Placed], group: Mapping[str, Any]):
        self.pieces, self.maximize = pieces, bool(group["maximize"])
        owners = check_slots(pieces)
        self.scalars = Scalars(pieces, group)
        self.slots = {name: slot for name, (_, slot) in owners.items()}
        self.rings = {name: piece for name, (piece, slot) in owners.items() if slot.kind == "ring"}
        for name in {*self.scalars.counters, "compensation"} & {*owners}:
            raise ValueError(f"{owners[name][0].label} owns a slot named {name!r}, which is taken; rename it")
        for name, piece in self.rings.items():
            if piece.chain.derive is None or not piece.chain.derive.counters:
                raise ValueError(f"{piece.label}: the ring {name!r} needs @derive('step', ...) on its chain")
        ends = [i for i, x in enumerate(pieces) if isinstance(x.link, Measure)] + [len(pieces)]
        self.passes = [Pass(pieces, end) for end in ends]
        self.no_source = next((x.link.code.no_source for x in pieces if x.link.code.no_source), "")

    def key(self) -> tuple:
        """Equal for two groups that run the same code."""
        links = ((id(x.link), x.stage, x.chain.name, x.chain.prefix, id(x.chain.derive)) for x in self.pieces)
        return (*links, self.maximize)

    def slot_dtype(self, name: str, p: Tensor, group: Mapping[str, Any]) -> torch.dtype:
        declared = self.slots[name].dtype or group["state_dtype"]
        full = declared is None or (declared == torch.float32 and self.slots[name].dtype is not None)
        return compute_dtype(p) if full else declared

    def ring_length(self, name: str, group: Mapping[str, Any]) -> int | None:
        if name not in self.rings:
            return None
        piece, wanted = self.rings[name], self.slots[name].length
        return int(number(piece, wanted, look(piece, wanted, group, {}, 0.0)))


def compute_dtype(p: Tensor) -> torch.dtype:
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def dense(t: Tensor) -> bool:
    """Whether the elements fill memory without gaps or overlap, in some order of dimensions."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(t.stride(), t.shape, strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return True


class Batch:
    """Tensors of one program, device and set of dtypes: what one launch covers."""

    backend: "Eager | Native"  # chosen when the plan is made

    def __init__(self, program: Program, owners: list[Tensor], index: list[int], group: list[int], groups: list[dict]):
        self.program, self.owners, self.index, self.groups = program, owners, index, groups
        self.group = group  # of each tensor
        first, options = owners[0], groups[group[0]]
        self.dtype, self.device = first.dtype, first.device
        self.compute = compute_dtype(first)
        self.gdtype = (first.grad if first.grad is not None else first).dtype
        self.slot_dtypes = {n: program.slot_dtype(n, first, options) for n in program.slots}
        self.rounding = options["rounding"] if self.dtype in (torch.bfloat16, torch.float16) else "nearest"
        self.detour = detour(first, self.rounding)
        self.sharded = any(map(sharding.is_sharded, owners))  # a placement that can't be stepped raised by now

    def attach(self, state: Mapping[Tensor, dict]) -> None:
        """Take hold of the state, which exists by now."""
        states = [state[p] for p in self.owners]
        self.params = [sharding.local(p.detach()) for p in self.owners]
        self.sizes = [p.numel() for p in self.params]
        self.gradients: list[int] = []
        self.numel = torch.tensor(self.sizes, dtype=torch.float64, device=self.device)[:, None]
        self.logical = [sharding.logical_index(p) if self.rounding == "stochastic" else 0 for p in self.owners]
        names = [*self.program.slots, *["compensation"] * (self.rounding == "kahan")]
        self.slots = {n: [sharding.local(s[n]) for s in states] for n in names}
        self.pointers = list(map(Tensor.data_ptr, chain(self.params, *self.slots.values())))
        self.counters: dict[str, np.ndarray] = {}
        for name in self.program.scalars.counters:  # one vector; the state holds 0-d views of it
            vector = torch.stack([s[name] for s in states])
            for s, view in zip(states, vector.unbind(), strict=True):
                s[name] = view
            self.counters[name] = vector.numpy()
        columns = len(self.program.scalars.measured)
        self.measured = torch.zeros(len(self.owners), max(1, columns), dtype=self.compute, device=self.device)
        self.contiguous = all(p.is_contiguous() for p in self.params)
        self.row = self.first = np.zeros(0, np.int32)

    def bind(self, grads: Sequence[Tensor]) -> bool:
        """Take this step's gradients, unless parameters have moved or gradients are not of the planned kind.

        A gradient of another layout is copied into its parameter's.
        """
        params = [sharding.local(p) for p in self.owners] if self.sharded else self.owners
        if list(map(Tensor.data_ptr, chain(params, *self.slots.values()))) != self.pointers:
            return False
        mine = [grads[i] for i in self.index]
        if self.sharded:
            mine = [sharding.local_grad(g, p) for g, p in zip(mine, self.owners, strict=True)]
        try:
            plain = self.contiguous and all([g.is_contiguous() for g in mine])
            pointers = [g.data_ptr() for g in mine]
        except RuntimeError:  # a sparse gradient has neither
            return False
        if {g.dtype for g in mine} != {self.gdtype}:  # an address doesn't tell: it may have been given out again
            return False
        if pointers != self.gradients and [g.numel() for g in mine] != self.sizes:
            return False
        if not plain:
            for t, (g, p) in enumerate(zip(mine, self.params, strict=True)):
                if g.stride() != p.stride():
                    mine[t] = torch.empty_like(p, dtype=g.dtype).copy_(g)
            pointers = [g.data_ptr() for g in mine]
        self.grads, self.gradients = mine, pointers
        return True

    def begin(self, clock: float) -> None:
        """Make the coming step's table: a row for each distinct (group, counters). Nothing is counted yet."""
        self.after = {name: v + 1 for name, v in self.counters.items()}
        if not len(self.row) or any((v[self.first][self.row] != v).any() for v in self.after.values()):
            keys = list(zip(self.group, *(v.tolist() for v in self.after.values()), strict=True))
            distinct = {key: r for r, key in enumerate(dict.fromkeys(keys))}
            self.row = np.array([distinct[key] for key in keys], np.int32)
            self.first = np.array([keys.index(key) for key in distinct], np.int32)
        self.clock = clock
        cells, sets = [], []
        for t in self.first.tolist():
            counters = {name: float(v[t]) for name, v in self.after.items()}
            row, set_ = self.program.scalars.row(self.groups[self.group[t]], counters, clock)
            cells.append(row)
            sets.append(set_)
        self.table64 = np.array(cells, np.float64).reshape(len(cells), -1)
        self.table = self.table64 if self.compute == torch.float64 else self.table64.astype(np.float32)
        self.rows = torch.from_numpy(self.table).to(self.device, non_blocking=True)
        self.positions = {}  # of rings: by the first counter of their chain
        for name, piece in self.program.rings.items():
            if piece.chain.derive:
                self.positions[name] = (self.after[piece.chain.derive.counters[0]] - 1).astype(np.int64)
        for r, set_ in enumerate(sets):
            for name, value in set_.items():
                self.after[name][self.row == r] = value

    def count(self) -> None:
        """The step is applied: move the counters."""
        for name, v in self.after.items():
            self.counters[name][:] = v

    def entry(self, name: str, t: int) -> Tensor:
        """Tensor t's slot; of a ring the entry that this step replaces."""
        slot = self.slots[name][t]
        return slot[int(self.positions[name][t]) % len(slot)] if name in self.program.rings else slot


def detour(p: Tensor, rounding: str) -> str:
    """Why this parameter can only be run by eager; empty if any backend can."""
    if sharding.is_sharded(p):
        sharding.placements(p)
    flat = sharding.local(p.detach())
    if not dense(flat):
        return "not dense in memory"
    if rounding == "stochastic" and not isinstance(sharding.logical_index(p), int):
        return "stochastic rounding follows the logical index, and memory does not"
    return ""


def everything(state: Mapping[Tensor, dict]) -> list[Any]:
    """All objects that a state consists of."""
    return [*state, *state.values(), *chain.from_iterable(map(dict.values, state.values()))]


def same(these: list[Any], those: list[Any]) -> bool:
    """Whether two lists hold the very same objects."""
    return len(these) == len(those) and all(map(is_, these, those))


class Plan:
    """Batches and the order of their passes, for one set of parameters with gradients."""

    def __init__(self, batches: list[Batch], params: list[Tensor], grads: Sequence[Tensor | None], structure: list):
        self.batches, self.params, self.structure = batches, params, structure
        self.missing = [g is None for g in grads]
        self.schedule = schedule(batches)
        self.sharded = any(map(sharding.is_sharded, params))  # also those without a gradient on this rank

    def attach(self, state: Mapping[Tensor, dict]) -> None:
        for batch in self.batches:
            batch.attach(state)
        self.state = everything(state)

    def fits(self, state: Mapping, params: list[Tensor], grads: Sequence[Any], structure: list) -> bool:
        """Whether nothing has changed but values: the same parameters, state, options and kinds of gradients.

        If so the batches hold the gradients.
        """
        return (
            same(params, self.params)
            and [g is None for g in grads] == self.missing
            and structure == self.structure
            and same(everything(state), self.state)
            and all([b.bind(grads) for b in self.batches])
        )

    def measure(self, ready: list[tuple[Batch, Pass]], groups: Sequence[Mapping[str, Any]], clock: float) -> None:
        """Reduce one measure over all its batches, complete it over shards, and give its results."""
        placed = ready[0][1].measured
        link = placed.measure
        parts = [torch.cat((b.backend.reduce(ps), b.numel), 1) for b, ps in ready]  # the last column counts elements
        if self.sharded:
            totals = torch.zeros(len(self.params), parts[0].shape[1], dtype=torch.float64, device=parts[0].device)
            for (batch, _), part in zip(ready, parts, strict=True):
                totals[batch.index] = part.to(totals.device)
            sharding.complete(totals, [*link.reduce.values(), "sum"], self.params)
            parts = [totals] if link.scope == "all" else [totals[b.index].to(b.device) for b, _ in ready]
        if link.scope == "all":
            device = parts[0].device
            cells = ready[0][0].program.scalars.shared(placed, groups, clock)
            columns = [torch.tensor(c, dtype=torch.float64, device=device) for c in cells]
            shared = finish(link, torch.cat([x.to(device) for x in parts]), columns)
        for i, (batch, ps) in enumerate(ready):
            scalars = batch.program.scalars
            if link.scope == "tensor":
                columns = [
                    batch.measured[:, c.at].double()
                    if c.measured
                    else torch.from_numpy(batch.table64[batch.row, c.at]).to(batch.device)
                    for c in scalars.of[ps.end]
                ]
                shared = finish(link, parts[i], columns)
            for name, value in zip(link.gives, shared, strict=True):
                batch.measured[:, scalars.measured.index((ps.measured.chain, name))] = value


def finish(link: Measure, totals: Tensor, cells: list[Tensor]) -> tuple[Tensor, ...]:
    """Run a measure's `finish` on vectors [tensors], or over all on their total; the last of the totals is numel."""
    over_all = link.scope == "all"
    columns = []
    for j, how in enumerate(link.reduce.values()):
        column, count = totals[:, j], totals[:, -1]
        if over_all:
            column, count = column.max() if how == "max" else column.sum(), count.sum()
        columns.append(column / count.clamp(min=1) if how == "mean" else column)
    out = link.finish(*columns, *cells)
    return out if isinstance(out, tuple) else (out,)


def schedule(batches: list[Batch]) -> list[list[tuple[Batch, Pass]]]:
    """The measures in an order that suits every chain; one link's measure runs over all its batches at once."""

    waiting = []
    for batch in batches:
        links = [ps.measure for ps in batch.program.passes if ps.measure]
        keys = [(id(x.link), x.chain.name) for x in links]
        named = [(*key, keys[:i].count(key)) for i, key in enumerate(keys)]
        waiting.append((batch, list(zip(named, batch.program.passes, strict=False))))
    order = []
    while any(queue for _, queue in waiting):
        heads = [queue[0][0] for _, queue in waiting if queue]
        free = [key for key in heads if all(key not in dict(queue[1:]) for _, queue in waiting)]
        if not free:
            names = ", ".join(sorted({queue[0][1].measured.label for _, queue in waiting if queue}))
            raise ValueError(f"the measures {names} stand in another order in another group: use one order")
        order.append([(b, queue.pop(0)[1]) for b, queue in waiting if queue and queue[0][0] == free[0]])
    return order
