"""The chain as one C loop, run over tables of pointers on torch's own threads."""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..transform import AXES
from . import ccache
from .blocks import blocks_of, box_of, corners, first_selected, steps
from .csource import BLOCK, JOB, PLACES, in_units, source

if TYPE_CHECKING:
    from ..plan import Batch, Pass, Units

PROCESS = os.getpid()  # a forked child has lost OpenMP's threads: there one thread runs


def why_not(batch: "Batch") -> str:
    """Why this batch can't run natively; empty if it can."""
    if batch.device.type != "cpu":
        return f"native runs on the CPU, these parameters are on {batch.device}"
    if reason := batch.program.no_source or ccache.why_not():
        return reason
    try:
        for ps, inner in passes_of(batch):
            ccache.build(source(batch.kind, ps, inner))
    except ccache.NoCompiler as e:
        return str(e)
    return ""


def passes_of(batch: "Batch") -> "list[tuple[Pass, Pass | None]]":
    """What runs, each with the measure that it takes by itself.

    A measure of rows or columns that stands last is left to the last pass if a box has them whole: the gradient is read
    from memory once.
    """
    *before, last = batch.program.passes
    inner = before[-1] if before and not batch.sharded and before[-1].measure.link.scope in AXES else None
    if inner and in_units(batch.kind, last) and all(whole(x, box_of(x, BLOCK)) for x in batch.units):
        return [*((ps, None) for ps in before[:-1]), (last, inner)]
    return [(ps, None) for ps in (*before, last)]


def whole(units: "Units", box: tuple[int, int, int]) -> bool:
    """Whether each of a tensor's units lies in one box."""
    return (units.outer, units.inner) == (box[0], box[2]) or not units.outer


@lru_cache(maxsize=1)
def pool() -> ThreadPoolExecutor:
    """For compilers without OpenMP only: a pool beside torch's own costs milliseconds a step."""
    return ThreadPoolExecutor(64, thread_name_prefix="gradkit")


class Native:
    name = "native"

    def __init__(self, batch: "Batch"):
        self.batch = batch
        self.passes = {ps.end: Compiled(batch, ps, inner) for ps, inner in passes_of(batch)}

    def begin(self) -> None:
        """Nothing to send: the loop reads the batch's own table."""

    def takes(self, ps: "Pass") -> bool:
        """Whether a measure has a pass of its own."""
        return ps.end in self.passes

    def reduce(self, ps: "Pass") -> Tensor:
        """The totals of the pass's measure, float64 [tensors or units, reductions]."""
        compiled = self.passes[ps.end]
        compiled.out.fill(0.0)
        compiled.run()
        measure = ps.measure.link
        totals = np.zeros((compiled.count, len(measure.reduce)))
        if len(compiled.starts):
            out = compiled.out[compiled.order]
            for j, how in enumerate(measure.reduce.values()):
                fold = np.maximum if how == "max" else np.add
                totals[compiled.filled, j] = fold.reduceat(out[:, j], compiled.starts)
        return torch.from_numpy(totals)

    def apply(self, ps: "Pass") -> None:
        """Run the whole chain and store the parameters and slots."""
        self.passes[ps.end].run()


class Compiled:
    """One pass of one batch: the compiled function and the tables that it is given."""

    def __init__(self, batch: "Batch", ps: "Pass", inner: "Pass | None"):
        self.batch = batch
        self.library = ccache.build(source(batch.kind, ps, inner))
        self.gradients: list[int] = []
        b = batch
        self.size = np.array([p.numel() for p in b.params], np.int64)
        self.threads = max(1, int(self.size.sum()) // BLOCK)  # fewer elements are done before a thread has woken
        units, first = b.units, b.first_unit[:-1]
        self.count = len(b.params)
        if in_units(b.kind, ps):
            boxes = [box_of(x, BLOCK) for x in units]
            self.units = np.array([(f, *x, *box) for f, x, box in zip(first, units, boxes, strict=True)], np.int64)
            at = [(t, *c) for t, (x, box) in enumerate(zip(units, boxes, strict=True)) for c in corners(x, box)]
            self.blocks = np.array(at, np.int64).reshape(-1, 4)
        else:
            self.units, self.blocks = np.zeros(0, np.int64), blocks_of(b.sizes, BLOCK)[0].astype(np.int64)
        of, parts = self.blocks[:, 0], np.ones(len(self.blocks), np.int64)
        measure = (inner or ps).measure
        if measure and measure.link.scope in AXES:  # a box gives a result for each of its units
            tensor, unit = self.blocks[:, 0], self.blocks[:, 2]
            parts = np.minimum(self.units[tensor, 2] - unit, self.units[tensor, 5])
            self.count, of = len(b.by_unit), np.repeat(self.units[tensor, 0] + unit, parts) + steps(parts)
        self.place = np.cumsum(parts) - parts
        self.order = np.argsort(of, kind="stable")
        self.filled, self.starts = np.unique(of[self.order], return_index=True)
        columns = [b.slots[n] for n in ps.slots]
        columns += [b.slots["compensation"]] if b.rounding == "kahan" and ps.reads_p else []
        rows = [[t.data_ptr() for t in ts] for ts in (b.params, b.params, *columns)]
        self.pointers = np.array(rows, np.int64)
        self.rings = [(2 + j, n) for j, n in enumerate(ps.slots) if n in b.program.rings]
        self.bases = self.pointers.copy()
        self.random = np.zeros((len(b.params), 3), np.int64)
        if b.rounding == "stochastic":
            self.random[:] = list(zip(b.logical, b.index, [b.groups[g]["seed"] for g in b.group], strict=True))
        self.bits = np.array([x.bits.ctypes.data for x in b.choices], np.int64)
        self.low = first_selected(b.choices, BLOCK) if ps.splits else np.zeros(0, np.int64)
        self.out = np.zeros((len(of), len(measure.link.reduce) if measure else 0))
        self.job = np.zeros(len(JOB), np.int64)
        for name in ("pointers", "blocks", "size", "random", "out", "units", "place", "bits", "low"):
            self.job[PLACES[name]] = getattr(self, name).ctypes.data
        self.job[PLACES["tensors"]], self.job[PLACES["last"]] = len(b.params), len(self.blocks)
        self.job[PLACES["M"]], self.job[PLACES["measured"]] = b.measured.data_ptr(), b.measured.shape[1]
        self.job[PLACES["R"]] = b.by_unit.data_ptr()

    def run(self) -> None:
        b, job = self.batch, self.job
        if b.gradients != self.gradients:
            self.pointers[1] = self.gradients = b.gradients
        for r, name in self.rings:
            ring = b.slots[name]
            bytes_ = np.array([t.stride(0) * t.element_size() for t in ring])
            self.pointers[r] = self.bases[r] + b.positions[name] % [len(t) for t in ring] * bytes_
        job[PLACES["row"]], job[PLACES["H"]] = b.row.ctypes.data, b.table.ctypes.data
        job[PLACES["wide"]] = b.table64.ctypes.data
        job[PLACES["columns"]], job[PLACES["clock"]] = b.table.shape[1], int(b.clock)
        on_threads(self.library, job, self.threads)


def on_threads(library: ccache.Library, job: np.ndarray, most: int) -> None:
    """Run a loop over its blocks, on at most so many threads."""
    n, threads = int(job[PLACES["last"]]), max(1, min(torch.get_num_threads(), most))
    if os.getpid() != PROCESS:
        threads = 1
    if library.openmp or threads == 1:
        job[PLACES["threads"]] = threads
        library.run(job.ctypes.data)
        return
    cuts = [n * k // threads for k in range(threads + 1)]
    jobs = []
    for first, last in zip(cuts, cuts[1:], strict=False):
        mine = job.copy()
        mine[PLACES["first"]], mine[PLACES["last"]], mine[PLACES["threads"]] = first, last, 1
        jobs.append(mine)
    list(pool().map(lambda j: library.run(j.ctypes.data), jobs))
