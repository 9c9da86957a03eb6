"""A pass as C text: the rules' own expressions, one after the other, in one loop over the elements of a block."""

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import random
from ..language import Code
from ..transform import AXES, Measure, Stage

if TYPE_CHECKING:
    from ..chain import Placed
    from ..plan import Kind, Pass

PRELUDE = Path(__file__).with_name("prelude.h").read_text()
OPERATIONS = "FN" + PRELUDE.partition("define IN_T")[2].partition("FN")[2].partition("/* ---- storage")[0]
SPLIT = Path(__file__).with_name("split.h").read_text()
STORAGE = {
    torch.float32: ("float", "f32"),
    torch.float64: ("double", "f64"),
    torch.bfloat16: ("bf16", "bf16"),
    torch.float16: ("fp16", "fp16"),
}
# what `run` is given, one int64 each, in this order
JOB = tuple(
    "pointers blocks first last size row H columns M measured R units out place tensors threads".split()
    + "random clock bits low wide".split()
)
PLACES = {name: i for i, name in enumerate(JOB)}
BLOCK = 1 << 16
PART = 1 << 9  # of a split at once: while one is computed the next is fetched; 4K take twice the time

RUN = """
void run(const int64_t *job) {{
  const int64_t *pointers = (void *)job[{pointers}], *size = (void *)job[{size}], *random = (void *)job[{random}];
  const int64_t *units = (void *)job[{units}], *place = (void *)job[{place}], *blocks = (void *)job[{blocks}];
  const int64_t *bits = (void *)job[{bits}], *low = (void *)job[{low}];
  const int32_t *row = (void *)job[{row}];
  const T *H = (void *)job[{H}], *M = (void *)job[{M}];
  const double *wide = (void *)job[{wide}];
  T *R = (void *)job[{R}];
  double *out = (void *)job[{out}];
  const long tensors = job[{tensors}], columns = job[{columns}], measured = job[{measured}];
  const int threads = job[{threads}];
  #pragma omp parallel for schedule(static) num_threads(threads) if(threads > 1)
  for (long b = job[{first}]; b < job[{last}]; b++) {{
    {block}
  }}
}}
"""
SPAN = """{name}({arguments}, H + row[t] * columns, M + t * measured, {given}, out + {into},
      random[3 * t] + start, job[{clock}], random[3 * t + 1], random[3 * t + 2], {words}, {step}, {n});"""
# BLOCK consecutive elements of a tensor
CHUNK = """const long t = blocks[2 * b], start = blocks[2 * b + 1] * {BLOCK}, left = size[t] - start;
    {span}"""
# the same in parts, `first` elements of the tensor are selected before each
PARTS = """const long t = blocks[2 * b], begin = blocks[2 * b + 1] * {BLOCK};
    const long end = size[t] - begin < {BLOCK} ? size[t] : begin + {BLOCK};
    for (long start = begin, first = low[b]; start < end; start += {PART}) {{
      const long n = end - start < {PART} ? end - start : {PART};
      {span}
      first += count((uint64_t *)bits[t] + start / 64, n);
    }}"""
# a box of a tensor's units, each `inner` consecutive elements in each of `outer` places
CORNER = """const int64_t *at = blocks + 4 * b, *of = units + 7 * at[0];
    const long t = at[0], count = of[2], inner = of[3];
    const long o_end = at[1] + of[4] < of[1] ? at[1] + of[4] : of[1];
    const long u_end = at[2] + of[5] < count ? at[2] + of[5] : count;
    const long i_end = at[3] + of[6] < inner ? at[3] + of[6] : inner;
    """
BOX = """for (long o = at[1]; o < o_end; o++) {{
      if (inner == 1) {{
        const long u = at[2], start = o * count + u;
        {side_by_side}
      }} else for (long u = at[2]; u < u_end; u++) {{
        const long start = (o * count + u) * inner + at[3];
        {one_by_one}
      }}
    }}"""

# before that, on a box of whole units: measure them, and give what `finish` makes of it to the loop behind
WHOLE = """double *sums = out + place[b] * {results};
    for (long k = 0; k < (u_end - at[2]) * {results}; k++) sums[k] = 0;
    {measure}
    for (long u = at[2]; u < u_end; u++, sums += {results}) {{
      {finish}
    }}
    """

# what a split selects of a block: gathered, run, and spread over U, where S marks it
SELECTED = """uint16_t places[{PART}];
  uint8_t S[{PART} + 16];
  T U[{PART} + 16], V[{PART} + 16];
  {scratch}
  const long m = count(bits, n);
  if (!BY_BITS || {listed}) list(bits, n, places);
  {gather}
  {{
    {shadow}
    for (long i = 0; i < m; i++) {{
      {body}
      V[i] = u;
      {stores}
    }}
  }}
  spread(V, bits, places, m, n, U, S);"""


def helpers(codes: list[Code], done: set[str]) -> list[str]:
    """The @fn functions that are called, each once, those that they call first."""
    out = []
    for code in codes:
        if code.symbol not in done:
            done.add(code.symbol)
            out += helpers(code.calls, done)
            parameters = ", ".join(f"T v_{p}" for p in code.params)
            out.append(f"FN T {code.symbol}({parameters}) {{ {' '.join(code.statements)} return {code.returns[0]}; }}")
    return out


def inline(name: str, code: Code, given: list[str], results: list[str]) -> str:
    """A rule or a map at its place in the loop: its parameters, its statements, and where its results go."""
    lines = [f"T v_{n} = {x};" for n, x in zip(code.params, given, strict=True)]
    lines += [*code.statements, *(f"{to} = {x};" for to, x in zip(results, code.returns, strict=True))]
    return f"/* {name} */ {{ {' '.join(lines)} }}"


def links(kind: "Kind", rules: "list[tuple[int, Placed]]") -> list[str]:
    """Rules on the registers u, p, g and s_<slot>."""
    out = []
    for i, placed in rules:
        rule, registers = placed.link, [f"s_{n}" for n in placed.holds]
        given = ["u", *rule.sees, *registers, *(c.register for c in kind.program.scalars.of[i])]
        flows = "p" if rule.stage == Stage.WRITE else "u"
        out.append(inline(placed.label, rule.code, given, [flows, *registers]))
    return out


def write(kind: "Kind", target: str) -> list[str]:
    """The stores of the gradient, to nearest, or of the parameter, as its rounding says."""
    if target != "p":
        return [f"P_g[i] = store_{STORAGE[kind.gdtype][1]}(u);"] * (target == "g")
    store = STORAGE[kind.dtype][1]
    if kind.rounding == "stochastic":
        stream = random.stream("write")
        bits = f"philox(element + i, (uint32_t)clock, (uint32_t)index, (uint32_t)seed, {stream}u)"
        return [f"P_p[i] = stochastic_{store}(p, {bits});"]
    if kind.rounding == "kahan":  # one that did not move keeps its bits, also on a tie
        kept = f"{STORAGE[kind.dtype][0]} near = store_{store}(p), rest = store_{store}(p - load_{store}(near));"
        return [
            kept,
            "int moved = p != p_before;",
            "P_p[i] = moved ? near : P_p[i];",
            "P_rest[i] = moved ? rest : P_rest[i];",
        ]
    return [f"P_p[i] = store_{store}(p);"]


class Function:
    """What one pass does with a span of elements, as a C function of this name; `table` is the order of pointers."""

    def __init__(self, name: str, kind: "Kind", ps: "Pass", table: Sequence[str]):
        dtypes = dict(zip(kind.program.slots, kind.slots, strict=True))
        self.name, self.roles, self.splits = name, roles_of(kind, ps), ps.splits
        roles, measure = self.roles, ps.measure.link if ps.measure else None
        kahan = "rest" in roles
        low = {f"s_{n}" for n in ps.low}
        self.given = len(kind.program.scalars.by_unit)

        def stored(name: str) -> str:
            return f"P_s_{name}[i] = store_{STORAGE[dtypes[name]][1]}(s_{name});"

        def loads(wanted: Iterable[str]) -> list[str]:
            """Registers of these roles, and u."""
            lines = [f"T {r} = load_{STORAGE[roles[r]][1]}(P_{r}[i]);" for r in wanted if r != "rest"]
            lines += [f"p = p + load_{STORAGE[kind.dtype][1]}(P_rest[i]);"] * (kahan and "p" in wanted)
            return lines + ["g = -g;"] * kind.program.maximize + ["T u = g;"]

        body = loads([r for r in roles if r not in low and (r != "p" or ps.reads_p)])
        if kahan and ps.target == "p":
            body.append("T p_before = p;")
        before, inside, outside, after = ps.parts()
        rest = links(kind, before) + (links(kind, outside) + ["u = S[i] ? U[i] : u;"]) * ps.splits + links(kind, after)
        if measure and "before" in measure.sees:
            rest.insert(len(before) if ps.splits and not after else len(rest) - 1, "T before = u;")
        body += rest
        self.codes = [x.link.code for _, x in ps.rules] + ([measure.code] if measure else [])
        used = sorted({c for i, _ in ps.rules for c in kind.program.scalars.of[i]})
        lets = [f"const T {c.register} = {c.table.upper()}[{c.at}];" for c in used if c.table != "r"]
        if ps.splits:
            seen = {n for _, x in before + inside for n in (*x.link.sees, *(f"s_{h}" for h in x.holds)) if n not in low}
            wanted = [r for r in roles if r in seen or r == "g" or (r == "rest" and "p" in seen)]
            held = {r: STORAGE[roles[r]] for r in wanted}
            packed = [*loads([*wanted, *(r for r in roles if r in low)]), *links(kind, before + inside)]
            lets.append(
                SELECTED.format(
                    PART=PART,
                    listed=int({*(roles[r] for r in wanted), kind.compute} != {torch.float32}),
                    scratch=" ".join(f"{c} G_{r}[{PART} + 16];" for r, (c, _) in held.items()),
                    gather=" ".join(f"pack_{c}(P_{r}, bits, places, m, n, G_{r});" for r, (_, c) in held.items()),
                    shadow=" ".join(f"const {c} *P_{r} = G_{r};" for r, (c, _) in held.items()),
                    body="\n      ".join(packed),
                    stores=" ".join(stored(n) for n in ps.stores if f"s_{n}" in low),
                )
            )
        body = [f"const T {c.register} = R[i * step * {self.given} + {c.at}];" for c in used if c.table == "r"] + body
        self.results, self.each_unit = (len(measure.reduce), measure.scope in AXES) if measure else (0, False)
        if measure:
            loop = reduction(measure, body)
        else:
            stores = [stored(n) for n in ps.stores if f"s_{n}" not in low]
            lines = "\n    ".join(body + write(kind, ps.target) + stores)
            loop = f"for (long i = 0; i < n; i++) {{\n    {lines}\n  }}"
        written = {*(f"s_{n}" for n in ps.stores), ps.target, *["rest"] * (ps.target == "p")}
        names = [("const " if r not in written else "") + f"{STORAGE[d][0]} *restrict P_{r}" for r, d in roles.items()]
        starts = ["first" if r in low else "start" for r in roles]
        self.arguments = [
            f"({STORAGE[d][0]} *)pointers[{table.index(r)} * tensors + t] + {at}"
            for (r, d), at in zip(roles.items(), starts, strict=True)
        ]
        tables = "const T *H, const T *M, const T *R, double *out"
        place = "uint64_t element, int64_t clock, int64_t index, int64_t seed"
        signature = ", ".join([*names, tables, place, "const uint64_t *bits, const long step, long n"])
        inlined = "static inline __attribute__((always_inline)) void"  # `step` is known where it is called
        self.text = f"{inlined} {name}({signature}) {{\n  " + "\n  ".join([*lets, loop]) + "\n}"

    def call(self, **how: Any) -> str:
        words = "(uint64_t *)bits[t] + start / 64" if self.splits else "0"
        return SPAN.format(name=self.name, arguments=", ".join(self.arguments), words=words, **how, **PLACES)

    def box(self) -> str:
        """Calls for the spans of a box."""
        r = f"R + (of[0] + u) * {self.given}"
        into = f"(place[b] + (u - at[2]) * {int(self.each_unit)}) * {self.results}"
        one, many = (
            {"given": r, "into": into, "step": step, "n": n} for step, n in ((0, "i_end - at[3]"), (1, "u_end - u"))
        )
        return BOX.format(side_by_side=self.call(**many), one_by_one=self.call(**one))


def roles_of(kind: "Kind", ps: "Pass") -> dict[str, torch.dtype]:
    """What a pass has pointers to, in the order of their table."""
    dtypes = dict(zip(kind.program.slots, kind.slots, strict=True))
    kahan = {"rest": kind.dtype} if kind.rounding == "kahan" and ps.reads_p else {}
    return {"p": kind.dtype, "g": kind.gdtype, **{f"s_{n}": dtypes[n] for n in ps.slots}} | kahan


def in_double(text: str) -> str:
    """C text in T as text in double, under names of its own."""
    for old, new in ((r"\bT\b", "double"), (r"\bIN_T\((.*), (.*)\)", r"(\2)"), (r"\b(k|fn)_", r"\1_double_")):
        text = re.sub(old, new, text)
    return text


def finish_of(kind: "Kind", ps: "Pass") -> str:
    """A measure's `finish` on what was summed of one unit, in double, into its scalars."""
    link, scalars = ps.measure.link, kind.program.scalars
    r = f"R[(of[0] + u) * {len(scalars.by_unit)} + {{}}]"
    tables = {"h": "wide[row[t] * columns + {}]", "m": "M[t * measured + {}]", "r": r}
    sums = [f"sums[{j}]" + " / (of[1] * inner)" * (how == "mean") for j, how in enumerate(link.reduce.values())]
    cells = [f"(double){tables[c.table].format(c.at)}" for c in scalars.of[ps.end]]
    into = [r.format(scalars.by_unit.index((ps.measure.chain, name))) for name in link.gives]
    return in_double(inline(link.name, link.end, [*sums, *cells], into))


@lru_cache(maxsize=64)
def source(kind: "Kind", ps: "Pass", inner: "Pass | None" = None) -> str:
    """The whole C file of one pass.

    inner: a measure of rows or columns that it takes itself, of each box before it runs on it: boxes have them whole.
    """
    table = [*roles_of(kind, ps)]
    functions = [Function("span", kind, ps, table)]
    block, finish = "", []
    if inner:
        functions.append(of_units := Function("measure", kind, inner, table))
        finish = [in_double("\n".join([OPERATIONS, *helpers(inner.measure.link.end.calls, set())]))]
        block = WHOLE.format(measure=of_units.box(), finish=finish_of(kind, inner), results=of_units.results)
    if in_units(kind, ps):
        block = CORNER + block + functions[0].box()
    else:
        n = "n" if ps.splits else f"left < {BLOCK} ? left : {BLOCK}"
        ends = {"given": "R", "into": f"place[b] * {functions[0].results}", "step": 0, "n": n}
        block = (PARTS if ps.splits else CHUNK).format(BLOCK=BLOCK, PART=PART, span=functions[0].call(**ends))
    return "\n".join(
        [
            f"typedef {STORAGE[kind.compute][0]} T;",
            PRELUDE,
            *[SPLIT] * ps.splits,
            *helpers([c for f in functions for code in f.codes for c in code.calls], set()),
            *finish,
            *(f.text for f in functions),
            RUN.format(block=block, **PLACES),
        ]
    )


def in_units(kind: "Kind", ps: "Pass") -> bool:
    """Whether a pass is cut into boxes of rows or columns."""
    used = (c.table for i, _ in ps.rules for c in kind.program.scalars.of[i])
    return "r" in used or (ps.measure is not None and ps.measure.link.scope in AXES)


def reduction(measure: Measure, body: list[str]) -> str:
    """64 accumulators, combined in index order: vectorises without reassociation, and is the same on any machine.

    Short spans need none, and units that lie side by side, `step` apart, have one each, in `out`.
    """
    values, each_unit = [f"x{j}" for j in range(len(measure.reduce))], measure.scope in AXES
    mapped = inline(measure.name, measure.code, ["u", *measure.sees], values)

    def fold(j: int, how: str, a: str) -> str:
        return f"{a} += x{j};" if how != "max" else f"{a} = (x{j} > {a} || x{j} != x{j}) ? x{j} : {a};"

    ends, beside = [], []
    for j, how in enumerate(measure.reduce.values()):
        end = f"o += a{j}[k];" if how != "max" else f"o = (a{j}[k] > o || a{j}[k] != a{j}[k]) ? a{j}[k] : o;"
        ends.append(f"{{ double o = out[{j}]; for (int k = 0; k < 64; k++) {end} out[{j}] = o; }}")
        beside.append(fold(j, how, f"out[{f'i * step * {len(values)} + ' * each_unit}{j}]"))
    element = "\n      ".join([*body, f"T {', '.join(values)};", mapped])
    adds = "\n      ".join(fold(j, how, f"a{j}[k]") for j, how in enumerate(measure.reduce.values()))
    lines = [
        f"if ({'step || ' * each_unit}n < 64) {{ for (long i = 0; i < n; i++) {{",
        f"    {element}\n      {' '.join(beside)}\n  }} return; }}",
        *(f"T a{j}[64] = {{0}};" for j in range(len(values))),
        "long q = 0;",
        "for (; q + 64 <= n; q += 64) for (int k = 0; k < 64; k++) { const long i = q + k;",
        f"    {element}\n      {adds}\n  }}",
        f"for (int k = 0; q < n; q++, k++) {{ const long i = q;\n      {element}\n      {adds}\n  }}",
        *ends,
    ]
    return "\n  ".join(lines)
