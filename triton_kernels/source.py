"""A pass as Triton text: the rules as functions, one after the other, on the registers of a tile."""

from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..backends.csource import in_units
from ..scalars import Column
from ..transform import AXES, Stage
from .rules import as_jit

if TYPE_CHECKING:
    from ..chain import Placed
    from ..plan import Kind, Pass

TYPES = {
    torch.float32: "tl.float32",
    torch.float64: "tl.float64",
    torch.bfloat16: "tl.bfloat16",
    torch.float16: "tl.float16",
}

TEXT = """# {title}
import triton
import triton.language as tl

from gradkit.triton_kernels.memory import give, inside, load, narrow, number, philox, spread, stochastic, store, widen
from gradkit.triton_kernels.memory import is_last, max_of, maximum, peak, sum_of, total
from gradkit.triton_kernels.memory import load_box, most_of_units, only, peaks, store_box, sum_of_units, totals
{more}
# The loader puts the rules among these globals: {rules}.


@triton.jit
def tile({inputs}, at, left, FULL: tl.constexpr, TILE: tl.constexpr):
    {body}


@triton.jit(do_not_specialize=[{arguments}])
def {name}({signature}, CHUNK: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr):
    block = tl.program_id(0)
    {opening}
    at = 0
    while at < full:
        {loop_full}
        at += {stride}
    while at < left:
        {loop_rest}
        at += {stride}
    {ending}
"""

APPLY = ("step", "fixed", "blocks", "measured", "T")
REDUCE = (*APPLY, "memory", "joint", "partials", "counters", "base", "O")
APPLY_BOXES = ("step", "fixed", "items", "measured", "T")
REDUCE_BOXES = (*APPLY_BOXES, *REDUCE[len(APPLY) :])
REDUCE_UNITS = (*APPLY_BOXES, "partials", "counters", "out")
# Of a box of rows or columns, 64 bits each: lines of WIDE lanes lie `skip` elements apart, and each of `left` steps
# goes `advance` elements on; `down` lines and `along` lanes fewer are there then. Units lie across lanes (side 1) or
# lines. A panel's partial results stand from `first` on, this block's from `place` on; a unit has `many` elements.
ITEM = tuple(
    "t start lines lanes left fast skip advance down along unit units side panel place first chunks many".split()
)
ARGUMENTS: dict[str, Any] = {  # tensors of these dtypes, and numbers
    **dict.fromkeys(("step", "fixed", "joint", "items"), torch.int64),
    **dict.fromkeys(("blocks", "counters"), torch.int32),
    **dict.fromkeys(("memory", "partials", "out"), torch.float64),
    **{"measured": torch.float32, "T": 2, "base": 2, "O": 2},
}
FOLD = 4  # tiles of partial results that the last block reads at once


class Layout:
    """Where a batch's tables hold what. In words of 64 bits; T tensors.

    fixed [roles, T]: addresses, sizes, what the random bits depend on, and where it says what a split selects.
    step: the clock, what `finish` over all asks for, each tensor's gradient's address and row, then the rows: scalars
        and the positions of rings.
    """

    def __init__(self, kind: "Kind"):
        program = kind.program
        stores = ["p", *(f"s_{n}" for n in program.slots), *["rest"] * (kind.rounding == "kahan")]
        random = ["element", "index", "key"] if kind.rounding == "stochastic" else []
        units = ["given", "number"] if program.axis is not None else []  # of the first: what it was given, its place
        split = ["marks", "counts"] if program.splits else []  # as launch.marks says
        self.fixed = {role: i for i, role in enumerate([*stores, "size", *random, *units, *split])}
        self.shared = [ps for ps in program.passes if ps.measure and ps.measure.link.scope == "all"]
        self.cells, self.head = {}, 1
        for ps in self.shared:
            self.cells[ps.end] = self.head
            self.head += len(ps.measure.link.scalars)
        self.rings = {f"s_{n}": len(program.scalars.rows) + i for i, n in enumerate(program.rings)}
        self.columns = len(program.scalars.rows) + len(self.rings)
        self.measured, self.by_unit = max(1, len(program.scalars.measured)), len(program.scalars.by_unit)

    def of(self, role: str) -> str:
        """The expression of tensor t's word."""
        return f"tl.load(step + {self.head} + t)" if role == "g" else f"tl.load(fixed + {self.fixed[role]} * T + t)"

    def scalar(self, column: Column) -> str:
        if column.table == "h":
            return f"number(row + {column.at})"
        return f"tl.load(measured + t * {self.measured} + {column.at})"


class Source(NamedTuple):
    """A kernel's text, and the functions that it calls by the names they have there."""

    text: str
    rules: dict[str, Any]


class Writer:
    """What the kernels of one pass have in common: from addresses to the registers u, p, g and s_<slot> of a tile."""

    def __init__(self, kind: "Kind", ps: "Pass"):
        self.kind, self.ps, self.layout = kind, ps, Layout(kind)
        self.rules: dict[str, Any] = {}
        self.kahan = kind.rounding == "kahan" and ps.reads_p
        slots = dict(zip(kind.program.slots, kind.slots, strict=True))
        self.roles = {"p": kind.dtype, "g": kind.gdtype, **{f"s_{n}": slots[n] for n in ps.slots}}
        if not ps.reads_p:
            del self.roles["p"]
        if self.kahan:
            self.roles["rest"] = kind.dtype
        self.streams = self.roles  # what is as long as the parameter
        self.used = sorted({c for i, _ in ps.rules for c in kind.program.scalars.of[i]})
        self.inputs = [*(f"P_{r}" for r in self.roles), *(c.register for c in self.used)]
        self.link = ps.measure.link if ps.measure else None
        self.watches = bool(self.link and "before" in self.link.sees)

    def function(self, name: str, plain: Any) -> str:
        """The name under which the text calls a function."""
        self.rules[name] = as_jit(plain)
        return name

    def where(self) -> list[str]:
        """Which tensor t, and where in it."""
        return ["t = tl.load(blocks + 2 * block)", "start = tl.load(blocks + 2 * block + 1).to(tl.int64) * CHUNK"]

    def extent(self, aligned: str) -> list[str]:
        """How far it goes, and how far on the fast way."""
        left = "left = tl.minimum(size - start, CHUNK).to(tl.int32)"
        return [left, f"full = tl.where({aligned}, left // TILE * TILE, 0)"]

    def scalar(self, column: Column) -> str:
        return f"spread({self.layout.scalar(column)}, TILE)"

    def opening(self) -> list[str]:
        """Tensor t's pointers at this block, its scalars, and how many elements go the fast way."""
        layout, lines = self.layout, [*self.where(), f"size = {self.layout.of('size')}"]
        lines.append(f"row = step + {layout.head} + 2 * T + tl.load(step + {layout.head} + T + t) * {layout.columns}")
        for role, dtype in self.streams.items():
            at = layout.rings.get(role)  # the column of its position: entries lie one after the other
            entry = "" if at is None else f" + number(row + {at}).to(tl.int64) * size * {dtype.itemsize}"
            lines += [
                f"A_{role} = {layout.of(role)}{entry} + start * {dtype.itemsize}",
                f"P_{role} = A_{role}.to(tl.pointer_type({TYPES[dtype]}))",
            ]
        addresses = " | ".join(f"A_{role}" for role in self.streams)
        lines += self.extent(f"({addresses}) & 15 == 0")
        return lines + [f"{c.register} = {self.scalar(c)}" for c in self.used]

    def loads(self) -> list[str]:
        return [f"{r} = load(P_{r}, at, left, FULL, TILE)" for r in self.streams]

    def stored(self, role: str, value: str) -> str:
        return f"store(P_{role}, at, left, {value}, FULL, TILE)"

    def inside(self, x: str) -> str:
        return f"inside({x}, at, left, FULL, TILE)"

    stride, lanes, more = "TILE", "at + tl.arange(0, TILE)", ""
    apply: tuple[str, ...] = APPLY
    reduce: tuple[str, ...] = REDUCE

    def links(self) -> list[str]:
        """Loads, then the rules."""
        return self.begin() + self.watched(self.calls(self.ps.rules))

    def begin(self) -> list[str]:
        lines = self.loads()
        if self.kahan:
            lines += ["stored = p", "p = stored + rest", "p_before = p"]
        lines += ["g = -g"] * self.kind.program.maximize + ["u = g"]
        return lines + ["before = u"] * self.watches

    def watched(self, calls: list[str]) -> list[str]:
        """With what the last rule is given, where the measure asks for it."""
        return [*calls[:-1], *["before = u"] * self.watches, *calls[-1:]] if calls else []

    def calls(self, rules: "list[tuple[int, Placed]]") -> list[str]:
        lines = []
        for i, placed in rules:
            rule, registers = placed.link, [f"s_{n}" for n in placed.holds]
            given = ["u", *rule.sees, *registers, *(c.register for c in self.kind.program.scalars.of[i])]
            flows = "p" if rule.stage == Stage.WRITE else "u"
            name = self.function(f"r{i}_{rule.name}", rule)
            lines.append(f"{', '.join([flows, *registers])} = {name}({', '.join(given)})")
        return lines

    def call(self) -> str:
        return f"tile({', '.join(self.inputs)}, at, left, FULL, TILE)"

    def text(self, arguments: tuple[str, ...], **parts: Any) -> Source:
        """The whole module; parts: the lines of each place in TEXT."""
        lines = {name: ("\n" + " " * 4 * (1 + (name == "loop"))).join(x) for name, x in parts.items()}
        chain = " -> ".join(x.label for x in self.kind.program.pieces[: self.ps.end + 1])
        name = f"gradkit_{chain}".replace(" -> ", "_").replace(".", "_")[:100]
        text = TEXT.format(
            title=f"{chain}; parameters {TYPES[self.kind.dtype]}, gradients {TYPES[self.kind.gdtype]}",
            inputs=", ".join(self.inputs),
            rules=", ".join(self.rules) or "none",
            arguments=", ".join(map(repr, arguments)),
            signature=", ".join(arguments),
            name=name,
            more=self.more,
            stride=self.stride,
            loop_full=lines["loop"].replace("FULL", "True"),
            loop_rest=lines["loop"].replace("FULL", "False"),
            **lines,
        )
        return Source(text, self.rules)


class Boxes(Writer):
    """A pass over boxes of rows or columns: a tile is some lines of WIDE lanes."""

    stride, lanes = "1", "here + line * skip + lane"
    apply = APPLY_BOXES
    reduce = REDUCE_BOXES

    def __init__(self, kind: "Kind", ps: "Pass"):
        super().__init__(kind, ps)
        self.inputs += ["line", "lane", "lines", "lanes", "skip", "advance", "down", "along"]

    def where(self) -> list[str]:
        lines = [f"{name} = tl.load(items + {len(ITEM)} * block + {i})" for i, name in enumerate(ITEM)]
        lines += ["line, lane = tl.arange(0, TILE) // WIDE, tl.arange(0, TILE) % WIDE"]
        lines += [f"{name} = {name}.to(tl.int32)" for name in ("lines", "lanes", "left", "skip", "down", "along")]
        cell = f"tl.pointer_type({TYPES[self.kind.compute]})"
        return [*lines, f"given = {self.layout.of('given')}.to({cell}) + unit * {self.layout.by_unit}"]

    def extent(self, aligned: str) -> list[str]:
        return [f"full = tl.where({aligned}, fast, 0)"]

    def scalar(self, column: Column) -> str:
        if column.table != "r":
            return super().scalar(column)
        at = f"tl.where(side > 0, lane, line) * {self.layout.by_unit} + {column.at}"
        return f"tl.load(given + {at}, mask=tl.where(side > 0, lane, line) < units, other=0.0)"

    def loads(self) -> list[str]:
        here = ["here = at * advance", "ok = (line < lines - at * down) & (lane < lanes - at * along)"]
        return here + [f"{r} = load_box(P_{r}, here, line, lane, skip, ok, FULL)" for r in self.roles]

    def stored(self, role: str, value: str) -> str:
        return f"store_box(P_{role}, here, line, lane, skip, ok, {value}, FULL)"

    def inside(self, x: str) -> str:
        return f"only({x}, ok, FULL)"


class Partial(Writer):
    """A pass with a split: the slots of what is selected lie side by side, and meet their elements in registers."""

    more = "from gradkit.triton_kernels.memory import load_selected, selected, store_selected\n"

    def __init__(self, kind: "Kind", ps: "Pass"):
        super().__init__(kind, ps)
        self.selected = [f"s_{n}" for n in ps.low]
        self.streams = {r: d for r, d in self.roles.items() if r not in self.selected}
        self.inputs += ["P_marks", "P_counts"]

    def opening(self) -> list[str]:
        of = self.layout.of
        lines = [f"P_{r} = {of(r)}.to(tl.pointer_type({TYPES[self.roles[r]]}))" for r in self.selected]
        lines.append(f"P_marks = ({of('marks')} + start // 16 * 4).to(tl.pointer_type(tl.int32))")
        lines.append(f"P_counts = ({of('counts')} + start // TILE * 8).to(tl.pointer_type(tl.int64))")
        return super().opening() + lines

    def loads(self) -> list[str]:
        lines = ["chosen, place = selected(P_marks, at, left, FULL, TILE)", "first = tl.load(P_counts + at // TILE)"]
        own = [f"{r} = load_selected(P_{r}, first, place, chosen)" for r in self.selected]
        return lines + super().loads() + own

    def stored(self, role: str, value: str) -> str:
        if role in self.selected:
            return f"store_selected(P_{role}, first, place, chosen, {value})"
        return super().stored(role, value)

    def links(self) -> list[str]:
        """Both sides of the split on all lanes, of which each takes one."""
        before, inside, outside, behind = map(self.calls, self.ps.parts())
        sides = ["entry = u", *inside, "inner, u = u, entry", *outside, "u = tl.where(chosen, inner, u)"]
        after = self.watched(behind) or ["before = entry"] * self.watches
        return [*self.begin(), *before, *sides, *after]


def writer(kind: "Kind", ps: "Pass") -> Writer:
    return (Partial if ps.splits else Boxes if in_units(kind, ps) else Writer)(kind, ps)


@lru_cache(maxsize=64)
def apply(kind: "Kind", ps: "Pass") -> Source:
    """The whole chain, and the stores."""
    w = writer(kind, ps)
    opening = w.opening()
    if kind.rounding == "stochastic" and ps.target == "p":
        random = {r: w.layout.of(r) for r in ("element", "index", "key")}
        opening += [*(f"{r} = {x}" for r, x in random.items()), "element += start", "clock = tl.load(step)"]
        w.inputs += [*random, "clock"]
    body = w.links() + write(w)
    body += [w.stored(f"s_{n}", f"narrow(s_{n}, {TYPES[w.roles[f's_{n}']]})") for n in ps.stores]
    return w.text(w.apply, opening=opening, body=body, loop=[w.call()], ending=[])


def write(w: Writer) -> list[str]:
    """The stores of the gradient, to nearest, or of the parameter, as its rounding says."""
    if w.ps.target != "p":
        return [w.stored("g", f"narrow(u, {TYPES[w.kind.gdtype]})")] * (w.ps.target == "g")
    low = TYPES[w.kind.dtype]
    if w.kind.rounding == "stochastic":
        return [w.stored("p", f"stochastic(p, philox(element + {w.lanes}, clock, index, key), {low})")]
    if w.kind.rounding == "kahan":  # one that did not move keeps its bits, also on a tie
        return [
            f"near = widen(narrow(p, {low}))",
            "moved = p != p_before",
            w.stored("p", f"narrow(tl.where(moved, near, stored), {low})"),
            w.stored("rest", f"narrow(tl.where(moved, p - near, rest), {low})"),
        ]
    return [w.stored("p", f"narrow(p, {low})")]


@lru_cache(maxsize=64)
def measure(kind: "Kind", ps: "Pass") -> Source:
    """The measure of a pass; the last block of what it is over runs its `finish` and gives the results."""
    w, link = writer(kind, ps), ps.measure.link
    finish = w.function(f"finish_{link.finish.__name__}", link.end)
    if link.scope in AXES:
        return units(w, finish)
    if link.scope == "all":
        cells = [f"number(step + {w.layout.cells[ps.end] + i})" for i in range(len(link.scalars))]
    else:
        cells = [f"{w.layout.scalar(c)}.to(tl.float64)" for c in kind.program.scalars.of[ps.end]]
    given = [f"v{i}" for i in range(len(link.gives))]
    totals = [f"x{j}" for j in range(len(link.reduce))]
    columns = kind.program.memory
    at = [f"t * {len(columns)} + {columns.index(n)}" if link.scope == "tensor" else i for i, n in enumerate(ps.memory)]
    places = [f"memory + {x}" for x in at]
    kept = [f"k{i}" for i in range(len(places))]
    taken = [*totals, *(f"tl.load({place})" for place in places), *cells]
    last = [f"{', '.join([*given, *kept])} = {finish}({', '.join(taken)})"]
    last += [f"tl.store({place}, {x})" for place, x in zip(places, kept, strict=True)]
    return reduction(w, last, given, TYPES[kind.compute], link.scope == "all")


@lru_cache(maxsize=64)
def totals(kind: "Kind", ps: "Pass") -> Source:
    """The totals of each tensor or row, for a `finish` on the host's side: over shards, or beside other backends."""
    if ps.measure.link.scope in AXES:
        return units(writer(kind, ps), "")
    return reduction(writer(kind, ps), [], [f"x{j}" for j in range(len(ps.measure.link.reduce))], "tl.float64")


def reduction(w: Writer, last: list[str], given: list[str], cell: str, over_all: bool = False) -> Source:
    """Partial results of each block in fixed order, float32 in a block's lanes and float64 from there on."""
    link = w.ps.measure.link
    how, count = list(link.reduce.values()), len(link.reduce)
    # the group that finishes together, how many there are, and how many cells take its results
    k, groups, outputs = ("0", "1", "O") if over_all else ("t", "O", "1")
    ending = [f"here = partials + (base + block) * {count}"]
    ending += [f"tl.store(here + {j}, {'peak' if x == 'max' else 'total'}(a{j}))" for j, x in enumerate(how)]
    ending += [f"first, end = tl.load(joint + {k}), tl.load(joint + {groups} + {k})"]
    inner = []
    for j, x in enumerate(how):
        fold = "max_of" if x == "max" else "sum_of"
        mean = f" / number(joint + 2 * {groups} + {k})" if x == "mean" and last else ""
        inner.append(f"x{j} = {fold}(partials + {j}, first, end, {count}, {FOLD} * TILE){mean}")
    inner += last
    inner += [f"give(joint + 3 * {groups} + {i} * O + {k}, {outputs}, {x}, {cell}, TILE)" for i, x in enumerate(given)]
    inner.append(f"tl.store(counters + {k}, 0)")
    ending += [f"if is_last(counters + {k}, end - first):", *(f"    {line}" for line in inner)]
    return reducing(w, w.reduce, ending)


def reducing(w: Writer, arguments: tuple[str, ...], ending: list[str]) -> Source:
    """A kernel that maps, adds up in lanes a0, a1, ..., and then does what `ending` says."""
    link = w.ps.measure.link
    names = [f"x{j}" for j in range(len(link.reduce))]
    values, body = ", ".join(names), w.links()
    body.append(f"{values} = {w.function(f'map_{link.name}', link)}({', '.join(['u', *link.sees])})")
    body.append(f"return {', '.join(map(w.inside, names))}")
    how = enumerate(link.reduce.values())
    add = [f"a{j} = maximum(a{j}, x{j})" if x == "max" else f"a{j} = a{j} + x{j}" for j, x in how]
    zeros = [f"a{j} = tl.zeros([TILE], tl.float32)" for j in range(len(names))]
    return w.text(
        arguments, opening=w.opening() + zeros, body=body, loop=[f"{values} = {w.call()}", *add], ending=ending
    )


def units(w: Writer, finish: str) -> Source:
    """The measure of each row or column: the last block of a panel of them finishes; without `finish` their totals."""
    link, count, cell = w.ps.measure.link, len(w.ps.measure.link.reduce), TYPES[w.kind.compute]
    ending, inner = [f"here = partials + place * {count}"], ["j = tl.arange(0, WIDE)", "mine = j < units"]
    for i, how in enumerate(link.reduce.values()):
        ending.append(f"{'peaks' if how == 'max' else 'totals'}(a{i}, here + {i}, {count}, side, units, TILE, WIDE)")
        fold = "most_of_units" if how == "max" else "sum_of_units"
        mean = " / many" if how == "mean" and finish else ""
        inner.append(f"x{i} = {fold}(partials + first * {count} + {i}, units, chunks, {count}, WIDE){mean}")
    if finish:
        cells = []
        for n, c in enumerate(w.kind.program.scalars.of[w.ps.end]):
            beside = f"tl.load(given + j * {w.layout.by_unit} + {c.at}, mask=mine, other=0.0).to(tl.float64)"
            even = f"tl.full([WIDE], {w.layout.scalar(c)}.to(tl.float64), tl.float64)" if c.table != "r" else ""
            cells.append(f"c{n}")
            inner.append(f"c{n} = {even or beside}")
        names = [f"v{i}" for i in range(len(link.gives))]
        taken = ", ".join([*(f"x{i}" for i in range(count)), *cells])
        inner.append(f"{', '.join(names)} = {finish}({taken})")
        for name, x in zip(link.gives, names, strict=True):
            column = w.kind.program.scalars.by_unit.index((w.ps.measure.chain, name))
            inner.append(f"tl.store(given + j * {w.layout.by_unit} + {column}, {x}.to({cell}), mask=mine)")
    else:
        number = f"({w.layout.of('number')} + unit + j)"
        inner += [f"tl.store(out + {number} * {count} + {i}, x{i}, mask=mine)" for i in range(count)]
    inner.append("tl.store(counters + panel, 0)")
    ending += ["if is_last(counters + panel, chunks):", *(f"    {line}" for line in inner)]
    return reducing(w, REDUCE_UNITS, ending)
