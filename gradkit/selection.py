"""Which tensors, columns, rows or entries a split selects: a pure function of the seed and the selection's number."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import random, sharding
from .chain import Chain, Placed, Split
from .chain import chain as make_chain
from .ops import absolute, where
from .options import STEPS, Range, brief, check_choice, check_flag
from .scalars import uncounted
from .transform import Rule, derive, rule

KINDS = ("blocks", "columns", "rows", "randk")
ORDERS = ("random", "ascending", "descending", "mirror")
SHARE = Range("a number in [0, 1]", 0, math.nextafter(1, 2))
CACHED = 1 << 16  # random numbers that are made at once


class Turn(NamedTuple):
    """What a selection depends on."""

    kind: str
    order: str
    density: float
    refresh: int  # the selection's number, from 0
    seed: int


class Choices:
    """What is selected in a turn. A subclass in its place, `optimizer.choices = Mine()`, selects otherwise."""

    def tensors(self, turn: Turn, group: int, count: int) -> list[int]:
        """Which of a group's `count` tensors."""
        k = round(count * turn.density)
        if turn.order == "random":
            return sorted(np.argsort(keys(turn, group, count), kind="stable")[:k].tolist())
        if turn.order == "mirror" and k < count:  # pairs, from the outside to the middle
            if k % 2:
                raise ValueError(f"block_order='mirror' takes pairs, and density selects {k} of {count}: make it even")
            pairs = [(turn.refresh * k // 2 + j) % (count // 2) for j in range(k // 2)]
            return sorted(i for pair in pairs for i in (pair, count - 1 - pair))
        ascending = [(turn.refresh * k + j) % count for j in range(k)]
        return sorted(ascending if turn.order == "ascending" else [count - 1 - i for i in ascending])

    def within(self, turn: Turn, index: int, count: int) -> np.ndarray:
        """Which of `count` columns, rows or entries of the parameter with this index, in ascending order."""
        k = int(count * turn.density)
        if k in (0, count):
            return np.arange(k)
        mine = keys(turn, index, count)
        if turn.order == "bernoulli" and turn.refresh:
            return np.flatnonzero(mine < turn.density * 2**32)
        limit = np.partition(mine, k - 1)[k - 1]
        picks = np.flatnonzero(mine < limit)
        return np.sort(np.concatenate([picks, np.flatnonzero(mine == limit)[: k - len(picks)]]))


def keys(turn: Turn, index: int, count: int) -> np.ndarray:
    """A random number of each: the smallest are selected."""
    stream, out = random.stream(turn.kind), np.empty(-(-count // 4) * 4, np.uint32)
    for start in range(0, len(out), CACHED):
        four = np.arange(start // 4, min(len(out), start + CACHED) // 4)
        words = random.words(four, turn.refresh, index, turn.seed, stream)
        out[start : start + CACHED].reshape(-1, 4)[:] = np.stack(words, 1)
    return out[:count]


class Choice:
    """The columns, rows or entries of one tensor that are selected: some, not all."""

    def __init__(self, kind: str, picks: np.ndarray, shape: torch.Size):
        self.kind, self.shape = kind, shape
        lines, length = shape[0], shape.numel() // shape[0]
        self.count = len(picks) * {"columns": lines, "rows": length, "randk": 1}[kind]
        self.slot = {"columns": (lines, len(picks)), "rows": (len(picks), *shape[1:]), "randk": (len(picks),)}[kind]
        marks = np.zeros(-(-shape.numel() // 64) * 64, np.bool_)
        if kind == "randk":
            marks[picks] = True
        else:
            marks[: shape.numel()].reshape(lines, length)[(slice(None), picks) if kind == "columns" else picks] = True
        self.bits = np.packbits(marks, bitorder="little")  # one for each element in logical order, in words of 64


def turn_of(split: Placed, group: Mapping[str, Any], clock: float) -> Turn:
    """The turn of a group in the step that `clock` counts."""
    density, refresh = uncounted(split, group, clock)
    return Turn(split.link.kind, split.link.order, density, int(refresh), int(group["seed"]))


def select_tensors(choices: Choices, turn: Turn, group: int, count: int) -> set[int]:
    """Which of a group's tensors are selected."""
    return {*checked(choices, "tensors", choices.tensors(turn, group, count), count).tolist()}


def select(choices: Choices, turn: Turn, p: Tensor, index: int) -> Choice | bool:
    """What is selected of one parameter; a tensor without rows and columns is, as a whole."""
    if how := scattered(p):
        raise TypeError(f"parameter {index} is {how}: {turn.kind} of it can't be selected; select 'blocks'")
    if p.dim() < 2 or not p.numel():
        return True
    count = {"columns": p.numel() // p.shape[0], "rows": p.shape[0], "randk": p.numel()}[turn.kind]
    picks = checked(choices, "within", choices.within(turn, index, count), count)
    return len(picks) == count if len(picks) in (0, count) else Choice(turn.kind, picks, p.shape)


def checked(choices: Choices, method: str, given: Any, count: int) -> np.ndarray:
    """What a class of the user's selects; kernels rely on it."""
    picks = np.asarray(given)
    numbers = picks.ndim == 1 and (not picks.size or picks.dtype.kind in "iu")
    if numbers and (not picks.size or (0 <= picks[0] and picks[-1] < count and (picks[1:] > picks[:-1]).all())):
        return picks.astype(np.int64, copy=False)
    raise (ValueError if numbers else TypeError)(
        f"{type(choices).__name__}.{method} gave {brief(given)}: give whole numbers from 0 to {count - 1}, each once, "
        f"in ascending order"
    )


def scattered(p: Tensor) -> str:
    """Why no rank has a tensor's columns, rows and entries as they are; empty if this one does."""
    if sharding.is_sharded(p):
        return "sharded"
    flat = any(getattr(p, mark, False) for mark in ("_is_flat_param", "_fsdp_flattened"))  # use_orig_params=True, too
    return "flattened with others" if flat else ""


@rule
def nothing(u):
    return where(absolute(u) < 0.0, u, 0.0)  # 0 for NaN too


@derive()
def every(update_gap, clock):
    return {"refresh": (clock - 1) // update_gap}


def split(
    selection: str,
    inside: Chain | Rule,
    outside: Chain | Rule | None = None,
    *,
    density: float = 0.25,
    update_gap: int = 200,
    block_order: str = "random",
    reset_state: bool = True,
    name: str | None = None,
) -> Chain:
    """Run one chain on what is selected, with state for that alone, and another on the rest.

    selection: "blocks": of each group's tensors; "columns", "rows" or "randk", single entries: of each tensor that has
        two axes; others are selected as a whole.
    inside: the chain of what is selected. outside: of the rest, without state; None: the rest doesn't move.
    density: the share that is selected. update_gap: steps between selections.
    block_order: how blocks follow each other: "random", "ascending", "descending", or "mirror", pairs from both ends.
    reset_state: state starts fresh with each selection; if False it stays in its place where its shape still fits.
    """
    check_choice("split", "selection", selection, KINDS)
    check_choice("split", "block_order", block_order, ORDERS)
    check_flag("split", "reset_state", reset_state)
    rest = make_chain(nothing if outside is None else outside)
    two = Split(selection, make_chain(inside), rest, block_order, "nothing" if reset_state else "all")
    ranges = {"density": SHARE, "update_gap": STEPS}
    numbers: Any = {"density": density, "update_gap": update_gap}
    return make_chain(two, derive=every, name="split", ranges=ranges, **numbers).named(name)
