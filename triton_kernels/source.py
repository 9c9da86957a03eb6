"""A pass as Triton text: the rules as functions, one after the other, on the registers of a tile."""

from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..scalars import Column
from ..transform import Stage
from .rules import as_jit

if TYPE_CHECKING:
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
from gradkit.triton_kernels.memory import beside, is_last, max_of, maximum, peak, sum_of, total

# The loader puts the rules among these globals: {rules}.


@triton.jit
def tile({inputs}, at, left, FULL: tl.constexpr, TILE: tl.constexpr):
    {body}


@triton.jit(do_not_specialize=[{arguments}])
def {name}({signature}, CHUNK: tl.constexpr, TILE: tl.constexpr):
    block = tl.program_id(0)
    {opening}
    at = 0
    while at < full:
        {loop_full}
        at += TILE
    while at < left:
        {loop_rest}
        at += TILE
    {ending}
"""

APPLY = ("step", "fixed", "blocks", "measured", "T")
REDUCE = (*APPLY, "memory", "joint", "partials", "counters", "base", "O")
ARGUMENTS: dict[str, Any] = {  # tensors of these dtypes, and numbers
    **dict.fromkeys(("step", "fixed", "joint"), torch.int64),
    **dict.fromkeys(("blocks", "counters"), torch.int32),
    **{"measured": torch.float32, "memory": torch.float64, "partials": torch.float64, "T": 2, "base": 2, "O": 2},
}
FOLD = 4  # tiles of partial results that the last block reads at once


class Layout:
    """Where a batch's tables hold what. In words of 64 bits; T tensors.

    fixed [roles, T]: addresses, sizes, and what the random bits depend on.
    step: the clock, what `finish` over all asks for, each tensor's gradient's address and row, then the rows: scalars
        and the positions of rings.
    """

    def __init__(self, kind: "Kind"):
        program = kind.program
        stores = ["p", *(f"s_{n}" for n in program.slots), *["rest"] * (kind.rounding == "kahan")]
        random = ["element", "index", "key"] if kind.rounding == "stochastic" else []
        rows = ["given", "length", "line"] if program.by_row else []  # what the first row was given, its number
        self.fixed = {role: i for i, role in enumerate([*stores, "size", *random, *rows])}
        self.shared = [ps for ps in program.passes if ps.measure and ps.measure.link.scope == "all"]
        self.cells, self.head = {}, 1
        for ps in self.shared:
            self.cells[ps.end] = self.head
            self.head += len(ps.measure.link.scalars)
        self.rings = {f"s_{n}": len(program.scalars.rows) + i for i, n in enumerate(program.rings)}
        self.columns = len(program.scalars.rows) + len(self.rings)
        self.measured, self.by_row = max(1, len(program.scalars.measured)), len(program.scalars.by_row)

    def of(self, role: str) -> str:
        """The expression of tensor t's word."""
        return f"tl.load(step + {self.head} + t)" if role == "g" else f"tl.load(fixed + {self.fixed[role]} * T + t)"

    def scalar(self, column: Column) -> str:
        if column.table == "h":
            return f"number(row + {column.at})"
        if column.table == "r":
            return f"tl.load(given + {column.at})"
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
        self.used = sorted({c for i, _ in ps.rules for c in kind.program.scalars.of[i]})
        self.even = [c for c in self.used if c.table != "r"]  # the same for the whole block
        self.each_row = ps.measure is not None and ps.measure.link.scope == "row"  # a block is part of a row
        self.inputs = [*(f"P_{r}" for r in self.roles), *(c.register for c in self.even)]
        self.inputs += ["given", "length", "past"] * (len(self.even) < len(self.used))

    def function(self, name: str, plain: Any) -> str:
        """The name under which the text calls a function."""
        self.rules[name] = as_jit(plain)
        return name

    def opening(self) -> list[str]:
        """Tensor t's pointers at this block, its scalars, and how many elements go the fast way."""
        layout, words = self.layout, 3 if self.each_row else 2
        lines = [f"t = tl.load(blocks + {words} * block)", f"size = {layout.of('size')}", "end = size"]
        lines.append(f"start = tl.load(blocks + {words} * block + 1).to(tl.int64) * CHUNK")
        if self.kind.program.by_row:  # the length of a vector, which is one row, is 0
            lines.append(f"length = {layout.of('length')}")
            if self.each_row:
                lines.append("line = tl.load(blocks + 3 * block + 2).to(tl.int64)")
                lines += ["end = tl.where(length > 0, (line + 1) * length, size)", "start += line * length"]
            else:
                lines.append("line = tl.where(length > 0, start // tl.maximum(length, 1), 0)")
            cell = f"tl.pointer_type({TYPES[self.kind.compute]})"
            lines += [
                f"given = {layout.of('given')}.to({cell}) + line * {layout.by_row}",
                "past = tl.where(length > 0, start - line * length, 0).to(tl.uint32)",
                "length = tl.where(length > 0, length, CHUNK).to(tl.uint32)",
            ]
        lines.append(f"row = step + {layout.head} + 2 * T + tl.load(step + {layout.head} + T + t) * {layout.columns}")
        for role, dtype in self.roles.items():
            at = layout.rings.get(role)  # the column of its position: entries lie one after the other
            entry = "" if at is None else f" + number(row + {at}).to(tl.int64) * size * {dtype.itemsize}"
            lines += [
                f"A_{role} = {layout.of(role)}{entry} + start * {dtype.itemsize}",
                f"P_{role} = A_{role}.to(tl.pointer_type({TYPES[dtype]}))",
            ]
        lines += [f"{c.register} = spread({layout.scalar(c)}, TILE)" for c in self.even]
        addresses = " | ".join(f"A_{role}" for role in self.roles)
        return [
            *lines,
            "left = tl.minimum(end - start, CHUNK).to(tl.int32)",
            f"full = tl.where(({addresses}) & 15 == 0, left // TILE * TILE, 0)",
        ]

    def links(self) -> list[str]:
        """Loads, then the rules."""
        lines = [f"{r} = load(P_{r}, at, left, FULL, TILE)" for r in self.roles]
        for c in (c for c in self.used if c.table == "r"):
            lines.append(
                f"{c.register} = beside(given + {c.at}, {self.layout.by_row}, past, length, at, left, FULL, TILE)"
            )
        if self.kahan:
            lines += ["stored = p", "p = stored + rest", "p_before = p"]
        lines += ["g = -g"] * self.kind.program.maximize + ["u = g"]
        for i, placed in self.ps.rules:
            rule, registers = placed.link, [f"s_{n}" for n in placed.holds]
            given = ["u", *rule.sees, *registers, *(c.register for c in self.kind.program.scalars.of[i])]
            flows = "p" if rule.stage == Stage.WRITE else "u"
            if self.ps.measure and (i, placed) == self.ps.rules[-1]:
                lines.append("before = u")
            name = self.function(f"r{i}_{rule.name}", rule)
            lines.append(f"{', '.join([flows, *registers])} = {name}({', '.join(given)})")
        return lines

    def call(self) -> str:
        return f"tile({', '.join(self.inputs)}, at, left, FULL, TILE)"

    def text(self, arguments: tuple[str, ...], **parts: Any) -> Source:
        """The whole module; parts: the lines of each place in TEXT."""
        lines = {name: ("\n" + " " * 4 * (1 + (name == "loop"))).join(x) for name, x in parts.items()}
        chain = " -> ".join(x.label for x in self.kind.program.pieces[: self.ps.end + 1])
        name = "_".join(["gradkit", *(x.label for x in self.kind.program.pieces[: self.ps.end + 1])])[:100]
        text = TEXT.format(
            title=f"{chain}; parameters {TYPES[self.kind.dtype]}, gradients {TYPES[self.kind.gdtype]}",
            inputs=", ".join(self.inputs),
            rules=", ".join(self.rules) or "none",
            arguments=", ".join(map(repr, arguments)),
            signature=", ".join(arguments),
            name=name,
            loop_full=lines["loop"].replace("FULL", "True"),
            loop_rest=lines["loop"].replace("FULL", "False"),
            **lines,
        )
        return Source(text, self.rules)


@lru_cache(maxsize=64)
def apply(kind: "Kind", ps: "Pass") -> Source:
    """The whole chain, and the stores."""
    w = Writer(kind, ps)
    opening = w.opening()
    if kind.rounding == "stochastic" and ps.writes:
        random = {r: w.layout.of(r) for r in ("element", "index", "key")}
        opening += [*(f"{r} = {x}" for r, x in random.items()), "element += start", "clock = tl.load(step)"]
        w.inputs += [*random, "clock"]
    body = w.links() + write(kind) * ps.writes
    body += [stored(f"s_{n}", f"narrow(s_{n}, {TYPES[w.roles[f's_{n}']]})") for n in ps.stores]
    return w.text(APPLY, opening=opening, body=body, loop=[w.call()], ending=[])


def stored(role: str, value: str) -> str:
    return f"store(P_{role}, at, left, {value}, FULL, TILE)"


def write(kind: "Kind") -> list[str]:
    """The stores of the parameter, as its rounding says."""
    low = TYPES[kind.dtype]
    if kind.rounding == "stochastic":
        bits = "philox(element + at + tl.arange(0, TILE), clock, index, key)"
        return [stored("p", f"stochastic(p, {bits}, {low})")]
    if kind.rounding == "kahan":  # one that did not move keeps its bits, also on a tie
        return [
            f"near = widen(narrow(p, {low}))",
            "moved = p != p_before",
            stored("p", f"narrow(tl.where(moved, near, stored), {low})"),
            stored("rest", f"narrow(tl.where(moved, p - near, rest), {low})"),
        ]
    return [stored("p", f"narrow(p, {low})")]


@lru_cache(maxsize=64)
def measure(kind: "Kind", ps: "Pass") -> Source:
    """The measure of a pass; the last block of what it is over runs its `finish` and gives the results."""
    w, link = Writer(kind, ps), ps.measure.link
    finish = w.function(f"finish_{link.finish.__name__}", link.end)
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
    given = [f"x{j}" for j in range(len(ps.measure.link.reduce))]
    return reduction(Writer(kind, ps), [], given, "tl.float64")


def reduction(w: Writer, last: list[str], given: list[str], cell: str, over_all: bool = False) -> Source:
    """Partial results of each block in fixed order, float32 in a block's lanes and float64 from there on."""
    link = w.ps.measure.link
    how, count = list(link.reduce.values()), len(link.reduce)
    values = ", ".join(f"x{j}" for j in range(count))
    body = w.links()
    body.append(f"{values} = {w.function(f'map_{link.name}', link)}({', '.join(['u', *link.sees])})")
    body.append(f"return {', '.join(f'inside(x{j}, at, left, FULL, TILE)' for j in range(count))}")
    add = [f"a{j} = maximum(a{j}, x{j})" if x == "max" else f"a{j} = a{j} + x{j}" for j, x in enumerate(how)]
    # the group that finishes together, how many there are, and how many cells take its results
    k, groups, outputs = ("0", "1", "O") if over_all else ("t", "O", "1")
    if w.each_row:
        k = f"({w.layout.of('line')} + line)"
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
    return w.text(
        REDUCE,
        opening=w.opening() + [f"a{j} = tl.zeros([TILE], tl.float32)" for j in range(count)],
        body=body,
        loop=[f"{values} = {w.call()}", *add],
        ending=ending,
    )
