"""The options that all optimizers share, the ranges of hyperparameters, and what they say when one is wrong."""

import difflib
import inspect
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from typing_extensions import TypedDict

if TYPE_CHECKING:
    from .chain import Chain

Number = float | torch.Tensor  # a hyperparameter
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DECAYS = ("decoupled", "l2", "independent", "cautious", "none")
BACKENDS = ("auto", "eager", "chunked", "native", "triton")
ROUNDINGS = ("nearest", "stochastic", "kahan")


class Options(TypedDict, total=False):
    """What every optimizer takes, keyword only."""

    maximize: bool
    decay: str
    transforms: Sequence["Chain"]
    backend: str
    state_dtype: torch.dtype | None
    rounding: str
    seed: int
    fused: bool | None
    foreach: bool | None
    capturable: bool | None
    differentiable: bool | None


IN_GROUPS = {"maximize": False, "decay": "decoupled", "state_dtype": None, "rounding": "nearest", "seed": 0}
CHOICES = {"decay": DECAYS, "backend": BACKENDS, "rounding": ROUNDINGS}
TORCH_FLAGS = ("fused", "foreach", "capturable", "differentiable")


class Range(NamedTuple):
    """Where a number may lie, in words and as data; NaN lies nowhere."""

    words: str
    low: float
    high: float = math.inf  # itself not included, unless endless
    above: bool = False  # low is not included
    endless: bool = False  # infinity is a value
    whole: bool = False
    optional: bool = False
    example: tuple[float, ...] = ()  # where as many numbers are wanted, each of this range

    def holds(self, x: float) -> bool:
        inside = (self.low < x if self.above else self.low <= x) and (x < self.high or self.endless)
        return inside and (not self.whole or x == int(x))


NOT_NEGATIVE = Range("a number >= 0", 0)
POSITIVE = Range("a number > 0", 0, above=True)
LIMIT = Range("a number > 0", 0, above=True, endless=True)  # infinity turns it off
FRACTION = Range("a number in [0, 1)", 0, 1)
COUNT = Range("a whole number >= 0", 0, whole=True)
STEPS = Range("a whole number >= 1", 1, whole=True)
SEED = Range("a whole number in [0, 2**32)", 0, 2**32, whole=True)
RANGES = {"lr": NOT_NEGATIVE, "weight_decay": NOT_NEGATIVE, "eps": POSITIVE, "betas": FRACTION, "seed": SEED}


def builtin(value: Any) -> Any:
    """A number of numpy's as Python's own, which a file may hold."""
    if isinstance(value, tuple | list):
        return tuple(map(builtin, value))
    return value.item() if isinstance(value, np.generic) else value


def brief(value: Any) -> str:
    """A value in a message: one that would fill the screen by its kind alone."""
    text = repr(value)
    if len(text) <= 80 and "\n" not in text:
        return text
    of = f" of shape {tuple(value.shape)} and dtype {value.dtype}" if isinstance(value, torch.Tensor) else ""
    return f"a {type(value).__name__}{of}"


def listed(choices: Iterable[Any]) -> str:
    return ", ".join(map(repr, choices))


def hint(given: Any, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(given), known, 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def check_choice(who: str, name: str, value: Any, choices: Collection[str]) -> None:
    """Raise if a value is none of the words that have a meaning."""
    if value not in choices:
        raise ValueError(f"{who}: {name}={brief(value)}: use one of {listed(choices)}{hint(value, choices)}")


def check_flag(who: str, name: str, value: Any) -> None:
    """Raise if a value is neither true nor false."""
    if value not in (True, False):
        raise TypeError(f"{who}: {name}={brief(value)}: use True or False")


def check_patterns(who: str, name: str, value: Any) -> None:
    """Raise if a value is no list of patterns of parameters' names."""
    if not isinstance(value, tuple | list) or not all(isinstance(x, str) for x in value):
        raise TypeError(f"{who}: {name}={brief(value)}: give a tuple of patterns of names, e.g. ('head.*',)")


def check_number(who: str, name: str, value: Any, allowed: Range) -> None:
    """Raise if a hyperparameter isn't a number of its range, or several where that is wanted."""
    if value is None and allowed.optional:
        return
    shown, words = f"{who}: {name}={brief(value)}", allowed.words + " or None" * allowed.optional
    if allowed.example:
        if not isinstance(value, tuple | list) or len(value) != len(allowed.example):
            raise ValueError(f"{shown}: give {len(allowed.example)} numbers, e.g. {name}={allowed.example}")
        for i, x in enumerate(value):
            check_number(who, f"{name}[{i}]", x, allowed._replace(example=()))
        return
    if isinstance(value, torch.Tensor):
        if value.dim() or value.is_cuda:
            raise TypeError(f"{shown}: a tensor hyperparameter is 0-d and lives on the CPU; use tensor.cpu()[...]")
    elif isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{shown}: give {words}")
    if not allowed.holds(float(value)):
        raise ValueError(f"{shown}: give {words}")


def check_values(who: str, values: Mapping[str, Any], defaults: Mapping[str, Any], ranges: Mapping[str, Range]) -> None:
    """Raise if a value of a group, or an option, is not one that can be used."""
    for name, value in values.items():
        if name in CHOICES:
            check_choice(who, name, value, CHOICES[name])
        if isinstance(defaults.get(name, IN_GROUPS.get(name)), bool):
            check_flag(who, name, value)
        if name == "state_dtype" and value not in (None, *DTYPES):
            raise TypeError(f"{who}: state_dtype={brief(value)}: use None or one of {listed(DTYPES)}")
        allowed, default = ranges.get(name) or RANGES.get(name), defaults.get(name)
        if allowed is not None:
            check_number(who, name, value, allowed._replace(example=default) if isinstance(default, tuple) else allowed)


def own_defaults(cls: type) -> dict[str, Any]:
    """The hyperparameters that the constructors of a class name, with their defaults."""
    signatures = [inspect.signature(vars(c)["__init__"]) for c in reversed(cls.__mro__) if "__init__" in vars(c)]
    named = [p for s in signatures for p in s.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return {p.name: p.default for p in named if p.name not in ("self", "params", "chain", "defaults")}


def refuse_flags(who: str, given: Mapping[str, Any]) -> None:
    """Raise for torch's own ways of running a step, which configs pass as None or False."""
    for name in TORCH_FLAGS:
        if given.get(name):
            raise ValueError(f"{who}: {name}={given[name]!r} has no meaning here; choose how steps run with backend=")


def split_options(optimizer: Any, given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options and the class's own hyperparameters, out of a constructor's keywords; anything else is a TypeError."""
    who = type(optimizer).__name__
    known = {*Options.__annotations__, *own_defaults(type(optimizer))}
    for name, value in given.items():
        if name not in known:
            raise TypeError(f"{who}() got an unexpected argument {name}={brief(value)}{hint(name, known)}")
    refuse_flags(who, given)
    options = {n: v for n, v in given.items() if n in Options.__annotations__ and n not in TORCH_FLAGS}
    return options, {n: v for n, v in given.items() if n not in Options.__annotations__}
