"""The options that all optimizers share, the ranges of hyperparameters, and what they say when one is wrong."""

import difflib
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from typing_extensions import TypedDict

from .chain import Chain

Number = float | torch.Tensor  # a hyperparameter
DECAYS = ("decoupled", "l2", "independent", "cautious", "none")
BACKENDS = ("auto", "eager", "chunked", "native", "triton")
ROUNDINGS = ("nearest", "stochastic", "kahan")


class Options(TypedDict, total=False):
    """What every optimizer takes, keyword only."""

    maximize: bool
    decay: str
    transforms: Sequence[Chain]
    backend: str
    state_dtype: torch.dtype | None
    rounding: str
    seed: int
    fused: bool | None
    foreach: bool | None
    capturable: bool | None
    differentiable: bool | None


IN_GROUPS: Mapping[str, Any] = {
    "maximize": False,
    "decay": "decoupled",
    "state_dtype": None,
    "rounding": "nearest",
    "seed": 0,
}
CHOICES = {"decay": DECAYS, "backend": BACKENDS, "rounding": ROUNDINGS}
TORCH_FLAGS = ("fused", "foreach", "capturable", "differentiable")


class Range(NamedTuple):
    """Where a number may lie; NaN lies nowhere."""

    low: float
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False
    whole: bool = False
    optional: bool = False

    def holds(self, x: float) -> bool:
        above = self.low < x if self.low_open else self.low <= x
        below = x < self.high if self.high_open else x <= self.high
        return above and below and (not self.whole or float(x).is_integer())

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        left, right = "(" if self.low_open else "[", ")" if self.high_open else "]"
        return f"{kind} in {left}{self.low:g}, {self.high:g}{right}" + (" or None" if self.optional else "")


NOT_NEGATIVE = Range(0.0, high_open=True)
POSITIVE = Range(0.0, low_open=True, high_open=True)
FRACTION = Range(0.0, 1.0, high_open=True)
LIMIT = Range(0.0, low_open=True)  # infinity turns it off
STEPS = Range(1, whole=True, high_open=True)
RANGES: Mapping[str, Range] = {
    "lr": NOT_NEGATIVE,
    "weight_decay": NOT_NEGATIVE,
    "eps": POSITIVE,
    "betas": FRACTION,
    "seed": Range(0, 2**32 - 1, whole=True),
}


def check_number(who: str, name: str, value: Any, allowed: Range) -> None:
    """Raise if a hyperparameter isn't a number of its range."""
    if value is None and allowed.optional:
        return
    shown = f"{who}: {name}={value!r}"
    if isinstance(value, torch.Tensor):
        if value.dim() or value.is_cuda:
            raise TypeError(f"{shown}: a tensor hyperparameter is 0-d and lives on the CPU; use tensor.cpu()[...]")
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{shown}: give {allowed}")
    if not allowed.holds(float(value)):
        raise ValueError(f"{shown}: give {allowed}")


def check_values(
    who: str, values: Mapping[str, Any], defaults: Mapping[str, Any], ranges: Mapping[str, Range]
) -> None:
    """Raise if a value of a group, or an option, is not one that can be used."""
    for name, value in values.items():
        if name in CHOICES and value not in CHOICES[name]:
            close = difflib.get_close_matches(str(value), CHOICES[name], 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{who}: {name}={value!r}: use one of {', '.join(map(repr, CHOICES[name]))}{hint}")
        floating = isinstance(value, torch.dtype) and value.is_floating_point
        if name == "state_dtype" and value is not None and not floating:
            raise TypeError(f"{who}: state_dtype={value!r}: use a floating torch.dtype, e.g. torch.float32, or None")
        allowed = ranges.get(name) or RANGES.get(name)
        if allowed is None:
            continue
        if isinstance(defaults.get(name), tuple):
            wanted = len(defaults[name])
            if not isinstance(value, tuple | list) or len(value) != wanted:
                raise ValueError(f"{who}: {name}={value!r}: give {wanted} numbers, e.g. {name}={defaults[name]}")
            for x in value:
                check_number(who, f"{name}={tuple(value)}: each", x, allowed)
        else:
            check_number(who, name, value, allowed)


def own_defaults(cls: type) -> dict[str, Any]:
    """The hyperparameters that the constructors of a class name, with their defaults."""
    signatures = [inspect.signature(vars(c)["__init__"]) for c in cls.__mro__ if "__init__" in vars(c)]
    named = {n: p.default for s in reversed(signatures) for n, p in s.parameters.items() if p.kind != p.VAR_KEYWORD}
    return {n: default for n, default in named.items() if n not in ("self", "params", "chain")}


def split_options(optimizer: Any, given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options and the class's own hyperparameters, out of a constructor's keywords; anything else is a TypeError."""
    who = type(optimizer).__name__
    known = {*Options.__annotations__, *own_defaults(type(optimizer))}
    for name, value in given.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise TypeError(f"{who}() got an unexpected argument {name}={value!r}{hint}")
    for name in TORCH_FLAGS:
        if given.get(name):
            raise ValueError(f"{who}: {name}={given[name]!r} has no meaning here; choose how steps run with backend=")
    options = {n: v for n, v in given.items() if n in Options.__annotations__ and n not in TORCH_FLAGS}
    return options, {n: v for n, v in given.items() if n not in Options.__annotations__}
