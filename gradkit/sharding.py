"""Sharded parameters: the only place that knows DTensor; plain tensors pass through untouched."""

import sys
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor


def is_sharded(t: Tensor) -> bool:
    """Whether t is a DTensor; nobody has one before its module is imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, getattr(module, "DTensor", ()))


def refuse_sharded(who: str, p: Tensor) -> None:
    """Raise for a parameter of which this rank holds a part: a DTensor, or FSDP's flat one."""
    if is_sharded(p) or getattr(p, "_is_flat_param", False):
        raise TypeError(
            f"{who}: a parameter of shape {tuple(p.shape)} is sharded, which is not supported; "
            f"replicate parameters on all ranks"
        )


def local(t: Any) -> Any:
    """This rank's plain tensor, sharing storage; to_local() would make a new view of each parameter each step."""
    return t._local_tensor if is_sharded(t) else t


def whole(t: Any) -> Any:
    """The full tensor, on every rank."""
    return t.full_tensor() if is_sharded(t) else t


def placements(p: Any) -> tuple:
    """How a DTensor lies on its mesh: in parts (whatever has a `dim`: `_StridedShard.is_shard()` is False) or whole."""
    if not all(hasattr(x, "dim") or x.is_replicate() for x in p.placements):
        raise TypeError(f"a parameter placed as {p.placements} can't be stepped; redistribute it to Shard or Replicate")
    return p.placements


def local_grad(g: Any, p: Any) -> Any:
    """The gradient's local tensor in p's placements."""
    if is_sharded(g) != is_sharded(p):
        kinds = ["a DTensor" if is_sharded(t) else "a plain tensor" for t in (p, g)]
        raise TypeError(f"the parameter is {kinds[0]} and its gradient {kinds[1]}; both must be of one kind")
    flat = local(g.redistribute(p.device_mesh, p.placements) if is_sharded(g) and g.placements != p.placements else g)
    return flat.wait() if hasattr(flat, "wait") else flat  # a collective that is still under way has no data yet


def store(flat: Tensor, p: Any, g: Any) -> None:
    """Bring a local tensor in p's layout to the gradient g of p; one of other placements, or expanded, is replaced."""
    if is_sharded(p) and g.placements != p.placements:
        p.grad = type(p).from_local(
            flat, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
        )
    elif 0 in [stride for stride, size in zip(g.stride(), g.shape, strict=True) if size > 1]:
        p.grad = flat
    else:
        local(g).copy_(flat)


def slot(p: Any, dtype: torch.dtype, length: int | None = None) -> Any:
    """Zeros laid out like p; with a length a ring of such entries."""
    flat, ring = torch.zeros_like(local(p).detach(), dtype=dtype), () if length is None else (length,)
    if ring:
        layout = (*ring, *flat.shape), (max(1, flat.numel()), *flat.stride())
        flat = torch.empty_strided(*layout, dtype=dtype, device=flat.device).zero_()
    if not is_sharded(p):
        return flat
    shape, stride = torch.Size((*ring, *p.shape)), (*(max(1, p.numel()) for _ in ring), *p.stride())
    later = [shifted(x, len(ring)) for x in placements(p)]
    return type(p).from_local(flat, p.device_mesh, later, run_check=False, shape=shape, stride=stride)


def shifted(placement: Any, by: int) -> Any:
    """The same placement for a tensor with more leading dimensions."""
    if not hasattr(placement, "dim"):
        return placement
    more = {"split_factor": placement.split_factor} if hasattr(placement, "split_factor") else {}
    return type(placement)(placement.dim + by, **more)


def complete(totals: Tensor, how: Sequence[str], params: Sequence[Any]) -> None:
    """Join the shards' totals [parameters, results] in place: one stacked all-reduce for each groups and operation.

    It covers every parameter that is sharded over these groups, gradient or not, so that no rank waits for another.
    """
    from torch.distributed import ReduceOp, all_reduce

    alike: dict[tuple, list[int]] = {}
    for row, p in enumerate(params):
        if is_sharded(p):
            alike.setdefault((p.device_mesh, placements(p)), []).append(row)
    stacks: dict[tuple, tuple[list, str, list[int]]] = {}
    for (mesh, placed), rows in alike.items():
        groups = [mesh.get_group(i) for i, x in enumerate(placed) if hasattr(x, "dim")]
        stacks.setdefault(tuple(g.group_name for g in groups), (groups, mesh.device_type, []))[2].extend(rows)
    for groups, device, rows in stacks.values():
        for op, kinds in ((ReduceOp.SUM, ("sum", "mean")), (ReduceOp.MAX, ("max",))):
            columns = [j for j, kind in enumerate(how) if kind in kinds]
            if not columns:
                continue
            part = totals[rows][:, columns]
            lost = part.isnan()  # a maximum over ranks would forget it
            both = torch.cat([part.masked_fill(lost, 0.0), lost.double()], 1)
            both = both if both.device.type == device else both.to(device)  # parameters offloaded to the CPU
            for group in groups:
                all_reduce(both, op=op, group=group)
            part, lost = both.to(totals.device).chunk(2, 1)
            totals[torch.tensor(rows)[:, None], columns] = part.masked_fill(lost > 0, torch.nan)


def logical_index(p: Any) -> int | Tensor:
    """Where the local elements stand, row-major, in the full tensor: the first if they are consecutive, else each."""
    flat, sharded = local(p), is_sharded(p)
    if not flat.numel() or not flat.dim() or (flat.is_contiguous() and not sharded):
        return 0
    dims = [torch.arange(n, device="cpu") for n in p.shape]
    for i, x in enumerate(placements(p) if sharded else ()):
        if hasattr(x, "dim"):
            size, mine, n = p.device_mesh.size(i), p.device_mesh.get_coordinate()[i], getattr(x, "split_factor", 1)
            dims[x.dim] = torch.cat([chunk(chunk(dims[x.dim], n, j), size, mine) for j in range(n)])
    if tuple(map(len, dims)) != flat.shape:
        raise RuntimeError(f"{p.placements} of {tuple(p.shape)} does not give this shard of {tuple(flat.shape)}")
    steps = [prod(p.shape[d + 1 :]) for d in range(p.dim())]
    first, last = int(dims[0][0]), int(dims[0][-1])
    if flat.is_contiguous() and last - first == len(dims[0]) - 1 and flat.shape[1:] == p.shape[1:]:
        return first * steps[0]
    parts = [(d * step).to(flat.device) for d, step in zip(dims, steps, strict=True)]
    return sum(torch.meshgrid(*parts, indexing="ij"), torch.zeros((), dtype=torch.int64, device=flat.device))


def chunk(positions: Tensor, parts: int, which: int) -> Tensor:
    """One of the parts that torch.chunk makes; the last ones may be empty."""
    return (*positions.chunk(parts), *[positions[:0]] * parts)[which]
