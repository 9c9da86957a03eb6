"""A pass as C text: the rules' own expressions, one after the other, in one loop over the elements of a block."""

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .. import random
from ..language import Code
from ..transform import Measure, Stage

if TYPE_CHECKING:
    from ..plan import Kind, Pass

PRELUDE = Path(__file__).with_name("prelude.h").read_text()
STORAGE = {
    torch.float32: ("float", "f32"),
    torch.float64: ("double", "f64"),
    torch.bfloat16: ("bf16", "bf16"),
    torch.float16: ("fp16", "fp16"),
}
# what `run` is given, one int64 each, in this order
JOB = tuple(
    "pointers blocks first last size row H columns M measured R rows out place tensors threads random clock".split()
)
BLOCK = 1 << 16

RUN = """
void run(const int64_t *job) {{
  const int64_t *pointers = (void *)job[{pointers}], *size = (void *)job[{size}], *random = (void *)job[{random}];
  const int32_t *blocks = (void *)job[{blocks}], *row = (void *)job[{row}];
  const T *H = (void *)job[{H}], *M = (void *)job[{M}], *R = (void *)job[{R}];
  const int64_t *rows = (void *)job[{rows}], *place = (void *)job[{place}];
  double *out = (void *)job[{out}];
  const long tensors = job[{tensors}], columns = job[{columns}], measured = job[{measured}];
  const int threads = job[{threads}];
  #pragma omp parallel for schedule(static) num_threads(threads) if(threads > 1)
  for (long b = job[{first}]; b < job[{last}]; b++) {{
    const long t = blocks[2 * b], start = (long)blocks[2 * b + 1] * {BLOCK}, left = size[t] - start;
    span({arguments}, H + row[t] * columns, M + t * measured, R + rows[2 * t] * {by_row}, rows[2 * t + 1], start,
         out + place[b] * {results}, random[3 * t] + start, job[{clock}], random[3 * t + 1], random[3 * t + 2],
         left < {BLOCK} ? left : {BLOCK});
  }}
}}
"""


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


def links(kind: "Kind", ps: "Pass") -> list[str]:
    """The rules of a pass, on the registers u, p, g and s_<slot>."""
    out = []
    for i, placed in ps.rules:
        rule, registers = placed.link, [f"s_{n}" for n in placed.holds]
        given = ["u", *rule.sees, *registers, *(c.register for c in kind.program.scalars.of[i])]
        flows = "p" if rule.stage == Stage.WRITE else "u"
        out.append(inline(placed.label, rule.code, given, [flows, *registers]))
    return out


def write(kind: "Kind") -> list[str]:
    """The stores of the parameter, as its rounding says."""
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


@lru_cache(maxsize=64)
def source(kind: "Kind", ps: "Pass") -> str:
    """The whole C file of one pass."""
    dtypes = dict(zip(kind.program.slots, kind.slots, strict=True))
    roles = {"p": kind.dtype, "g": kind.gdtype, **{f"s_{n}": dtypes[n] for n in ps.slots}}
    loads = {r: f"load_{STORAGE[d][1]}(P_{r}[i])" for r, d in roles.items() if r != "p" or ps.reads_p}
    if kind.rounding == "kahan" and ps.reads_p:
        roles["rest"] = kind.dtype
        loads["p"] += f" + load_{STORAGE[kind.dtype][1]}(P_rest[i])"
    body = [f"T {r} = {x};" for r, x in loads.items()]
    body += ["g = -g;"] * kind.program.maximize + ["T u = g;"]
    if kind.rounding == "kahan" and ps.writes:
        body.append("T p_before = p;")
    rules = links(kind, ps)
    if ps.measure and "before" in ps.measure.link.sees:
        rules.insert(len(rules) - 1, "T before = u;")
    body += rules
    codes = [x.link.code for _, x in ps.rules] + ([ps.measure.link.code] if ps.measure else [])
    used = sorted({c for i, _ in ps.rules for c in kind.program.scalars.of[i]})
    lets = [f"const T {c.register} = {c.table.upper()}[{c.at}];" for c in used if c.table != "r"]
    by_row = len(kind.program.scalars.by_row)
    of_rows = [f"const T {c.register} = R[row * {by_row} + {c.at}];" for c in used if c.table == "r"]
    each_row = ps.measure is not None and ps.measure.link.scope == "row"
    if ps.measure:
        results = len(ps.measure.link.reduce)
        of_rows += [f"out = outs + (row - start / length) * {results};"] * each_row
        loop = reduction(ps.measure.link, body)
    else:
        stores = [f"P_s_{n}[i] = store_{STORAGE[dtypes[n]][1]}(s_{n});" for n in ps.stores]
        lines = "\n    ".join(body + write(kind) * ps.writes + stores)
        loop, results = f"for (long i = from; i < to; i++) {{\n    {lines}\n  }}", 0
    if of_rows:
        head = "for (long from = 0, to; from < n; from = to) {"
        ends = "const long row = (start + from) / length, end = (row + 1) * length - start;"
        loop = "\n  ".join([head, ends, "to = end < n ? end : n;", *of_rows, loop, "}"])
    else:
        loop = f"const long from = 0, to = n;\n  {loop}"
    written = {*(f"s_{n}" for n in ps.stores), *(["p", "rest"] * ps.writes)}
    names = [("const " if r not in written else "") + f"{STORAGE[d][0]} *restrict P_{r}" for r, d in roles.items()]
    arguments = [f"({STORAGE[d][0]} *)pointers[{j} * tensors + t] + start" for j, d in enumerate(roles.values())]
    signature = ", ".join([*names, "const T *H", "const T *M", "const T *R", "long length", "long start"])
    signature += ", double *outs, uint64_t element"
    places = {name: i for i, name in enumerate(JOB)}
    return "\n".join(
        [
            f"typedef {STORAGE[kind.compute][0]} T;",
            PRELUDE,
            *helpers([c for code in codes for c in code.calls], set()),
            f"static void span({signature}, int64_t clock, int64_t index, int64_t seed, long n) {{",
            "  " + "\n  ".join([*lets, "double *out = outs;", loop]) + "\n}",
            RUN.format(arguments=", ".join(arguments), results=results, by_row=by_row, BLOCK=BLOCK, **places),
        ]
    )


def reduction(measure: Measure, body: list[str]) -> str:
    """64 accumulators, combined in index order: vectorises without reassociation, and is the same on any machine."""
    values = [f"x{j}" for j in range(len(measure.reduce))]
    mapped = inline(measure.name, measure.code, ["u", *measure.sees], values)
    adds, ends = [], []
    for j, how in enumerate(measure.reduce.values()):
        add = f"a{j}[k] += x{j};" if how != "max" else f"a{j}[k] = (x{j} > a{j}[k] || x{j} != x{j}) ? x{j} : a{j}[k];"
        end = f"o += a{j}[k];" if how != "max" else f"o = (a{j}[k] > o || a{j}[k] != a{j}[k]) ? a{j}[k] : o;"
        adds.append(add)
        ends.append(f"{{ double o = out[{j}]; for (int k = 0; k < 64; k++) {end} out[{j}] = o; }}")
    element = "\n      ".join([*body, f"T {', '.join(values)};", mapped, *adds])
    lines = [
        *(f"T a{j}[64] = {{0}};" for j in range(len(values))),
        "long q = from;",
        f"for (; q + 64 <= to; q += 64) for (int k = 0; k < 64; k++) {{ const long i = q + k;\n      {element}\n  }}",
        f"for (int k = 0; q < to; q++, k++) {{ const long i = q;\n      {element}\n  }}",
        *ends,
    ]
    return "\n  ".join(lines)
