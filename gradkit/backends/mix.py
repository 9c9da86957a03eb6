"""Several gradients of each tensor as C loops: their inner products, and their weighted sum."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import ccache
from .blocks import blocks_of
from .csource import BLOCK, JOB, PLACES, PRELUDE, RUN, STORAGE
from .native import on_threads

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


class Job(NamedTuple):
    """What a loop is given; it holds what the addresses are of."""

    words: np.ndarray
    size: np.ndarray
    blocks: np.ndarray
    out: np.ndarray
    held: tuple[np.ndarray | None, ...]

    @classmethod
    def of(cls, columns: Sequence[Sequence[Tensor | None]], weights: np.ndarray | None, results: int) -> "Job":
        size = np.array([next(x.numel() for x in c if x is not None) for c in columns], np.int64)
        pointers = np.array([[0 if x is None else x.data_ptr() for x in c] for c in columns], np.int64).T.copy()
        blocks = blocks_of(size, BLOCK)[0].astype(np.int64)
        out = np.zeros((len(blocks), results))
        words = np.zeros(len(JOB), np.int64)
        given = {"size": size, "pointers": pointers, "blocks": blocks, "out": out, "H": weights}
        for name, array in given.items():
            words[PLACES[name]] = 0 if array is None else array.ctypes.data
        words[PLACES["tensors"]], words[PLACES["last"]] = len(columns), len(blocks)
        return cls(words, size, blocks, out, (pointers, weights))

    def run(self, text: str) -> np.ndarray:
        """The results of each block."""
        on_threads(ccache.build(text), self.words, int(self.size.sum()) // BLOCK)
        return self.out


def products(columns: Sequence[Sequence[Tensor | None]], tasks: int) -> Tensor:
    """Of each column of vectors, some of which may be None: [columns, tasks, tasks] in float64."""
    dtype = next(x.dtype for x in columns[0] if x is not None)
    first, second = np.triu_indices(tasks)
    job = Job.of(columns, None, len(first))
    sums = np.zeros((len(columns), len(first)))
    np.add.at(sums, job.blocks[:, 0], job.run(source(tasks, dtype, False)))
    gram = np.zeros((len(columns), tasks, tasks))
    gram[:, first, second] = gram[:, second, first] = sums
    return torch.from_numpy(gram)


def weighted(columns: Sequence[Sequence[Tensor | None]], weights: Tensor) -> None:
    """Into the first vector of each column the sum of the others by its weights [columns, tasks]."""
    dtype = next(x.dtype for x in columns[0] if x is not None)
    having = torch.tensor([[x is not None for x in c[1:]] for c in columns])
    table = torch.where(having, weights, 0.0).to(torch.float64 if dtype == torch.float64 else torch.float32)
    Job.of([(*c[1:], c[0]) for c in columns], table.numpy(), 0).run(source(weights.shape[1], dtype, True))
