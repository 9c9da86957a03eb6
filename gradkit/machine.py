"""From groups, state and gradients to plans, and what a step runs: without a word about whose groups these are."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import sharding, stats
from .backends import choose
from .chain import Chain, Placed
from .chain import chain as make_chain
from .explain import describe, trace
from .options import (
    COUNT,
    DTYPES,
    Range,
    brief,
    check_number,
    check_patterns,
    check_values,
    hint,
    listed,
    own_defaults,
)
from .plan import Batch, Kind, Member, Plan, Program, kind_of
from .scalars import shared
from .selection import Choice, Choices, Turn, select, select_tensors, turn_of
from .transform import Measure, Rule
from .transforms.tap import PixelwiseClip

ProgramOf = Callable[[Mapping[str, Any]], Program]  # of a group
TurnOf = Callable[[Placed, Mapping[str, Any]], Turn]  # of a split, in a group
BOOKKEEPING = ("params", "param_names", "clock", "lr_ref", "algorithm", "turn")


class Machine:
    """Runs a chain on the parameters of groups that have a gradient: `pieces(group)` says which."""

    param_groups: list[dict[str, Any]]
    state: defaultdict[Tensor, Any]
    defaults: dict[str, Any]
    chain: Chain | None = None  # beside the transforms
    ranges: ClassVar[Mapping[str, Range]] = {}  # of a subclass's own hyperparameters
    forgetting = "delete it from the state"  # what to do about a slot that doesn't fit
    target = ""  # what a chain without a write stores, as of a Pass
    counts_every = 0  # steps; 0: never
    _counted: stats.Counted | None = None

    def __init__(self, transforms: Iterable[Chain], backend: str):
        self.transforms, self.backend, self.choices = tuple(transforms), backend, Choices()
        self._kept: set[str] = set()  # what the first group holds for measures over all tensors
        self._forget()

    def _forget(self) -> None:
        """Everything that can be made anew."""
        self._plans: dict[Any, Plan] = {}  # by what runs
        self._checked: list = []
        self._programs: dict[tuple, Program] = {}
        self._laid: dict[Tensor, tuple] = {}  # what a split's state is laid out for, beside the turn in its group
        self._known: dict[Tensor, tuple[tuple, Choice | bool]] = {}  # the last that was asked for

    def _check_values(self, values: Mapping[str, Any]) -> None:
        whole = (*self.transforms, *([self.chain] if self.chain else []))
        chains = [c for x in whole for c in x.walk()]
        of_chains = {f"{c.name}.{n}": allowed for c in chains for n, allowed in c.ranges.items()}
        defaults = {f"{c.name}.{n}": value for c in chains for n, value in c.arguments.items()}
        defaults |= getattr(self, "defaults", None) or own_defaults(type(self))
        check_values(self.who, values, defaults, {**self.ranges, **of_chains})

    def _check_names(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Raise if a transform's patterns match no parameter's name."""
        who, names = self.who, [n for g in groups for n in g.get("param_names", ())]
        for key, patterns in [(k, v) for g in groups for k, v in g.items() if k.endswith(".exclude") and v]:
            check_patterns(who, key, patterns)
            if not names:
                raise ValueError(f"{who}: {key}={patterns!r} needs names: give model.named_parameters()")
            for pattern in patterns:
                if not any(fnmatchcase(n, pattern) for n in names):
                    module = [f"{pattern}.*"] * any(n.startswith(f"{pattern}.") for n in names)
                    raise ValueError(f"{who}: {key}: {pattern!r} matches no parameter{hint(pattern, module or names)}")

    @property
    def who(self) -> str:
        """What texts call it."""
        return type(self).__name__

    def pieces(self, group: Mapping[str, Any]) -> list[Placed]:
        """The links that a group runs: a pure function of its values."""
        raise NotImplementedError

    def check_parameter(self, p: Tensor, group: Mapping[str, Any]) -> None:
        """Raise if a parameter doesn't fit its group; asked when it is added, and for each plan: shapes may change."""

    def check_group(self, group: Mapping[str, Any], beside: Iterable[Mapping[str, Any]] = ()) -> Program:
        """The chain that a group runs; raises if it lacks an order, a slot's owner or a scalar, or a value is wrong."""
        self._check_values(group)
        program = self._program(self.pieces(group), group)
        program.scalars.row(group, dict.fromkeys(program.scalars.counters, 1.0), 1.0)
        for ps in program.passes:
            if ps.measure and ps.measure.link.scope == "all":
                shared(ps.measure, [*beside, group], 1.0)
        return program

    def _program(self, pieces: Sequence[Placed], group: Mapping[str, Any]) -> Program:
        """The one for such pieces."""
        made = Program(pieces, group, self.target)
        return self._programs.setdefault(made.key(), made)

    def counting(self, group: Mapping[str, Any]) -> Program:
        """What a group runs in a step that counts."""
        return self._program(stats.counting(self.check_group(group).pieces), group)

    def _run(self, grads: Sequence[Tensor | None]) -> None:
        """One step on these gradients, of which some are there."""
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"{self.who}: a CUDA graph would repeat this step's numbers; step outside it")
        self._check_edits()
        counts = self.counts_every and (float(self.param_groups[0].get("clock", 0.0)) + 1) % self.counts_every == 0
        plan = self._fitting(*(("stats", self.counting) if counts else ("step", self.check_group)), grads)
        plan.begin(self.param_groups)
        if counts:
            self._counted = stats.Counted.of(plan, self.param_groups)
        self.param_groups[0].setdefault("clock", torch.zeros((), dtype=torch.float64)).add_(1)
        for batch in plan.batches:  # nothing has changed up to here
            batch.count()
        plan.reduce()
        plan.apply()
        self.applied()

    def _check_edits(self) -> None:
        """Raise if a value in a group is wrong; looked at where one has changed."""
        values = [
            [v for k, v in g.items() if (k in self.defaults or "." in k) and k not in self._kept]
            for g in self.param_groups
        ]
        if values != self._checked:
            for group in self.param_groups:
                self._check_values(group)
            self._checked = values

    def applied(self) -> None:
        """What a class has to do after a step."""

    @torch.no_grad()
    def run_beside(self, chain: Chain, grads: Sequence[Tensor | None], **values: Any) -> None:
        """Run a chain that changes slots only, on one tensor a parameter, with `values` in every group. Nothing counts.

        The slots are those of the optimizer's own chain.
        """
        groups = [{**g, **values} for g in self.param_groups]
        made = chain.place()

        def program_of(group: Mapping[str, Any]) -> Program:
            return self._program(made, {**group, **values})

        if any(g is not None for g in grads):
            plan = self._fitting(chain, program_of, grads)
            plan.begin(groups)
            plan.reduce()
            plan.apply()

    def _fitting(self, key: Any, program_of: ProgramOf, grads: Sequence[Tensor | None]) -> Plan:
        """The plan of what `key` names, which holds the gradients; made anew if anything but values has changed."""
        params = [p for g in self.param_groups for p in g["params"]]
        idle = {*BOOKKEEPING, *self._kept}
        structure = [[shape_of(v) for k, v in g.items() if k not in idle] for g in self.param_groups]
        structure += [[self.backend, self.transforms, self.choices]]  # compared as objects
        plan = self._plans.get(key)
        now = params, grads, structure, self.param_groups
        if plan is None or not plan.fits(self.state, *now):
            self._drop_plans([k for k, x in self._plans.items() if k == key or any(x.splits)])
            plan = self._plans[key] = self._make_plan(program_of, params, grads, structure)
            if not plan.fits(self.state, *now):
                raise RuntimeError(f"{self.who}: parameters or gradients have no memory to step on")
        return plan

    def _drop_plans(self, keys: Iterable[Any] | None = None) -> None:
        """Forget these, or all: before new state is made, for they hold the old."""
        for key in list(self._plans) if keys is None else keys:
            self._plans.pop(key).release()

    def batches(self, grads: Sequence[Tensor | None], program_of: ProgramOf | None = None) -> list[Batch]:
        """The parameters that have a gradient by program, device and dtypes; makes and changes nothing."""
        members: dict[Kind, list[Member]] = {}
        for _, program, member in self.seats(self.param_groups, partial(turn_of, clock=self.clock + 1), program_of):
            if (g := grads[member.at]) is not None:
                self.check_parameter(member.p, self.param_groups[member.group])
                kind = kind_of(program, member.p, g, self.param_groups[member.group])
                members.setdefault(kind, []).append(member)
        return [Batch(kind, m, self.param_groups) for kind, m in members.items()]

    @property
    def clock(self) -> float:
        """Steps applied."""
        return float(self.param_groups[0].get("clock", 0.0))

    def seats(
        self, groups: Sequence[Mapping[str, Any]], of_split: TurnOf, program_of: ProgramOf | None = None
    ) -> Iterator[tuple[Program, Program, Member]]:
        """Each parameter, with its group's program and what that is for it in a turn of the split."""
        at = 0
        for n, group in enumerate(groups):
            program, params = (program_of or self.check_group)(group), group["params"]
            turn = of_split(program.split, group) if program.split else None
            blocks = select_tensors(self.choices, turn, n, len(params)) if turn and turn.kind == "blocks" else None
            names = group.get("param_names") or [""] * len(params)
            for j, (p, name) in enumerate(zip(params, names, strict=True)):
                chosen = turn and (j in blocks if blocks is not None else self._chosen(turn, p, at))
                runs = self._program(program.only(chosen), group) if isinstance(chosen, bool) else program
                yield program, runs, Member(p, at, n, name, turn, chosen)
                at += 1

    def _chosen(self, turn: Turn, p: Tensor, at: int) -> Choice | bool:
        """What a split selects of a parameter."""
        known, asked = self._known.get(p), (self.choices, turn, at, p.shape)
        if known is None or known[0] != asked:
            known = self._known[p] = asked, select(self.choices, turn, p, at)
        return known[1]

    def _make_plan(
        self, program_of: ProgramOf, params: list[Tensor], grads: Sequence[Tensor | None], structure: list
    ) -> Plan:
        who = self.who
        for i, (p, g) in enumerate(zip(params, grads, strict=True)):
            if g is not None and g.layout != torch.strided:
                raise RuntimeError(
                    f"{who}: the gradient of parameter {i} is sparse ({g.layout}), which is not supported; "
                    f"use sparse=False in the embedding, or torch.optim.SparseAdam for it"
                )
            if g is not None and g.dtype not in DTYPES:
                raise TypeError(f"{who}: the gradient of parameter {i} is {g.dtype}: use one of {listed(DTYPES)}")
            if 0 in [stride for stride, size in zip(p.stride(), p.shape, strict=True) if size > 1]:
                raise RuntimeError(f"{who}: parameter {i} is expanded, its elements share memory; use p.contiguous()")
            if g is not None and (g.shape, g.device) != (p.shape, p.device):
                raise RuntimeError(
                    f"{who}: parameter {i} is {tuple(p.shape)} on {p.device}, its gradient {tuple(g.shape)} on "
                    f"{g.device}; call zero_grad() after a parameter was replaced"
                )
        self._check_names(self.param_groups)
        for held in (self._known, self._laid):  # those that a framework has replaced
            for p in held.keys() - {*params}:
                del held[p]
        plan = Plan(self.batches(grads, program_of), params, grads, structure)
        plan.take_turns([program_of(g).split for g in self.param_groups], self.param_groups)
        chosen = [choose(self.backend, batch)[0] for batch in plan.batches]
        wanted = {p for p, g in zip(params, grads, strict=True) if self.gets_state(p, g)}
        self._make_state(wanted, self.clock + 1)
        plan.attach(self.state, self.param_groups[0])
        for batch, backend in zip(plan.batches, chosen, strict=True):
            batch.backend = backend(batch)
        return plan

    def gets_state(self, p: Tensor, g: Tensor | None) -> bool:
        """Whether a parameter's slots are made now: a distributed checkpoint lacks those made later."""
        return p.requires_grad or g is not None

    def _make_state(self, wanted: set[Tensor], clock: float) -> None:
        """Slots of these parameters; of others that have some, what a split selects."""
        who = self.who
        seats = list(self.seats(self.param_groups, partial(turn_of, clock=clock)))
        seats = [x for x in seats if x[2].p in wanted or x[2].p in self.state]
        for whole, _, member in seats:  # before any state has changed
            self._check_shape(whole, member.p)
        for whole, program, member in seats:  # all that goes before what comes
            if member.turn:
                self._take_turn(whole, program, member)
        for _, program, member in seats:
            p, group = member.p, self.param_groups[member.group]
            if member.turn:
                group["turn"] = tuple(member.turn)
            if p not in wanted:
                continue
            state = self.state[p]
            for name, dtype in program.layout(p, group).items():
                part, length = program.part(name, member.chosen), program.ring_length(name, group)
                state[name] = laid_out(state.get(name), p, part, dtype, length, who, name, self.forgetting)
            for name in program.memory:
                state[name] = torch.as_tensor(state.get(name, 0.0), dtype=torch.float64, device=p.device)
            for name in program.scalars.counters:
                state[name] = torch.as_tensor(state.get(name, 0.0), dtype=torch.float32, device="cpu")

    def _check_shape(self, whole: Program, p: Tensor) -> None:
        """Raise if a split's state is that of another shape."""
        *_, shape = self._laid.get(p, (p.shape,))
        if shape != p.shape and whole.low & {*self.state.get(p, ())}:
            raise ValueError(
                f"{self.who}: a parameter of shape {tuple(p.shape)} was {tuple(shape)} when its state was "
                f"made; delete that: del optimizer.state[p]"
            )

    def _take_turn(self, whole: Program, program: Program, member: Member) -> None:
        """Clear what a split holds of a parameter if that is of another turn; drop it where it doesn't fit."""
        p, state, group = member.p, self.state[member.p], self.param_groups[member.group]
        assert whole.split
        assert member.turn
        now = self.choices, member.at if isinstance(member.chosen, Choice) else None, p.shape
        anew = tuple(group.get("turn", member.turn)) != member.turn or self._laid.get(p, now) != now
        slots, keep = program.low & {*program.slots}, whole.split.link.keep
        misfits = {n for n in slots & {*state} if state[n].shape != (program.part(n, member.chosen) or p.shape)}
        stale = {"nothing": program.low, "counts": slots, "all": program.low if misfits else set()}[keep]
        for name in whole.low & {*state}:
            if name not in program.low or (anew and name in misfits):
                del state[name]
            elif anew and name in stale:
                state[name].zero_()  # new memory would cost more than a step
        self._laid[p] = now

    def explain(self) -> str:
        """The plan as text: chain, passes, launches, bytes an element, state bytes, backend and why."""
        return describe(self)

    def stats(self, every: int | None = None) -> dict[str, dict[str, float]]:
        """What the last counting step did, by parameter: norms, what was clipped, resets. Waits for the device.

        every: count on each step whose number it divides, from now on; 0: no more. Other steps are unchanged.
        """
        if every is not None:
            check_number("stats", "every", every, COUNT)
            self.counts_every, self._counted = int(every), None
            self._drop_plans({*self._plans} & {"stats"})
        elif not self.counts_every:
            raise RuntimeError(f"{self.who}.stats: nothing is counted; call stats(every=100) before training")
        return self._counted.read() if self._counted else {}

    def trace(self, p: Tensor) -> list[tuple[str, Tensor]]:
        """One parameter's update after each link of the coming step, on cloned state; the last is its new value."""
        return trace(self, p)


def as_chain(link: Any) -> Any:
    """A link alone as the chain that it is."""
    return make_chain(link) if isinstance(link, Rule | Measure) else link


def checked_chain(who: str, link: Any) -> Chain:
    """A transform or link that the user gave, as the chain that it is; raises for anything else."""
    if isinstance(link, PixelwiseClip):
        raise TypeError(
            f"{who}: pixelwise_clip works on a tensor in the forward, not in an optimizer; call it there: "
            f"image = pixelwise_clip(...)(image)"
        )
    made = as_chain(link)
    if not isinstance(made, Chain):
        remedy = "give one, e.g. clip_by_global_norm(1.0)"
        if isinstance(link, list | tuple):
            remedy = "give them one by one"
        elif callable(link):
            remedy = "call it, e.g. clip_by_global_norm(1.0)"
        raise TypeError(f"{who}: {brief(link)} is no chain or transform; {remedy}")
    return made


def check_dtype(who: str, p: Tensor) -> None:
    """Raise for a parameter that no rule can run on."""
    if p.dtype not in DTYPES:
        use = "torch.view_as_real" if p.is_complex() else f"one of {listed(DTYPES)}"
        raise TypeError(f"{who}: a parameter of dtype {p.dtype} is not supported: use {use}")


def shape_of(value: Any) -> Any:
    """What a chain may be built from: anything, but of a float only whether it is zero."""
    if isinstance(value, float) or (isinstance(value, Tensor) and value.dim() == 0):
        return type(value), value == 0.0 if isinstance(value, float) else float(value) == 0.0
    if isinstance(value, tuple | list):
        return tuple(map(shape_of, value))
    return (type(value), value) if isinstance(value, str | int | None | torch.dtype) else id(value)


def laid_out(
    old: Tensor | None,
    p: Tensor,
    part: tuple | None,
    dtype: torch.dtype,
    length: int | None,
    who: str,
    name: str,
    remedy: str,
) -> Tensor:
    """A slot of p's layout, or of a part of it: the old one where it fits, else a new one with its values."""
    like = p if part is None else torch.empty(part, dtype=dtype, device=p.device)
    if old is None:
        return sharding.slot(like, dtype, length)
    have, flat = sharding.local(old), sharding.local(like)
    shape, stride = flat.shape, flat.stride()
    if length is not None:
        shape, stride = (length, *shape), (max(1, flat.numel()), *stride)
    if have.shape != shape:
        raise ValueError(
            f"{who}: the slot {name!r} of a parameter of shape {tuple(p.shape)} is {tuple(have.shape)}, it needs "
            f"{tuple(shape)}; {remedy}"
        )
    alike = (have.dtype, have.device, have.stride()) == (dtype, flat.device, stride)
    if alike and (have is old) == (flat is like):
        return old
    new = sharding.slot(like, dtype, length)
    sharding.local(new).copy_(have)
    return new
