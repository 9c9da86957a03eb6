"""The plan as text, and the update of one parameter link by link."""

from collections import defaultdict
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import sharding
from .backends import Native, choose
from .backends.eager import Eager
from .backends.native import passes_of

if TYPE_CHECKING:
    from .chain import Placed
    from .machine import Machine
    from .plan import Batch, Pass


def describe(optimizer: "Machine") -> str:
    """One block for each batch of tensors that would run together."""
    grads = expected(optimizer)
    batches = optimizer.batches(grads)
    lines = [f"{optimizer.who}: {len(grads)} parameters, {len(batches)} batches"]
    lines += by_role(optimizer, batches)
    lines += block(optimizer, batches)
    if optimizer.counts_every:
        lines.append(f"every {optimizer.counts_every} steps, counting:")
        lines += block(optimizer, optimizer.batches(grads, optimizer.counting))
    return "\n".join(lines)


def block(optimizer: "Machine", batches: "list[Batch]") -> list[str]:
    """What each batch runs."""
    lines = []
    for batch in batches:
        backend, why = choose(optimizer.backend, batch)
        passes = batch.program.passes
        elements = numel(batch)
        dtypes = f"parameters {short(batch.dtype)}, gradients {short(batch.gdtype)}"
        here = " on this rank" if batch.sharded else ""
        lines.append(f"{len(batch.owners)} tensors, {elements} elements{here}: {dtypes} on {batch.device}")
        lines.append("  chain: " + flow(batch.program.pieces))
        if batch.choices:
            lines.append(f"  split: {batch.choices[0].kind}, {selected(batch)} elements selected")
        alone = [ps for ps, _ in passes_of(batch)] if backend is Native else passes
        cached = ["" if ps in alone else ", read with the next pass" for ps in passes]
        lines += [
            f"  pass {k}: {one_pass(batch, ps)}{note}"
            for k, (ps, note) in enumerate(zip(passes, cached, strict=True), 1)
        ]
        count: int | str = len(alone) if elements else 0
        if issubclass(backend, Eager):
            count = f"{len(batch.owners)} x {count} {backend.name}"
        lines.append(f"  launches: {count}; {sum(moved(batch, ps) for ps in passes):.3g} bytes an element")
        state = [f"{n} {short(d)}" for n, d in batch.slot_dtypes.items()]
        state += ["compensation"] * (batch.rounding == "kahan")
        state += [f"{n} a tensor" for n in batch.program.memory] + [f"{n} once" for n in batch.program.shared]
        lines.append(f"  state: {', '.join(state) or 'none'}; {sum(held(batch))} bytes; write-back {batch.rounding}")
        lines.append(f"  backend: {backend.name} ({why})")
    return lines


def by_role(optimizer: "Machine", batches: "list[Batch]") -> list[str]:
    """The bytes of state for each role, where groups have roles."""
    groups = optimizer.param_groups
    if not any("role" in g for g in groups):
        return []
    total = dict.fromkeys((g.get("role", "without a role") for g in groups), 0)
    for batch in batches:
        for g, size in zip(batch.group, held(batch), strict=True):
            total[groups[g].get("role", "without a role")] += size
    here = " on this rank" if any(b.sharded for b in batches) else ""
    return [f"state by role{here}: {', '.join(f'{role} {size:,}' for role, size in total.items())} bytes"]


def expected(optimizer: "Machine") -> list[Tensor | None]:
    """The gradients; before there are any, tensors of their kind."""
    params = [p for g in optimizer.param_groups for p in g["params"]]
    return [p if p.grad is None and p.requires_grad else p.grad for p in params]


def apart(value: object) -> object:
    """A number that a plan would write to, as one of its own."""
    return value.clone() if isinstance(value, Tensor) and not value.dim() else value


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def moved(batch: "Batch", ps: "Pass") -> float:
    """Bytes read and written for one element."""
    own = batch.dtype.itemsize * (2 if batch.rounding == "kahan" else 1)
    share = {n: selected(batch) / max(1, numel(batch)) if n in ps.low else 1 for n in ps.slots}
    slots = sum(batch.slot_dtypes[n].itemsize * share[n] for n in (*ps.slots, *ps.stores))
    return batch.gdtype.itemsize * (1 + (ps.target == "g")) + slots + own * (ps.reads_p + (ps.target == "p"))


def numel(batch: "Batch") -> int:
    return sum(sharding.local(p).numel() for p in batch.owners)


def selected(batch: "Batch") -> int:
    """How many elements a split selects."""
    return sum(x.count for x in batch.choices)


def held(batch: "Batch") -> list[int]:
    """Bytes of each tensor's slots, made or not."""
    sizes = []
    low = batch.program.low if batch.program.splits else set()
    chosen = [x.count for x in batch.choices] or [0] * len(batch.owners)
    for p, g, k in zip(batch.owners, batch.group, chosen, strict=True):
        lengths = {n: batch.program.ring_length(n, batch.groups[g]) or 1 for n in batch.slot_dtypes}
        per = sum(d.itemsize * lengths[n] for n, d in batch.slot_dtypes.items() if n not in low)
        per += batch.dtype.itemsize if batch.rounding == "kahan" else 0
        part = sum(d.itemsize for n, d in batch.slot_dtypes.items() if n in low) * k
        sizes.append(8 * len(batch.program.memory) + sharding.local(p).numel() * per + part)
    return sizes


def flow(pieces: "Sequence[Placed]") -> str:
    """Links in order; of a split what is selected, and the rest."""
    out: list[str] = []
    for (partial, selected), group in groupby(pieces, lambda x: (x.partial, x.selected)):
        text = " -> ".join(x.label for x in group)
        if not partial or selected:
            out.append(f"({text} | " if partial else text)
        else:
            out[-1] += f"{text})"
    return " -> ".join(out)


def one_pass(batch: "Batch", ps: "Pass") -> str:
    rules = flow([x for _, x in ps.rules]) or "g"
    what = "apply"
    if ps.measure:
        link = ps.measure.link
        what = f"{ps.measure.label}: {', '.join(link.reduce.values())} over {link.scope}"
    return f"{rules} | {what} | {moved(batch, ps):.3g} bytes an element"


@torch.no_grad()
def trace(optimizer: "Machine", p: Tensor) -> list[tuple[str, Tensor]]:
    """Run the coming step up to the write, storing nothing."""
    params = [q for g in optimizer.param_groups for q in g["params"]]
    grads = [q.grad for q in params]
    if not any(q is p for q in params) or p.grad is None:
        raise ValueError("trace: give a parameter of this optimizer that has a gradient: call it after backward()")
    state, groups, laid = optimizer.state, optimizer.param_groups, optimizer._laid
    optimizer.param_groups = [{k: apart(v) for k, v in g.items()} for g in groups]
    optimizer._laid = {**laid}
    copy = torch.clone if any(optimizer.check_group(g).split for g in groups) else apart  # a split may clear its slots
    optimizer.state = defaultdict(dict, {q: {n: copy(s) for n, s in slots.items()} for q, slots in state.items()})
    try:
        plan = optimizer._make_plan(optimizer.check_group, params, grads, [])
    finally:
        optimizer.state, optimizer.param_groups, optimizer._laid = state, groups, laid
    for batch in plan.batches:
        batch.backend = Eager(batch)
        batch.bind(grads)
    plan.begin(optimizer.param_groups)
    plan.reduce()
    steps: list[tuple[str, Tensor]] = []
    for batch in plan.batches:
        for t, q in enumerate(batch.owners):
            if q is p:
                last, eager = batch.program.passes[-1], Eager(batch)
                eager.begin()
                (part,) = eager.parts(last, t)
                seen = eager.walk(last, part, lambda name, u: steps.append((name, u.clone())))
                if last.target == "p":
                    rest = part.residual
                    part.p, part.residual = part.p.clone(), rest if rest is None else rest.clone()
                    eager.write(part, seen["p"], t)
                    steps[-1] = "write", part.p
    plan.release()
    return steps
