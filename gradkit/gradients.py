"""Gradients of several tasks: their inner products, and their weighted sums."""

import sys
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from .backends import mix
from .plan import compute_dtype, hollow

Column = Sequence[Tensor | None]  # of one parameter, from each task
Rows = list[list[Tensor | None]]  # of each task, of each parameter

PIECES = {"cpu": 1 << 17}  # elements of all tasks whose products torch forms at once: what fits a cache
PIECE = 1 << 19  # elsewhere: few launches, 4 MB of copies
TOGETHER = 1 << 21  # elements of new memory that one loop takes: 8 MB
COUNTED = hasattr(torch._C, "_storage_Use_Count") and hasattr(Tensor, "_use_count")  # torch's own, not promised


def gramian(rows: Rows, each_tensor: bool = False) -> Tensor:
    """Inner products of the tasks' gradients in float64, [tasks, tasks]; of each parameter with a dimension before."""
    columns, tasks = list(zip(*rows, strict=True)), len(rows)
    groups = alike(columns, [i for i, column in enumerate(columns) if numel(column)])
    device = some(columns[groups[0][1][0]]).device if groups else torch.device("cpu")
    total = torch.zeros(len(columns), tasks, tasks, dtype=torch.float64, device=device)
    for by_torch, group in groups:
        for at in together(group, [tasks * copied(columns[i]) for i in group]):
            parts = [laid(columns[i]) for i in at]
            if not by_torch:
                total[at] = mix.products(parts, tasks).to(device)
            elif each_tensor:
                total[at] = torch.stack([by_matrices([part]) for part in parts]).to(device)
            else:
                total[at[0]] = by_matrices(parts).to(device)
    return total if each_tensor else total.sum(0)


def combinations(rows: Rows, weights: Tensor) -> list[Tensor | None]:
    """The sum of each parameter's gradients by its weights [parameters, tasks], rounded once.

    The lists are emptied. A sum takes the place of the first gradient where nobody else holds that. Where it needs new
    memory, small ones go first: by then they have freed more than a large one takes.
    """
    columns: list[Column] = [list(column) for column in zip(*rows, strict=True)]
    tasks = len(rows)
    for row in rows:
        row.clear()
    merged: list[Tensor | None] = [None] * len(columns)
    having = [i for i, column in enumerate(columns) if any(g is not None for g in column)]
    free = {i for i in having if first_is_free(columns[i])}
    for by_torch, group in alike(columns, having):
        sizes = [(0 if i in free else numel(columns[i])) + tasks * copied(columns[i]) for i in group]
        for at in together(group, sizes):
            made = [some(columns[i]).detach() if i in free else torch.empty_like(some(columns[i])) for i in at]
            if by_torch:
                for i, x in zip(at, made, strict=True):
                    combination(x, columns[i], weights[i])
            else:
                mix.weighted([laid([x, *columns[i]]) for i, x in zip(at, made, strict=True)], weights[at])
            for i, x in zip(at, made, strict=True):
                merged[i], columns[i] = x, []
    return merged


def first_is_free(column: Column) -> bool:
    """Whether the first gradient may be overwritten with the sum: plain memory of torch's that no one else holds.

    A hook may have kept it, a sum's backward gives two terms the same one, and slices of one memory are others' too.
    """
    if not COUNTED or type(some(column)) is not Tensor:
        return False
    probe = [torch.empty(1) if some(column)._base is None else torch.empty(1).view(1)]
    if holders(column) != holders(probe):
        return False
    first, memory = some(column), some(column).untyped_storage()
    return (
        memory.resizable()  # numpy's isn't, nor a file's
        and memory.nbytes() == first.nbytes
        and lies_plain(first)
        and not (first.is_inference() or first.requires_grad)
        and first.data_ptr() != 0
    )


def holders(column: Column) -> list[int]:
    """How many hold the first gradient, what it is a view of, and its memory: in Python, and all.

    torch 2.13 has one Python reference for all of its own, which makes `_use_count` a second look there.
    """
    first, used = some(column), Tensor._use_count  # type: ignore[attr-defined]
    memory, base = first.untyped_storage(), first._base
    count = [sys.getrefcount(first), used(first), sys.getrefcount(memory), torch._C._storage_Use_Count(memory._cdata)]
    return count if base is None else [*count, sys.getrefcount(base), used(base)]


def alike(columns: Sequence[Column], at: Iterable[int]) -> list[tuple[bool, list[int]]]:
    """These parameters by device and dtype of their gradients, small ones first: whether torch must take them."""
    found: dict[tuple[torch.device, frozenset[torch.dtype], bool], list[int]] = {}
    for i in sorted(at, key=lambda i: numel(columns[i])):
        having = [g for g in columns[i] if g is not None]
        of = having[0].device, frozenset(g.dtype for g in having), any(map(hollow, having))
        found.setdefault(of, []).append(i)
    return [
        (wrapped or len(dtypes) > 1 or mix.why_not(len(columns[group[0]]), device, *dtypes) is not None, group)
        for (device, dtypes, wrapped), group in found.items()
    ]


def together(group: Sequence[int], sizes: Sequence[int]) -> Iterator[list[int]]:
    """Neighbours that one loop takes, by the elements of new memory that each needs: a few large ones, or many."""
    run: list[int] = []
    free = TOGETHER
    for i, size in zip(group, sizes, strict=True):
        if run and size > free:
            yield run
            run, free = [], TOGETHER
        run.append(i)
        free -= size
    if run:
        yield run


def some(column: Column) -> Tensor:
    """The first that there is."""
    return next(g for g in column if g is not None)


def numel(column: Column) -> int:
    return max(0 if g is None else g.numel() for g in column)


def laid(column: Column) -> Column:
    """A parameter's gradients without gaps, in the order in which the first lies in memory: copies where need be."""
    if not copied(column):
        return column
    dims = sorted(range(some(column).dim()), key=some(column).stride, reverse=True)
    return [None if g is None else g.permute(dims).reshape(-1).resolve_neg().contiguous() for g in column]


def copied(column: Column) -> int:
    """How many elements of each gradient `laid` may copy."""
    return 0 if all(g is None or lies_plain(g) for g in column) else numel(column)


def lies_plain(g: Tensor) -> bool:
    """Whether the elements stand in memory one after the other, as they are."""
    return g.is_contiguous() and not g.is_neg()


def by_matrices(parts: Sequence[Column]) -> Tensor:
    """Inner products over all parts, by torch; each gradient is read once."""
    first, tasks = some(parts[0]), len(parts[0])
    total = torch.zeros(tasks, tasks, dtype=torch.float64, device=first.device)
    room = max(1, PIECES.get(first.device.type, PIECE) // tasks)
    wide = torch.empty(tasks, room, dtype=torch.float64, device=first.device)
    for pack in packs([numel(part) for part in parts], room):
        end = 0
        for i, start, stop in pack:
            begin, end = end, end + stop - start
            for row, g in zip(wide[:, begin:end], parts[i], strict=True):
                row.copy_(g.view(-1)[start:stop]) if g is not None else row.zero_()
        x = wide[:, :end]
        total += x @ x.T
    return total


def packs(sizes: Sequence[int], room: int) -> Iterator[list[tuple[int, int, int]]]:
    """Pieces (vector, start, stop), together at most `room` elements."""
    pack, free = [], room
    for i, size in enumerate(sizes):
        start = 0
        while start < size:
            stop = min(size, start + free)
            pack.append((i, start, stop))
            start, free = stop, free - (stop - start)
            if not free:
                yield pack
                pack, free = [], room
    if pack:
        yield pack


def combination(into: Tensor, column: Column, weights: Tensor) -> None:
    """The weighted sum of a parameter's gradients by torch, rounded once; `into` may lie where the first does."""
    (t, first), *more = [(t, g) for t, g in enumerate(column) if g is not None]
    weights = weights.to(first.device, compute_dtype(first.dtype))
    total = into if into.dtype == weights.dtype else torch.empty_like(into, dtype=weights.dtype)
    total.copy_(first).mul_(weights[t])
    for t, g in more:
        total.addcmul_(g, weights[t])
    into.copy_(total)


def summed(column: Column) -> Tensor | None:
    """The sum of a parameter's gradients, in a tensor of its own: autograd may give two parameters the same one."""
    having = [g for g in column if g is not None]
    if not having:
        return None
    total = having[0].clone()
    for g in having[1:]:
        total += g
    return total
