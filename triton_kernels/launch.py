"""What the kernels of a batch are given, and their launches."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import random
from ..backends.blocks import blocks_of
from . import source
from .load import kernel
from .memory import INTERPRETED

if TYPE_CHECKING:
    from ..plan import Batch, Kind, Pass

WRITE_STREAM = random.stream("write")


class Shape(NamedTuple):
    """How a launch is cut: 4 elements a lane, which is 16 bytes of float32; a block is several tiles."""

    lanes: int  # of a warp
    warps: int
    apply: int  # tiles of a block
    reduce: int  # more: each block leaves one partial result to be folded

    @property
    def tile(self) -> int:
        return 4 * self.lanes * self.warps


SHAPES = {
    "cuda": Shape(lanes=32, warps=4, apply=8, reduce=64),
    "hip": Shape(lanes=64, warps=4, apply=8, reduce=64),
    "interpreter": Shape(lanes=256, warps=4, apply=2, reduce=2),  # its time is by operations, not by elements
}


def shape() -> Shape:
    """The row of what runs here."""
    return SHAPES["interpreter" if INTERPRETED.value else "hip" if torch.version.hip else "cuda"]


def options(tiles: int, cut: Shape | None = None) -> dict[str, Any]:
    """What a kernel with blocks of so many tiles is compiled with."""
    cut = cut or shape()
    return {"TILE": cut.tile, "CHUNK": cut.tile * tiles, "num_warps": cut.warps, "enable_fp_fusion": False}


def on(device: torch.device) -> Any:
    """Where a launch goes: the interpreter's device is none that could be chosen."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def prepare(kind: "Kind", ps: "Pass", write: Callable[["Kind", "Pass"], source.Source]) -> None:
    """Compile a kernel, launcher and all, before a step counts on it; whatever is missing here raises here."""
    made, options_ = write(kind, ps), options(shape().reduce if ps.measure else shape().apply)
    run = kernel(made.text, **made.rules)
    if not INTERPRETED.value:
        with on(kind.device):
            arguments = [source.ARGUMENTS[name] for name in run.arg_names if name in source.ARGUMENTS]
            run.warmup(*arguments, grid=(1,), **options_).run  # noqa: B018  # the property loads it


def launch(run: Any, blocks: int, device: torch.device, *arguments: Any, **given: Any) -> None:
    """Start a kernel: every launch goes through here."""
    with on(device):
        run[(blocks,)](*arguments, **given)


def send(words: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """Words of 64 bits to the device in one copy, which nobody waits for."""
    flat = np.concatenate([x.view(np.int64) for x in words])
    # Pinned memory of its own for each copy: one that is still under way must not see the next step's words.
    host = torch.empty(len(flat), dtype=torch.int64, pin_memory=device.type == "cuda")
    host.numpy()[:] = flat
    return host.to(device, non_blocking=True)


class Kernel:
    """A compiled pass over the blocks of a batch."""

    def __init__(self, owner: "Kernels", ps: "Pass", write: Callable[["Kind", "Pass"], source.Source]):
        self.owner, self.ps, made = owner, ps, write(owner.batch.kind, ps)
        self.run = kernel(made.text, **made.rules)
        self.options = options(owner.cut.reduce if ps.measure else owner.cut.apply, owner.cut)
        b = owner.batch
        if ps.measure and ps.measure.link.scope == "row":
            self.sizes = np.repeat(b.row_lengths, b.row_counts)
            blocks, self.counts = blocks_of(self.sizes, self.options["CHUNK"])
            tensor = np.repeat(np.arange(len(b.sizes)), b.row_counts)[blocks[:, 0]]
            line = blocks[:, 0] - np.array(b.first_row)[tensor]
            blocks = np.column_stack([tensor, blocks[:, 1], line]).astype(np.int32)
        else:
            self.sizes = np.array(b.sizes)
            blocks, self.counts = blocks_of(self.sizes, self.options["CHUNK"])
        self.blocks = torch.from_numpy(blocks).to(owner.batch.device)

    def start(self, *more: Any) -> None:
        own, b = self.owner, self.owner.batch
        if len(self.blocks):
            arguments = own.step, own.fixed, self.blocks, b.measured, len(b.params), *more
            launch(self.run, len(self.blocks), b.device, *arguments, **self.options)


class Joint:
    """Tensors that are reduced in groups, by one launch a batch.

    The blocks of a group count themselves and the last one finishes, leaving the counter at zero for the next step.
    """

    def __init__(self, kernels: Sequence[Kernel], group: np.ndarray, cells: np.ndarray):
        self.kernels, self.outputs = kernels, cells.shape[1]
        link, device = kernels[0].ps.measure.link, kernels[0].owner.batch.device
        blocks = np.bincount(group, np.concatenate([k.counts for k in kernels])).astype(np.int64)
        numel = np.bincount(group, np.concatenate([k.sizes for k in kernels]))
        end = blocks.cumsum()
        self.table = send([end - blocks, end, numel.astype(np.float64), cells.ravel()], device)
        self.partials = torch.empty(int(end[-1]), len(link.reduce), dtype=torch.float64, device=device)
        self.counters = torch.zeros(len(end), dtype=torch.int32, device=device)

    def run(self) -> None:
        base = 0
        try:
            for one in self.kernels:
                batch = one.owner.batch
                kept = batch.shared.get(one.ps.end, batch.memory)
                one.start(kept, self.table, self.partials, self.counters, base, self.outputs)
                base += len(one.blocks)
        except BaseException:
            self.counters.zero_()  # blocks that ran have counted themselves
            raise


class Kernels:
    """The kernels of one batch, the table that lasts as long as the plan, and the step's own."""

    def __init__(self, batch: "Batch", cut: Shape | None = None):
        self.batch, self.layout, self.cut = batch, source.Layout(batch.kind), cut or shape()
        columns = [[p.data_ptr() for p in batch.params]]
        columns += [[s.data_ptr() for s in slots] for slots in batch.slots.values()]  # Kahan's rest is the last
        columns += [batch.sizes]
        if batch.rounding == "stochastic":
            seeds = [int(batch.groups[n]["seed"]) for n in batch.group]
            columns += [batch.logical, batch.index, [seed | WRITE_STREAM << 32 for seed in seeds]]
        if batch.program.by_row:
            step = batch.by_row.stride(0) * batch.by_row.element_size()
            lines, lengths = batch.first_row[:-1], zip(batch.row_lengths, batch.params, strict=True)
            columns += [[batch.by_row.data_ptr() + step * n for n in lines]]
            columns += [[n if p.dim() > 1 else 0 for n, p in lengths], lines]
        self.fixed = send([np.array(columns, np.uint64).ravel()], batch.device)
        self.last = Kernel(self, batch.program.passes[-1], source.apply)
        self.joints: dict[int, Joint] = {}
        self.sums: dict[int, tuple[Tensor, Joint]] = {}

    def begin(self) -> None:
        """Send what this step changes."""
        b = self.batch
        cells = [x for ps in self.layout.shared for x in b.cells[ps.end]]
        entries = [b.positions[n] % [len(t) for t in b.slots[n]] for n in b.program.rings]
        rows = np.column_stack([b.table64, *(e[b.first] for e in entries)]).astype(np.float64)
        words = [np.array([int(b.clock)]), np.array(cells, np.float64), np.array(b.gradients, np.int64)]
        self.step = send([*words, b.row.astype(np.int64), rows.ravel()], b.device)

    def apply(self) -> None:
        self.last.start()

    def totals(self, ps: "Pass") -> Tensor:
        """Each tensor's or row's own, float64 [of them, reductions]."""
        if ps.end not in self.sums:
            b = self.batch
            kernel_ = Kernel(self, ps, source.totals)
            out = torch.zeros(len(kernel_.sizes), len(ps.measure.link.reduce), dtype=torch.float64, device=b.device)
            cells = addresses(out, range(out.shape[1]))
            self.sums[ps.end] = out, Joint([kernel_], np.arange(len(out)), cells)
        out, joint = self.sums[ps.end]
        joint.run()
        return out

    def gives(self, ps: "Pass") -> np.ndarray:
        """Where the results of a measure are stored: addresses [results, tensors or rows]."""
        b, scalars = self.batch, self.batch.program.scalars
        by_row = ps.measure.link.scope == "row"
        table, columns = (b.by_row, scalars.by_row) if by_row else (b.measured, scalars.measured)
        return addresses(table, [columns.index((ps.measure.chain, name)) for name in ps.measure.link.gives])


def measure(parts: "Sequence[tuple[Kernels, Pass]]") -> None:
    """Reduce and finish a measure, over all of these batches or over each tensor of theirs."""
    over_all = parts[0][1].measure.link.scope == "all"
    for members in [parts] if over_all else [[x] for x in parts]:
        first, ps = members[0]
        if ps.end not in first.joints:
            cells = np.concatenate([k.gives(x) for k, x in members], 1)
            group = np.arange(cells.shape[1]) // (cells.shape[1] if over_all else 1)
            first.joints[ps.end] = Joint([Kernel(k, x, source.measure) for k, x in members], group, cells)
        first.joints[ps.end].run()


def addresses(table: Tensor, columns: Sequence[int]) -> np.ndarray:
    """Of the cells of some columns, [columns, rows]."""
    rows = np.arange(len(table)) * table.stride(0) + np.array(columns)[:, None]
    return table.data_ptr() + rows * table.element_size()
