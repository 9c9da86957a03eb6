"""Several gradients of each tensor as C loops: their inner products, and their weighted sum."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from . import ccache
from .blocks import blocks_of
from .csource import BLOCK, JOB, PLACES, PRELUDE, RUN, STORAGE
from .native import on_threads

Columns = Sequence[Sequence[Tensor | None]]  # of each parameter, a tensor without gaps from each task, or None

MOST = 8  # tasks
LANES = 32  # sums side by side: with 16 the compiler's loop takes three times as long

START = """const long t = blocks[2 * b], start = blocks[2 * b + 1] * {BLOCK}, left = size[t] - start;
    const long n = left < {BLOCK} ? left : {BLOCK};
    {gradients}"""
GRADIENT = """const {S} *P{k} = (void *)pointers[{k} * tensors + t];
    P{k} = P{k} ? P{k} + start : none;"""
PRODUCTS = """double {sums};
    long q = 0;
    for (; q + {LANES} <= n; q += {LANES}) for (int k = 0; k < {LANES}; k++) {{ const long i = q + k; {loads} {adds} }}
    for (int k = 0; q < n; q++, k++) {{ const long i = q; {loads} {adds} }}
    {ends}"""
SUM = """{S} *P = ({S} *)pointers[{tasks} * tensors + t] + start;
    const T *w = H + t * {tasks};
    for (long i = 0; i < n; i++) {{ T u = {terms}; P[i] = store_{s}(u); }}"""


def why_not(tasks: int, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no loop can do this; None if one can."""
    if device.type != "cpu" or dtype not in STORAGE or tasks > MOST:
        return f"{tasks} tasks of {dtype} on {device}"
    return ccache.why_not()


@lru_cache(maxsize=64)
def source(tasks: int, dtype: torch.dtype, weighted: bool) -> str:
    """The C text for so many gradients of a dtype."""
    c, s = STORAGE[dtype]
    pairs = list(zip(*np.triu_indices(tasks), strict=True))
    gradients = "\n    ".join(GRADIENT.format(S=c, k=k) for k in range(tasks))
    if weighted:
        terms = " + ".join(f"load_{s}(P{k}[i]) * w[{k}]" for k in range(tasks))
        body = SUM.format(S=c, s=s, tasks=tasks, terms=terms)
    else:
        results = len(pairs)
        body = PRODUCTS.format(
            LANES=LANES,
            sums=", ".join(f"a{i}_{j}[{LANES}] = {{0}}" for i, j in pairs),
            loads=" ".join(f"double x{k} = load_{s}(P{k}[i]);" for k in range(tasks)),
            adds=" ".join(f"a{i}_{j}[k] += x{i} * x{j};" for i, j in pairs),
            ends="\n    ".join(
                f"{{ double o = 0; for (int k = 0; k < {LANES}; k++) o += a{i}_{j}[k]; out[b * {results} + {n}] = o; }}"
                for n, (i, j) in enumerate(pairs)
            ),
        )
    arithmetic = "float" if weighted and dtype != torch.float64 else "double"
    block = START.format(BLOCK=BLOCK, gradients=gradients) + "\n    " + body
    return "\n".join(
        [f"typedef {arithmetic} T;", PRELUDE, f"static const {c} none[{BLOCK}];", RUN.format(block=block, **PLACES)]
    )


def run(
    text: str, columns: Columns, weights: np.ndarray | None = None, results: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """What a loop found in each block, and the number of each column's first block."""
    size = np.array([next(x.numel() for x in c if x is not None) for c in columns], np.int64)
    pointers = np.array([[0 if x is None else x.data_ptr() for x in c] for c in columns], np.int64).T.copy()
    blocks, counts = blocks_of(size, BLOCK)
    blocks, out, job = blocks.astype(np.int64), np.zeros((len(blocks), results)), np.zeros(len(JOB), np.int64)
    given = {"size": size, "pointers": pointers, "blocks": blocks, "out": out, "H": weights}
    for name, array in given.items():
        job[PLACES[name]] = 0 if array is None else array.ctypes.data
    job[PLACES["tensors"]], job[PLACES["last"]] = len(columns), len(blocks)
    on_threads(ccache.build(text), job, int(size.sum()) // BLOCK)
    return out, np.cumsum(counts) - counts


def products(columns: Columns, tasks: int) -> Tensor:
    """Inner products in float64 [columns, tasks, tasks], of tensors that have elements."""
    dtype = next(x.dtype for x in columns[0] if x is not None)
    first, second = np.triu_indices(tasks)
    out, begin = run(source(tasks, dtype, False), columns, results=len(first))
    gram = np.zeros((len(columns), tasks, tasks))
    gram[:, first, second] = gram[:, second, first] = np.add.reduceat(out, begin)
    return torch.from_numpy(gram)


def weighted(columns: Columns, weights: Tensor) -> None:
    """Into the first tensor of each column the sum of the others by its weights [columns, tasks]."""
    dtype = next(x.dtype for x in columns[0] if x is not None)
    having = np.array([[x is not None for x in c[1:]] for c in columns])
    table = np.where(having, weights.numpy(), 0.0).astype(np.float64 if dtype == torch.float64 else np.float32)
    run(source(weights.shape[1], dtype, True), [(*c[1:], c[0]) for c in columns], table)
