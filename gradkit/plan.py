"""From groups and gradients to batches and passes: what runs, over which tensors, in which order. No math."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import accumulate, chain
from operator import is_
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import sharding
from .chain import Placed, share_slots
from .reduction import joined, order
from .scalars import Scalars, look, number
from .selection import Choice, Turn, turn_of
from .transform import AXES, Measure, Rule, Stage

if TYPE_CHECKING:
    from .backends import Eager, Native, Triton


class Pass:
    """The rules up to a measure, recomputed, which store nothing; or all rules, and the stores.

    target: what it stores beside slots: "p", the parameter; "g", the gradient, which becomes what flows; or "".
    """

    def __init__(self, pieces: Sequence[Placed], end: int, target: str):
        self.measure: Any = pieces[end] if end < len(pieces) else None  # a Placed
        self.end = end
        self.memory = kept(self.measure) if self.measure else []
        self.target = "" if self.measure else target
        self.rules = [(i, x) for i, x in enumerate(pieces[:end]) if isinstance(x.link, Rule)]
        self.slots = list(dict.fromkeys(n for _, x in self.rules for n in x.holds))
        self.splits = any(x.partial for _, x in self.rules)
        self.low = list(dict.fromkeys(n for _, x in self.rules if x.partial for n in x.holds))
        changed = {n for _, x in self.rules for n, c in zip(x.holds, x.link.changes, strict=True) if c}
        self.stores = [n for n in self.slots if n in changed and not self.measure]
        seen = [x.link.sees for x in (*(x for _, x in self.rules), *([self.measure] if self.measure else []))]
        self.reads_p = self.target == "p" or any("p" in names for names in seen)

    def parts(self) -> tuple[list, list, list, list]:
        """The rules before a split, those of its two sides, and those behind; without one all are before."""
        partial = [x.partial for _, x in self.rules]
        start, end = (
            (partial.index(True), len(partial) - partial[::-1].index(True)) if self.splits else (len(partial),) * 2
        )
        inside = [x for x in self.rules[start:end] if x[1].selected]
        return self.rules[:start], inside, self.rules[start + len(inside) : end], self.rules[end:]


def kept(piece: Placed) -> list[str]:
    """What the numbers that a measure keeps are called in `state[p]`; over all tensors, in the first group."""
    start = f"{piece.chain.name}." if piece.link.scope == "all" else piece.chain.prefix
    return [start + name for name in piece.link.state]


class Program:
    """A chain that was checked: its scalars, slots and passes.

    target: what a chain without a write stores, as of a Pass.
    """

    def __init__(self, pieces: Sequence[Placed], group: Mapping[str, Any], target: str = ""):
        pieces, owners = share_slots(pieces)
        self.pieces, self.maximize = pieces, bool(group["maximize"])
        self.scalars = Scalars(pieces, group)
        self.slots = {name: slot for name, (_, slot) in owners.items()}
        self.rings = {name: piece for name, (piece, slot) in owners.items() if slot.kind == "ring"}
        keeping = [x for x in pieces if isinstance(x.link, Measure) and x.link.state]
        named = [(x, n) for x in keeping if x.link.scope == "tensor" for n in kept(x)]
        self.memory = [name for _, name in named]
        self.shared = [n for x in keeping if x.link.scope == "all" for n in kept(x)]
        for x in keeping:
            if x.link.scope == "all" and (not x.chain.name or {*x.link.state} & {*x.chain.arguments}):
                raise ValueError(
                    f"{x.label} keeps {', '.join(x.link.state)} in the first group: give its chain name=, and "
                    f"arguments other names"
                )
        taken = [*self.scalars.counters, "compensation"]
        for piece, name in [*((x, n) for n, (x, _) in owners.items()), *named]:
            if name in taken:
                raise ValueError(f"{piece.label} owns a slot named {name!r}, which is taken; rename it")
            taken.append(name)
        for name, piece in self.rings.items():
            if piece.chain.derive is None or not piece.chain.derive.counters:
                raise ValueError(f"{piece.label}: the ring {name!r} needs @derive('step', ...) on its chain")
        ends = [i for i, x in enumerate(pieces) if isinstance(x.link, Measure)] + [len(pieces)]
        target = "p" if any(x.stage == Stage.WRITE for x in pieces) else target
        self.passes = [Pass(pieces, end, target) for end in ends]
        parts = {x.link.scope: x.label for x in pieces if isinstance(x.link, Measure) and x.link.scope in AXES}
        if len(parts) > 1:
            raise ValueError(f"{parts['row']} measures rows and {parts['column']} columns: a chain may do one of them")
        self.axis = next((AXES[scope] for scope in parts), None)  # along which units lie
        self.no_source = next((x.link.code.no_source for x in pieces if x.link.code.no_source), "")
        splits = list({id(x.side.split.link): x.side.split for x in pieces if x.side}.values())
        if len(splits) > 1:
            raise ValueError("two splits in one chain: a chain may have one")
        self.split = splits[0] if splits else None  # a Placed
        self.splits = any(x.partial for x in pieces)
        chains = [x.chain for x in (*splits, *pieces)]
        self.arguments = {f"{c.name}.{n}": v for c in chains for n, v in c.arguments.items()}
        if self.split and self.splits and self.axis is not None and self.split.link.kind != "blocks":
            raise ValueError(
                f"a measure of {next(iter(parts))}s and a split of {self.split.link.kind}: a chain may have one"
            )
        self.low = {n for n, (x, _) in owners.items() if x.side}  # what a split holds in `state[p]`
        self.low |= {x.counter(c) for x in self.scalars.derived if x.side and (d := x.chain.derive) for c in d.counters}

    def only(self, selected: bool) -> list[Placed]:
        """What runs on tensors that a split selects as a whole, or not at all."""
        sides = [x for x in self.pieces if not x.side or x.selected == selected]
        return [x._replace(side=x.side and x.side._replace(whole=True)) for x in sides]

    def excluding(self, group: Mapping[str, Any], name: str) -> tuple[str, ...]:
        """What is True for a parameter of this name: `<chain>.excluded`, where its argument `exclude` says so."""
        patterns = {n: group.get(n, given) for n, given in self.arguments.items() if n.endswith(".exclude")}
        return tuple(f"{n}d" for n, given in patterns.items() if any(fnmatchcase(name, x) for x in given))

    def key(self) -> tuple:
        """Equal for two groups that run the same code."""
        links = (
            (id(x.link), x.stage, x.chain.name, x.prefix, id(x.chain.derive), x.side and x.side[1:])
            for x in self.pieces
        )
        split = self.split and (self.split.link.kind, self.split.link.order, self.split.link.keep)
        return (*links, split, self.maximize)

    def slot_dtype(self, name: str, p: Tensor, group: Mapping[str, Any]) -> torch.dtype:
        declared = self.slots[name].dtype or group["state_dtype"]
        full = declared is None or (declared == torch.float32 and self.slots[name].dtype is not None)
        return compute_dtype(p.dtype) if full else declared

    def layout(self, p: Tensor, group: Mapping[str, Any]) -> dict[str, torch.dtype]:
        """What `state[p]` holds beside counters."""
        rest = {"compensation": p.dtype} if rounding_of(p, group) == "kahan" else {}
        return {n: self.slot_dtype(n, p, group) for n in self.slots} | rest

    def part(self, name: str, chosen: Choice | bool | None) -> tuple[int, ...] | None:
        """The shape of a slot of a split, which covers a part of the parameter."""
        return chosen.slot if isinstance(chosen, Choice) and name in self.low else None

    def ring_length(self, name: str, group: Mapping[str, Any]) -> int | None:
        if name not in self.rings:
            return None
        piece, wanted = self.rings[name], self.slots[name].length
        return int(number(piece, wanted, look(piece, wanted, group, {}, 0.0)))


def rounding_of(p: Tensor, group: Mapping[str, Any]) -> str:
    return group["rounding"] if p.dtype in (torch.bfloat16, torch.float16) else "nearest"


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def dense(t: Tensor) -> bool:
    """Whether the elements fill memory without gaps or overlap, in some order of dimensions."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(t.stride(), t.shape, strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return True


class Kind(NamedTuple):
    """What the tensors of a batch have in common."""

    program: Program
    device: torch.device
    dtype: torch.dtype
    gdtype: torch.dtype
    slots: tuple[torch.dtype, ...]
    rounding: str
    detour: str  # why only eager can run it; empty if any backend can

    @property
    def compute(self) -> torch.dtype:
        return compute_dtype(self.dtype)


def kind_of(program: Program, p: Tensor, g: Tensor, group: Mapping[str, Any]) -> Kind:
    slots = tuple(program.slot_dtype(n, p, group) for n in program.slots)
    rounding = rounding_of(p, group)
    return Kind(program, p.device, p.dtype, g.dtype, slots, rounding, detour(program, p, g, rounding))


class Units(NamedTuple):
    """How a tensor's rows or columns lie in memory: `outer` times, of each `inner` consecutive elements."""

    outer: int
    number: int
    inner: int


class Member(NamedTuple):
    """A parameter and its place."""

    p: Tensor
    at: int  # among all
    group: int
    name: str  # empty without names
    turn: Turn | None = None  # of its group's split, and what that selects of it
    chosen: Choice | bool | None = None


class Batch:
    """Tensors of one kind: what one launch covers."""

    backend: "Eager | Native | Triton"  # chosen when the plan is made

    def __init__(self, kind: Kind, members: "list[Member]", groups: list[dict]):
        self.kind, self.compute, self.groups = kind, kind.compute, groups
        self.owners = [x.p for x in members]
        self.index = [x.at for x in members]
        self.group = [x.group for x in members]
        self.names = [x.name for x in members]
        self.choices = [x.chosen for x in members if isinstance(x.chosen, Choice)]
        self.excluded = [kind.program.excluding(groups[x.group], x.name) for x in members]
        self.program, self.device, self.dtype, self.gdtype, slots, self.rounding, self.detour = kind
        self.slot_dtypes = dict(zip(self.program.slots, slots, strict=True))
        axis = self.program.axis
        self.units = [Units(0, 0, 0) if axis is None else units_of(sharding.local(p), axis) for p in self.owners]
        self.cells: dict[int, list[float]] = {}  # of each measure over all tensors, what its `finish` asks for
        self.sharded = any(map(sharding.is_sharded, self.owners))  # a placement that can't be stepped raised by now

    def attach(self, state: Mapping[Tensor, dict]) -> None:
        """Take hold of the state, which exists by now."""
        states = [state[p] for p in self.owners]
        self.params = [sharding.local(p.detach()) for p in self.owners]
        self.sizes = [p.numel() for p in self.params]
        self.gradients: list[int] = []
        self.copied: list[tuple[int, Tensor]] = []  # which of them, and of what
        self.numel = torch.tensor(self.sizes, dtype=torch.float64, device=self.device)[:, None]
        self.logical = [sharding.logical_index(p) if self.rounding == "stochastic" else 0 for p in self.owners]
        names = [*self.program.slots, *["compensation"] * (self.rounding == "kahan")]
        self.slots = {n: [sharding.local(s[n]) for s in states] for n in names}
        self.pointers = list(map(Tensor.data_ptr, chain(self.params, *self.slots.values())))
        self.counters: dict[str, np.ndarray] = {}
        for name in self.program.scalars.counters:  # one vector; the state holds 0-d views of it
            self.counters[name] = joined(states, [name])[:, 0].numpy()
        names = self.program.memory  # one table; the state holds 0-d views of it
        spare = torch.zeros(len(states), 1, dtype=torch.float64, device=self.device)
        self.memory = joined(states, names) if names else spare
        self.shared: dict[int, Tensor] = {}  # of each measure over all tensors, what it keeps
        columns = len(self.program.scalars.measured)
        self.measured = torch.zeros(len(self.owners), max(1, columns), dtype=self.compute, device=self.device)
        columns = len(self.program.scalars.by_unit)
        self.first_unit = [0, *accumulate(x.number for x in self.units)]
        self.unit_owner = torch.repeat_interleave(torch.tensor([x.number for x in self.units])).to(self.device)
        lengths = [n // max(1, x.number) for n, x in zip(self.sizes, self.units, strict=True)]
        self.unit_numel = torch.tensor(lengths, dtype=torch.float64, device=self.device)[self.unit_owner, None]
        self.by_unit = torch.zeros(len(self.unit_owner), columns, dtype=self.compute, device=self.device)
        self.strides = [p.stride() for p in self.params]
        self.contiguous = all(p.is_contiguous() for p in self.params)
        self.row: np.ndarray = np.zeros(0, np.int32)
        self.first: np.ndarray = self.row

    def bind(self, grads: Sequence[Tensor]) -> bool:
        """Take this step's gradients, unless parameters have moved or gradients are not of the planned kind.

        A gradient of another layout is copied into its parameter's; `give_back` is for those that the plan changes.
        """
        params = [sharding.local(p) for p in self.owners] if self.sharded else self.owners
        if list(map(Tensor.data_ptr, chain(params, *self.slots.values()))) != self.pointers:
            return False
        given = [grads[i] for i in self.index]
        mine = [*given]
        if self.sharded:
            mine = [sharding.local_grad(g, p) for g, p in zip(given, self.owners, strict=True)]
        try:
            plain = all(map(Tensor.is_contiguous, chain(params, mine))) and not any(map(Tensor.is_neg, mine))
            sizes = list(map(Tensor.numel, mine))
            pointers = list(map(Tensor.data_ptr, mine))
        except RuntimeError:  # a sparse gradient has neither
            return False
        if not (plain and self.contiguous) and [p.stride() for p in params] != self.strides:
            return False
        # an address doesn't tell: it may have been given out again
        if {g.dtype for g in mine} != {self.gdtype} or sizes != self.sizes:
            return False
        if not plain:
            for t, (g, p) in enumerate(zip(mine, self.params, strict=True)):
                if g.stride() != p.stride() or g.is_neg():
                    mine[t] = torch.empty_like(p, dtype=g.dtype).copy_(g)
            pointers = list(map(Tensor.data_ptr, mine))
        self.grads, self.gradients = mine, pointers
        self.copied = []
        if self.program.passes[-1].target == "g" and (self.sharded or not plain):
            both = zip(given, mine, strict=True)
            self.copied = [(t, g) for t, (g, x) in enumerate(both) if sharding.local(g) is not x]
        return True

    def give_back(self) -> None:
        """Bring what became of copies to the gradients that they are of."""
        for t, g in self.copied:
            sharding.store(self.grads[t], self.owners[t], g)

    def begin(self, groups: Sequence[Mapping[str, Any]], clock: float) -> None:
        """Make the coming step's table: a row for each distinct (group, counters). Nothing is counted yet."""
        self.after = {name: v + 1 for name, v in self.counters.items()}
        if not len(self.row) or any((v[self.first][self.row] != v).any() for v in self.after.values()):
            keys = list(zip(self.group, self.excluded, *(v.tolist() for v in self.after.values()), strict=True))
            distinct = {key: r for r, key in enumerate(dict.fromkeys(keys))}
            self.row = np.array([distinct[key] for key in keys], np.int32)
            self.first = np.array([keys.index(key) for key in distinct], np.int32)
        self.clock = clock
        cells, sets = [], []
        for t in self.first.tolist():
            counters = {name: float(v[t]) for name, v in self.after.items()}
            group = groups[self.group[t]]
            if self.excluded[t]:
                group = {**group, **dict.fromkeys(self.excluded[t], True)}
            row, set_ = self.program.scalars.row(group, counters, clock)
            cells.append(row)
            sets.append(set_)
        self.table64 = np.array(cells, np.float64).reshape(len(cells), -1)
        self.table = self.table64 if self.compute == torch.float64 else self.table64.astype(np.float32)
        self.positions = {}  # of rings: by the first counter of their chain
        for name, piece in self.program.rings.items():
            if piece.chain.derive:
                self.positions[name] = (self.after[piece.chain.derive.counters[0]] - 1).astype(np.int64)
        for r, set_ in enumerate(sets):
            for name, value in set_.items():
                self.after[name][self.row == r] = value
        self.backend.begin()

    def count(self) -> None:
        """The step is applied: move the counters."""
        for name, v in self.after.items():
            self.counters[name][:] = v

    def entry(self, name: str, t: int) -> Tensor:
        """Tensor t's slot; of a ring the entry that this step replaces."""
        slot = self.slots[name][t]
        return slot[int(self.positions[name][t]) % len(slot)] if name in self.program.rings else slot


def units_of(p: Tensor, axis: int) -> "Units":
    """The rows (axis 0) or columns (axis 1) of a dense tensor."""
    if p.dim() < 2 or (p.shape[axis] == 1 and p.numel()):
        return Units(1, 1, p.numel())
    count, inner = p.shape[axis], p.stride(axis)
    return Units(p.numel() // (count * inner), count, inner) if p.numel() else Units(0, count, 1)


def detour(program: Program, p: Tensor, g: Tensor, rounding: str) -> str:
    """Why this parameter can only be run by eager; empty if any backend can."""
    if sharding.is_sharded(p):
        placements = sharding.placements(p)
        if (
            program.axis is not None
            and p.dim() > 1
            and any(getattr(x, "dim", program.axis) != program.axis for x in placements)
        ):
            parts = "columns" if program.axis else "rows"
            raise TypeError(
                f"a measure of {parts} needs them whole: a parameter placed as {placements} is cut across; shard it "
                f"along dimension {program.axis} (fully_shard takes shard_placement_fn=), or not at all"
            )
    flat = sharding.local(p.detach())
    if hollow(flat) or hollow(sharding.local(g)):
        return "a tensor around others has no memory of its own"
    if not dense(flat):
        return "not dense in memory"
    if rounding == "stochastic" and not isinstance(sharding.logical_index(p), int):
        return "stochastic rounding follows the logical index, and memory does not"
    if program.splits and not flat.is_contiguous():
        return "a selection follows the logical index, and memory does not"
    return ""


def hollow(t: Tensor) -> bool:
    """Whether this is a subclass that wraps other tensors: its address is 0, which a loop would write to."""
    return type(t) not in (Tensor, torch.nn.Parameter) and t.numel() > 0 and t.data_ptr() == 0


def everything(state: Mapping[Tensor, dict]) -> list[Any]:
    """All objects that a state consists of."""
    return [*state, *state.values(), *chain.from_iterable(map(dict.values, state.values()))]


def same(these: list[Any], those: list[Any]) -> bool:
    """Whether two lists hold the very same objects."""
    return len(these) == len(those) and all(map(is_, these, those))


class Plan:
    """Batches and their measures in order, for one set of parameters with gradients."""

    def __init__(self, batches: list[Batch], params: list[Tensor], grads: Sequence[Tensor | None], structure: list):
        self.batches, self.params, self.structure = batches, params, structure
        self.missing = [g is None for g in grads]
        self.reductions = order(batches)
        self.sharded = any(map(sharding.is_sharded, params))  # also those without a gradient on this rank
        self.splits: list[Placed | None] = []
        self.turns: list[Turn | None] = []

    def attach(self, state: Mapping[Tensor, dict], first: dict[str, Any]) -> None:
        """Take hold of the state, and of what the first group holds for measures over all tensors."""
        for batch in self.batches:
            batch.attach(state)
        for reduction in self.reductions:
            reduction.attach(first)
        self.state = everything(state)
        self.shared = {n: first[n] for b in self.batches for n in b.program.shared}

    def release(self) -> None:
        """Let go of the state at once: a batch and its backend hold each other, which keeps both for a while."""
        self.state = []
        for batch in self.batches:
            batch.slots = {}
            vars(batch).pop("backend", None)

    def take_turns(self, splits: Sequence[Placed | None], groups: Sequence[Mapping[str, Any]]) -> None:
        """Remember what is selected in each group."""
        self.splits = list(splits)
        self.turns = self.turns_of(groups)

    def turns_of(self, groups: Sequence[Mapping[str, Any]]) -> list[Turn | None]:
        clock = float(groups[0].get("clock", 0.0)) + 1
        return [s and turn_of(s, g, clock) for s, g in zip(self.splits, groups, strict=True)]

    def fits(self, state: Mapping, params: list[Tensor], grads: Sequence[Any], structure: list, groups: list) -> bool:
        """Whether nothing has changed but values: the same parameters, state, options and kinds of gradients.

        If so the batches hold the gradients.
        """
        return (
            same(params, self.params)
            and [g is None for g in grads] == self.missing
            and structure == self.structure
            and same(everything(state), self.state)
            and all(groups[0].get(n) is x for n, x in self.shared.items())
            and (not any(self.splits) or self.turns_of(groups) == self.turns)
            and all([b.bind(grads) for b in self.batches])
        )

    def begin(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Make the coming step's numbers. Nothing is counted yet."""
        clock = float(groups[0].get("clock", 0.0)) + 1
        for reduction in self.reductions:
            reduction.begin(groups, clock)
        for batch in self.batches:
            batch.begin(groups, clock)

    def reduce(self) -> None:
        for reduction in self.reductions:
            reduction.run(self.params, self.sharded)

    def apply(self) -> None:
        for batch in self.batches:
            batch.backend.apply(batch.program.passes[-1])
            batch.give_back()
            batch.grads, batch.copied = [], []
