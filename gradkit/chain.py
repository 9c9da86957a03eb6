"""A chain: links in order, and the scope of the scalars that they share."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from .options import Range, check_number
from .transform import Derive, Measure, Rule, Slot, Stage, check_stage


@dataclass(frozen=True, eq=False)
class Chain:
    """Made by `chain()`. Arguments stand in the optimizer's groups under `<name>.<argument>`."""

    items: tuple["Rule | Measure | Split | Chain", ...]
    name: str = ""
    derive: Derive | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    ranges: Mapping[str, Range] = field(default_factory=dict)  # of its arguments
    prefix: str = ""  # of its slots' names, when the user named it
    stage: Stage | None = None  # of links that come first and have none

    def named(self, name: str | None) -> "Chain":
        """This chain under a name that the user gave, which its slots carry too; itself for None."""
        if name is None:
            return self
        return replace(self, name=_identifier(name), prefix=f"{name}_")

    def walk(self) -> Iterator["Chain"]:
        """This chain and those inside it."""
        yield self
        for x in self.items:
            for c in (x,) if isinstance(x, Chain) else x.chains if isinstance(x, Split) else ():
                yield from c.walk()

    def place(self, stage: Stage = Stage.GRAD) -> list["Placed"]:
        """Its links in order, each with its scope and its stage: a link without one takes that of the link before."""
        placed: list[Placed] = []
        stage = stage if self.stage is None else self.stage
        for x in self.items:
            if isinstance(x, Chain):
                inner = replace(x, prefix=self.prefix + x.prefix) if self.prefix else x
                placed += inner.place(stage)
            elif isinstance(x, Split):
                placed += x.place(Placed(x, self, Stage.PRECONDITION))
            else:
                placed.append(Placed(x, self, stage if x.stage is None else x.stage))
            stage = placed[-1].stage if placed else stage
        for a, b in zip(placed, placed[1:], strict=False):
            if b.stage < a.stage:
                raise ValueError(
                    f"chain: {b.link.name} ({b.stage.name}) stands behind {a.link.name} ({a.stage.name}); the order is "
                    f"{' -> '.join(s.name for s in Stage)}: move it before, or give it another stage="
                )
        return placed

    def __deepcopy__(self, memo: Any) -> "Chain":
        return self


class Split:
    """Two chains for parts of the same tensors: one for what is selected, with state for that alone, one for the rest.

    kind: "blocks" (whole tensors), "columns", "rows" or "randk" (single entries). order: of blocks.
    keep: what goes on at a new selection: "nothing", "counts", or "all": state too, if its shape still fits.

    Its chain gives `density`, the share that is selected, and `refresh`, the number of the selection.
    """

    name, scalars = "split", ("density", "refresh")

    def __init__(self, kind: str, inside: Chain, outside: Chain, order: str = "random", keep: str = "nothing"):
        self.kind, self.chains, self.order, self.keep = kind, (inside, outside), order, keep

    def place(self, here: "Placed") -> list["Placed"]:
        """The links of both chains, the selected's first."""
        placed = []
        for selected, inner in ((True, self.chains[0]), (False, self.chains[1])):
            for x in inner.place():
                if x.side:
                    raise ValueError("split: another split stands in it: a chain may have one")
                if not isinstance(x.link, Rule) or x.stage == Stage.WRITE:
                    what = "a measure" if isinstance(x.link, Measure) else "a rule of WRITE"
                    raise ValueError(f"split: {x.label} can't stand in it, it is {what}: put it before or behind")
                if any(slot.kind == "ring" for slot in x.link.slots) or (x.link.holds and not selected):
                    what = "keeps a ring" if selected else "keeps or borrows state, which the rest has none of"
                    raise ValueError(f"split: {x.label} {what}: put it before or behind")
                placed.append(x._replace(stage=here.stage, side=Side(here, selected)))
        if not placed or not placed[0].side or not placed[0].side.selected:
            raise ValueError("split: the chain for what is selected is empty; give it a rule")
        return placed

    def __deepcopy__(self, memo: Any) -> "Split":
        return self


class Side(NamedTuple):
    """Which chain of a split a link stands in."""

    split: "Placed"
    selected: bool
    whole: bool = False  # the other one runs on none of a program's tensors

    @property
    def prefix(self) -> str:
        """Of what the state calls the split's slots and counters."""
        return self.split.chain.prefix or "low_"


class Placed(NamedTuple):
    """A link at its place in a chain."""

    link: Any  # a Rule or a Measure; of a Side a Split
    chain: Chain
    stage: Stage
    holds: tuple[str, ...] = ()  # what `state[p]` calls the rule's slots, once their owners are known
    side: Side | None = None

    @property
    def prefix(self) -> str:
        """Of what it owns."""
        return self.side.prefix + self.chain.prefix if self.side else self.chain.prefix

    @property
    def partial(self) -> bool:
        """Whether it runs on a part of each tensor."""
        return self.side is not None and not self.side.whole

    @property
    def selected(self) -> bool:
        """Whether it runs on what a split selects."""
        return self.side is not None and self.side.selected

    def counter(self, name: str) -> str:
        """What the state calls a counter of its chain: a split has its own, for a new selection starts them."""
        return self.side.prefix + name if self.side else name

    @property
    def label(self) -> str:
        """How texts call it: after its chain's name, if it has one, as the keys of groups do."""
        name = self.chain.name or self.chain.prefix.removesuffix("_")
        return self.link.name if name in ("", self.link.name) else f"{name}.{self.link.name}"


def chain(
    *links: Any,
    derive: Derive | None = None,
    name: str = "",
    ranges: Mapping | None = None,
    stage: Stage | None = None,
    **arguments: Any,
) -> Chain:
    """Links in order; their scalars come from counters, `derive`, measures before them, `arguments`, and the group.

    ranges: where arguments may lie, checked here and in every group.
    stage: of the links that come first and have none of their own; None: that of the link before the chain.
    """
    check_stage("chain", stage)
    for n, allowed in (ranges or {}).items():
        if n not in arguments:
            raise ValueError(f"chain: ranges={{{n!r}: ...}}: there is no such argument; it has {', '.join(arguments)}")
        check_number(name, n, arguments[n], allowed)
    for x in links:
        if not isinstance(x, Rule | Measure | Split | Chain):
            called = getattr(x, "__name__", repr(x))
            raise TypeError(
                f"chain: {called} is no link; decorate a function with @gradkit.rule or @gradkit.measure, "
                f"call a transform: {called}(...)"
            )
    if derive is not None and not isinstance(derive, Derive):
        raise TypeError("chain: derive= takes a function decorated with @gradkit.derive(...)")
    if arguments and not name:
        raise ValueError(f"chain: {', '.join(arguments)} need name=: arguments stand in groups as <name>.<argument>")
    made = Chain(links, _identifier(name) if name else "", derive, arguments, ranges or {}, stage=stage)
    made.place()  # order
    return made


def _identifier(name: str) -> str:
    if not (isinstance(name, str) and name.isidentifier()):
        raise ValueError(f"chain: name={name!r}; use letters, digits and _, e.g. 'second_clip'")
    return name


def distinct(chains: Sequence[Chain]) -> None:
    """Raise if two have one name."""
    names = [c.name for whole in chains for c in whole.walk() if c.name]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two links named {name!r}: give one of them name=, e.g. {name}(..., name='second')")


def assemble(users: Sequence[Chain], built_in: Chain, l2: Chain | None, last: Chain) -> list[Placed]:
    """The chain that a group runs: user GRAD, built-in GRAD, l2, PRECONDITION, built-in UPDATE, user UPDATE, write."""
    distinct([*users, built_in])
    user = [x for whole in users for x in whole.place()]
    own = built_in.place()

    def of(placed: list[Placed], *stages: Stage) -> list[Placed]:
        return [x for x in placed if x.stage in stages]

    pieces = of(user, Stage.GRAD) + of(own, Stage.GRAD) + (l2.place() if l2 else [])
    pieces += of(user, Stage.PRECONDITION) + of(own, Stage.PRECONDITION)
    pieces += of(own, Stage.UPDATE) + of(user, Stage.UPDATE) + of(own, Stage.WRITE) + of(user, Stage.WRITE)
    return pieces + last.place()


def share_slots(pieces: Sequence[Placed]) -> tuple[list[Placed], dict[str, tuple[Placed, Slot]]]:
    """The links with the slots that they hold, and each slot's owner: exactly one.

    A chain's name is a prefix of what it owns. A borrower finds its own chain's slot first, then that without prefix.
    """
    owners: dict[str, tuple[Placed, Slot]] = {}
    kept: dict[str, Placed] = {}  # with the numbers of measures, which live beside the slots
    for piece in pieces:
        numbers = piece.link.state if isinstance(piece.link, Measure) and piece.link.scope == "tensor" else ()
        for name in (piece.prefix + n for n in (*(s.name for s in piece.link.slots), *numbers)):
            if name in kept:
                pair = (kept[name], piece)
                named = next((x.chain.name for x in pair if x.chain.name), "")
                raise ValueError(
                    f"two owners of the slot {name!r}: {' and '.join(x.label for x in pair)}; borrow it with uses=, "
                    f"or give one chain name=" + f", e.g. {named}(name='second')" * bool(named)
                )
            kept[name] = piece
        owners |= {piece.prefix + slot.name: (piece, slot) for slot in piece.link.slots}

    def known(piece: Placed, name: str) -> str | None:
        mine = (n for n in (piece.prefix + name, name) if n in owners and owners[n][0].side == piece.side)
        return next(mine, None)

    for piece in pieces:
        if lost := [n for n in piece.link.uses if known(piece, n) is None]:
            raise ValueError(
                f"{piece.label} borrows the slot {lost[0]!r}, which no link of the chain owns; "
                f"the chain has {', '.join(owners) or 'no slots'}"
            )

    return [x._replace(holds=tuple(known(x, n) or n for n in x.link.holds)) for x in pieces], owners
