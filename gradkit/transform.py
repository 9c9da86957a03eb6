"""The kinds of links: a rule sees one element, a measure makes scalars from a tensor or from all; derive makes scalars
on the host."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch

from .language import Code, RuleError

Function = Callable[..., Any]


class Stage(IntEnum):
    """What a link works on; a chain never goes back."""

    GRAD = 0  # what the gradient becomes
    PRECONDITION = 1  # which direction
    UPDATE = 2  # what is done to the direction
    WRITE = 3  # decay and the write itself


@dataclass(frozen=True)
class Slot:
    """State of a rule that has the parameter's shape.

    kind: "param", or "ring": `length` (a scalar of the chain) entries, of which the rule sees the oldest; what it
        returns replaces that one.
    dtype: None: the optimizer's `state_dtype`; else this, whatever that says (float32 is float64 for such parameters).
    """

    name: str
    kind: str = "param"
    dtype: torch.dtype | None = None
    length: str = "window"

    def __post_init__(self) -> None:
        if self.kind not in ("param", "ring"):
            raise ValueError(f"Slot({self.name!r}, kind={self.kind!r}): use 'param' or 'ring'")
        if self.dtype is not None and not (isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point):
            raise TypeError(f"Slot({self.name!r}, dtype={self.dtype!r}): use a floating torch.dtype or None")


class Link:
    """What all kinds share: a name, and being one object wherever it goes."""

    slots: tuple[Slot, ...] = ()
    uses: tuple[str, ...] = ()
    holds: tuple[str, ...] = ()

    def __init__(self, fn: Function):
        self.fn, self.name, self.__module__ = fn, getattr(fn, "__name__", ""), getattr(fn, "__module__", "")

    def __call__(self, *args: Any) -> Any:
        return self.fn(*args)

    def __reduce__(self) -> str:
        return self.fn.__qualname__  # pickle looks it up in the module, and checks that it finds this object

    def __deepcopy__(self, memo: Any) -> "Link":
        return self


def listed_names(link: str, argument: str, given: Any) -> tuple:
    if isinstance(given, str):
        raise TypeError(f"{link}: {argument}={given!r} is one string; give a tuple, e.g. {argument}=({given!r},)")
    return tuple(given)


def check_stage(link: str, stage: Any) -> None:
    if not (stage is None or isinstance(stage, Stage)):
        raise TypeError(f"{link}: stage={stage!r}; use one of {', '.join(f'Stage.{s.name}' for s in Stage)}")


class Rule(Link):
    """An elementwise link: `u`, `p` and `g` if it wants them, slots, scalars -> `u` and the new slots."""

    def __init__(
        self, fn: Function, slots: Sequence[str | Slot], uses: Sequence[str], stage: Stage | None, counts: str
    ):
        super().__init__(fn)
        check_stage(self.name, stage)
        if counts and counts not in COUNTS:
            raise ValueError(f"{self.name}: counts={counts!r}; use one of {', '.join(map(repr, COUNTS))}")
        self.stage, self.uses, self.counts = stage, listed_names(self.name, "uses", uses), counts
        self.slots = tuple(s if isinstance(s, Slot) else Slot(s) for s in listed_names(self.name, "slots", slots))
        self.holds = tuple(s.name for s in self.slots) + self.uses  # owned before borrowed
        self.code = Code(fn, lambda name: name in ("u", "p", "g", *self.holds))
        params = self.code.params
        self.sees = tuple(n for n in params[1:3] if n in ("p", "g"))
        rest = params[1 + len(self.sees) :]
        self.scalars = tuple(rest[len(self.holds) :])
        if params[:1] != ["u"] or tuple(rest[: len(self.holds)]) != self.holds or {"u", "p", "g"} & set(self.scalars):
            raise RuleError(
                f"{self.name}({', '.join(params)}): the parameters are u, then p and g if wanted, then the slots "
                f"{self.holds}, then scalars"
            )
        if not self.code.no_source and len(self.code.returns) != 1 + len(self.holds):
            raise RuleError(
                f"{self.code.file}:{self.code.first}: {self.name} returns {len(self.code.returns)} values; it must "
                f"return {', '.join(('p' if stage == Stage.WRITE else 'u', *self.holds))}"
            )
        returned = zip(self.holds, self.code.returns[1:], strict=False)
        only_read = {n for n, c in returned if c == f"v_{n}" and n not in self.code.assigned}
        self.changes = tuple(n not in only_read for n in self.holds)


REDUCTIONS = ("sum", "mean", "max")
AXES = {"row": 0, "column": 1}  # of scopes that are parts of a tensor
COUNTS = ("clipped", "spikes", "win_rate")


class Measure(Link):
    """Maps what flows, reduces it, and finishes to scalars that the links behind it may ask for by name.

    The map sees `u`, and by name `p`, `g`, and `before`: what flowed into the rule in front of it.

    scope: "tensor" (each its own), "all" (every tensor whose chain holds this very link), "row" or "column" (each slice
        along the first, or second, dimension; a tensor with fewer than two dimensions is one).
    reduce: a name for each value that the map returns -> "sum", "mean" or "max" (from 0: meant for magnitudes).
    finish: `(reductions, state, scalars) -> gives, state`, in the rule language with arithmetic among scalars, in
        float64. Over all tensors it reads its chain's arguments, the clock, and of the groups the first.
    state: names of numbers that it keeps from step to step, zero at first: of each tensor, in `state[p]`; over all, in
        the first group, as `<chain's name>.<name>`.
    """

    def __init__(
        self, fn: Function, scope: str, reduce: Mapping, gives: Sequence, finish: Function, state: Sequence, stage: Any
    ):
        super().__init__(fn)
        check_stage(self.name, stage)
        self.scope, self.stage, self.reduce, self.finish = scope, stage, dict(reduce), finish
        self.gives, self.state = listed_names(self.name, "gives", gives), listed_names(self.name, "state", state)
        if scope not in ("tensor", "all", *AXES):
            raise ValueError(f"{self.name}: scope={scope!r}; use 'row', 'column', 'tensor' or 'all'")
        if self.state and scope in AXES:
            raise ValueError(f"{self.name}: state={self.state!r} is kept of a tensor or of all: use such a scope")
        for how in self.reduce.values():
            if how not in REDUCTIONS:
                raise ValueError(f"{self.name}: reduce {how!r}; use one of {', '.join(REDUCTIONS)}")
        self.code = Code(fn, lambda name: True)
        self.sees = tuple(self.code.params[1:])
        if self.code.params[:1] != ["u"] or not set(self.sees) <= {"p", "g", "before"}:
            raise RuleError(f"{self.name}({', '.join(self.code.params)}): a measure maps u, and p, g, before if wanted")
        if not self.code.no_source and len(self.code.returns) != len(self.reduce):
            raise RuleError(f"{self.name} returns {len(self.code.returns)} values; reduce names {list(self.reduce)}")
        known, returned = [*self.reduce, *self.state], [*self.gives, *self.state]
        end = self.end = Code(finish, lambda name: False, scalar_math=True)
        self.scalars = tuple(end.params[len(known) :])
        if end.params[: len(known)] != known or (not end.no_source and len(end.returns) != len(returned)):
            raise RuleError(f"{self.name}: finish takes {known}, then scalars, and returns {returned}")

    def map(self, **seen: Any) -> tuple[Any, ...]:
        """The values to reduce, from u and whatever else the map sees."""
        out = self.fn(seen["u"], *(seen[n] for n in self.sees))
        return out if isinstance(out, tuple) else (out,)


class Derive(Link):
    """Scalars of a chain that the host computes in float64 from counters, arguments and the group."""

    def __init__(self, fn: Function, counters: Sequence[str]):
        super().__init__(fn)
        self.counters = tuple(counters)
        self.params = tuple(inspect.signature(fn).parameters)
        if lost := [c for c in counters if c not in self.params]:
            raise TypeError(f"derive({', '.join(map(repr, counters))}): {self.name} has no parameter {lost[0]!r}")


def rule(
    fn: Any = None,
    *,
    slots: Sequence[str | Slot] = (),
    uses: Sequence[str] = (),
    stage: Stage | None = None,
    counts: str = "",
) -> Any:
    """Make an elementwise link of a plain function. Without a stage it takes that of the link before it.

    counts: what `opt.stats()` calls the entries that it makes smaller: "clipped" (their share), "spikes" (their
        number) or "win_rate" (the share of the others).
    """
    if fn is not None:
        return Rule(fn, slots, uses, stage, counts)
    return lambda function: Rule(function, slots, uses, stage, counts)


def measure(
    *,
    scope: str,
    reduce: Mapping[str, str],
    gives: Sequence[str],
    finish: Function,
    state: Sequence[str] = (),
    stage: Stage | None = None,
) -> Callable[[Function], Measure]:
    """Make a link that measures what flows and gives scalars to the links behind it."""
    return lambda function: Measure(function, scope, reduce, gives, finish, state, stage)


def derive(*counters: str) -> Callable[[Callable[..., dict[str, Any]]], Derive]:
    """Make a chain's `derive`: the names are counters, seen after +1; one that it returns is set to that value."""
    return lambda function: Derive(function, counters)
