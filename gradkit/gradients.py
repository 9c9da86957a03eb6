"""Gradients of several tasks: their inner products, and their weighted sums."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .backends import mix
from .plan import compute_dtype

Column = Sequence[Tensor | None]  # of one parameter, from each task
Rows = list[list[Tensor | None]]  # of each task, of each parameter

PIECES = {"cpu": 1 << 17}  # elements of all tasks whose products torch forms at once: what fits a cache
PIECE = 1 << 19  # elsewhere: few launches, 4 MB of copies
TOGETHER = 1 << 20  # elements that one loop sums before their gradients are freed


def gramian(rows: Rows, each_tensor: bool = False) -> Tensor:
    """Inner products of the tasks' gradients in float64, [tasks, tasks]; of each parameter with a dimension before."""
    columns, tasks = list(zip(*rows, strict=True)), len(rows)
    filled = [i for i, column in enumerate(columns) if numel(column)]
    device = some(columns[filled[0]]).device if filled else torch.device("cpu")
    total = torch.zeros(len(columns), tasks, tasks, dtype=torch.float64, device=device)
    for by_torch, at in alike(columns, sorted(filled, key=lambda i: kind(columns[i]))):
        parts = [vectors(columns[i]) for i in at]
        if not by_torch:
            total[at] = mix.products(parts, tasks).to(device)
        elif each_tensor:
            total[at] = torch.stack([by_matrices([part]) for part in parts]).to(device)
        else:
            total[at[0]] = by_matrices(parts).to(device)
    return total if each_tensor else total.sum(0)


def combinations(rows: Rows, weights: Tensor) -> list[Tensor | None]:
    """The sum of each parameter's gradients by its weights [parameters, tasks], rounded once.

    Each gradient is taken out of the lists when it is done with.
    """
    columns: list[Column] = list(zip(*rows, strict=True))
    merged: list[Tensor | None] = [None] * len(columns)
    having = [i for i, column in enumerate(columns) if any(g is not None for g in column)]
    # Small ones first: by then they have freed more than the result for a large one takes.
    for by_torch, at in alike(columns, sorted(having, key=lambda i: numel(columns[i])), TOGETHER):
        if by_torch:
            made = [combination(columns[i], weights[i]) for i in at]
        else:
            made = [torch.empty_like(some(columns[i])) for i in at]
            mix.weighted([vectors([x, *columns[i]]) for i, x in zip(at, made, strict=True)], weights[at])
        for i, x in zip(at, made, strict=True):
            merged[i], columns[i] = x, ()
            for row in rows:
                row[i] = None
    return merged


def alike(columns: Sequence[Column], order: Sequence[int], most: float = math.inf) -> Iterator[tuple[bool, list[int]]]:
    """Neighbours of one kind with at most so many elements: whether torch must take them, and which they are."""
    run: list[int] = []
    size, last = 0, (True, "", "")
    for i in order:
        now, more = kind(columns[i]), numel(columns[i])
        if run and (now != last or size + more > most):
            yield last[0], run
            run, size = [], 0
        run.append(i)
        size, last = size + more, now
    if run:
        yield last[0], run


def kind(column: Column) -> tuple[bool, str, str]:
    """Whether torch must take it, its device and its dtype."""
    first, mixed = some(column), len({g.dtype for g in column if g is not None}) > 1
    return mixed or mix.why_not(len(column), first.device, first.dtype) is not None, str(first.device), str(first.dtype)


def some(column: Column) -> Tensor:
    """The first that there is."""
    return next(g for g in column if g is not None)


def numel(column: Column) -> int:
    return max(0 if g is None else g.numel() for g in column)


def lies(g: Tensor) -> list[int]:
    """The dimensions in the order in which a tensor lies in memory."""
    return sorted(range(g.dim()), key=g.stride, reverse=True)


def vectors(column: Column) -> list[Tensor | None]:
    """A parameter's gradients in the order in which the first lies in memory: views of dense ones."""
    if all(g is None or (g.is_contiguous() and not g.is_neg()) for g in column):
        return [None if g is None else g.view(-1) for g in column]
    dims = lies(some(column))
    return [None if g is None else g.permute(dims).reshape(-1).resolve_neg().contiguous() for g in column]


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
            for row, vector in zip(wide[:, begin:end], parts[i], strict=True):
                row.copy_(vector[start:stop]) if vector is not None else row.zero_()
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


def combination(column: Column, weights: Tensor) -> Tensor:
    """The weighted sum of a parameter's gradients by torch, rounded once."""
    (t, first), *more = [(t, g) for t, g in enumerate(column) if g is not None]
    weights = weights.to(first.device, compute_dtype(first.dtype))
    total = first.to(weights.dtype) * weights[t]
    for t, g in more:
        total.addcmul_(g, weights[t])
    return total.to(first.dtype)


def summed(column: Column) -> Tensor | None:
    """The sum of a parameter's gradients, in a tensor of its own: autograd may give two parameters the same one."""
    having = [g for g in column if g is not None]
    if not having:
        return None
    total = having[0].clone()
    for g in having[1:]:
        total += g
    return total
