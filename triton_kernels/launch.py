"""What the kernels of a batch are given, and their launches."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import random
from ..backends.blocks import ONES, blocks_of
from ..backends.csource import in_units
from ..transform import AXES
from . import source
from .load import kernel
from .memory import INTERPRETED

if TYPE_CHECKING:
    from ..plan import Batch, Kind, Pass, Units
    from ..selection import Choice

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
    return {
        "TILE": cut.tile,
        "CHUNK": cut.tile * tiles,
        "WIDE": 4 * cut.lanes,
        "num_warps": cut.warps,
        "enable_fp_fusion": False,
    }


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
        b, self.sizes = owner.batch, np.array(owner.batch.sizes)
        if in_units(b.kind, ps):
            tile, wide, chunk = (self.options[name] for name in ("TILE", "WIDE", "CHUNK"))
            blocks = boxes(b.units, tile // wide, wide, chunk // tile)
            self.counts = np.bincount(blocks[:, 0], minlength=len(self.sizes))
        else:
            blocks, self.counts = blocks_of(b.sizes, self.options["CHUNK"])
        self.blocks = torch.from_numpy(blocks).to(b.device)

    def start(self, *more: Any) -> None:
        own, b = self.owner, self.owner.batch
        if len(self.blocks):
            arguments = own.step, own.fixed, self.blocks, b.measured, len(b.params), *more
            launch(self.run, len(self.blocks), b.device, *arguments, **self.options)


class Panels:
    """Rows or columns that are reduced by one launch; the last block of each panel of them finishes."""

    def __init__(self, kernel_: Kernel, out: Tensor | None = None):
        b, items = kernel_.owner.batch, kernel_.blocks
        self.kernel = kernel_
        made = {name: int(items[:, i].max()) for i, name in enumerate(source.ITEM)} if len(items) else {}
        cells = made.get("place", 0) + kernel_.options["WIDE"], len(kernel_.ps.measure.link.reduce)
        self.partials = torch.empty(cells, dtype=torch.float64, device=b.device)
        self.counters = torch.zeros(made.get("panel", 0) + 1, dtype=torch.int32, device=b.device)
        self.out = self.partials if out is None else out

    def run(self) -> None:
        self.kernel.start(self.partials, self.counters, self.out)


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
        if batch.program.axis is not None:
            step, first = batch.by_unit.stride(0) * batch.by_unit.element_size(), batch.first_unit[:-1]
            columns += [[batch.by_unit.data_ptr() + step * n for n in first], first]
        if batch.program.splits:
            columns += self.selections()
        self.fixed = send([np.array(columns, np.uint64).ravel()], batch.device)
        self.last = Kernel(self, batch.program.passes[-1], source.apply)
        self.joints: dict[int, Joint | Panels] = {}
        self.sums: dict[int, tuple[Tensor, Joint | Panels]] = {}

    def selections(self) -> list[list[int]]:
        """The addresses of each tensor's marks, and of its counts."""
        tables = [x for choice in self.batch.choices for x in marks(choice, self.cut.tile)]
        self.selected = send(tables, self.batch.device)
        at = list(accumulate([self.selected.data_ptr(), *(x.nbytes for x in tables[:-1])]))
        return [at[::2], at[1::2]]

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
        """Each tensor's or unit's own, float64 [of them, reductions]."""
        if ps.end not in self.sums:
            b = self.batch
            kernel_, by_unit = Kernel(self, ps, source.totals), ps.measure.link.scope in AXES
            count = len(b.by_unit) if by_unit else len(b.sizes)
            out = torch.zeros(count, len(ps.measure.link.reduce), dtype=torch.float64, device=b.device)
            group, cells = np.arange(len(out)), addresses(out, range(out.shape[1]))
            self.sums[ps.end] = out, Panels(kernel_, out) if by_unit else Joint([kernel_], group, cells)
        out, joint = self.sums[ps.end]
        joint.run()
        return out

    def gives(self, ps: "Pass") -> np.ndarray:
        """Where the results of a measure are stored: addresses [results, tensors]."""
        b, scalars = self.batch, self.batch.program.scalars
        return addresses(b.measured, [scalars.measured.index((ps.measure.chain, n)) for n in ps.measure.link.gives])


def measure(parts: "Sequence[tuple[Kernels, Pass]]") -> None:
    """Reduce and finish a measure, over all of these batches or over each tensor of theirs."""
    over_all = parts[0][1].measure.link.scope == "all"
    for members in [parts] if over_all else [[x] for x in parts]:
        first, ps = members[0]
        if ps.measure.link.scope in AXES:
            if ps.end not in first.joints:
                first.joints[ps.end] = Panels(Kernel(first, ps, source.measure))
        elif ps.end not in first.joints:
            cells = np.concatenate([k.gives(x) for k, x in members], 1)
            group = np.arange(cells.shape[1]) // (cells.shape[1] if over_all else 1)
            first.joints[ps.end] = Joint([Kernel(k, x, source.measure) for k, x in members], group, cells)
        first.joints[ps.end].run()


def boxes(units: "Sequence[Units]", lines: int, wide: int, steps: int) -> np.ndarray:
    """The items of a kernel whose tiles are `lines` x `wide`, `steps` in a block: panels of units, in chunks."""
    items: list[list[int]] = []
    place = panel = 0
    for t, (outer, count, inner) in enumerate(units):
        side = int(inner == 1)
        width = wide if side else lines
        # what is reduced: lines of lanes side by side; else lanes, or whole lines of a piece of lanes in each place
        extent, piece = (outer, 1) if side else (inner, 1) if outer == 1 else (outer, -(-inner // wide))
        step = steps * (lines if side else wide if outer == 1 else 1)
        for unit in range(0, count if outer and inner else 0, width):
            n = min(width, count - unit)
            corners = [(i, e) for i in range(piece) for e in range(0, extent, step)]
            first = place
            for i, e in corners:
                m = min(step, extent - e)
                if side:
                    shape, move = (m, n, -(-m // lines), m // lines * (n == wide)), (count, lines * count, lines, 0)
                    start = e * count + unit
                elif outer == 1:
                    shape, move = (n, m, -(-m // wide), m // wide * (n == lines)), (inner, wide, 0, wide)
                    start = unit * inner + e
                else:
                    here = min(wide, inner - i * wide)
                    shape, move = (n, here, m, m * (n == lines and here == wide)), (inner, count * inner, 0, 0)
                    start = (e * count + unit) * inner + i * wide
                if start % 4 or move[0] % 4 or move[1] % 4:
                    shape = (*shape[:3], 0)
                items.append([t, start, *shape, *move, unit, n, side, panel, place, first, len(corners), outer * inner])
                place += n
            panel += 1
    return np.array(items, np.int64).reshape(-1, len(source.ITEM))


def marks(choice: "Choice", tile: int) -> tuple[np.ndarray, np.ndarray]:
    """A word for each 16 elements: a bit each, and above these how many of their tile are selected before them.

    And for each tile how many of the tensor's elements are selected before it.
    """
    words = ONES[choice.bits].reshape(-1, 2).sum(1)
    before = np.cumsum(words) - words
    counts = before[:: tile // 16]
    within = before - np.repeat(counts, tile // 16)[: len(before)]
    return (choice.bits.view(np.uint16) | within << 16).astype(np.int32), counts


def addresses(table: Tensor, columns: Sequence[int]) -> np.ndarray:
    """Of the cells of some columns, [columns, rows]."""
    rows = np.arange(len(table)) * table.stride(0) + np.array(columns)[:, None]
    return table.data_ptr() + rows * table.element_size()
