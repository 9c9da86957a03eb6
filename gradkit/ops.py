"""The functions a rule may call, on tensors; it knows no Triton and no C: each backend has forms of its own."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .language import fn, op

Number = Tensor | float


def _tensors(name: str, *args: Number) -> tuple[Tensor, ...]:
    """The arguments as tensors: a literal takes the dtype and device of its neighbours."""
    found = [a for a in args if isinstance(a, Tensor)]
    if not found:
        raise TypeError(f"{name}: no tensor among {args}; compute scalars in derive")
    dtype = next((a.dtype for a in found if a.dtype != torch.bool), torch.float64)
    return tuple(a if isinstance(a, Tensor) else torch.full((), a, dtype=dtype, device=found[0].device) for a in args)


@op
def sqrt(x: Number) -> Tensor:
    (x,) = _tensors("sqrt", x)
    if x.device.type != "cpu" or type(x) is not Tensor:
        return x.double().sqrt().to(x.dtype)
    with np.errstate(invalid="ignore"):  # NaN below zero
        return torch.as_tensor(np.sqrt(x.detach().numpy()))  # torch's own is 1 ulp off for 15-20 % of all values


@op
def absolute(x: Number) -> Tensor:
    return torch.abs(*_tensors("absolute", x))


@op
def sign(x: Number) -> Tensor:
    return torch.sign(*_tensors("sign", x))  # 0 for NaN


@op
def minimum(a: Number, b: Number) -> Tensor:
    a, b = _tensors("minimum", a, b)
    return torch.where((b < a) | (b != b), b, a)  # torch.minimum(-0, 0) depends on where in the tensor it stands


@op
def maximum(a: Number, b: Number) -> Tensor:
    a, b = _tensors("maximum", a, b)
    return torch.where((b > a) | (b != b), b, a)


@op
def where(mask: Tensor, yes: Number, no: Number) -> Tensor:
    mask, a, b = _tensors("where", mask, yes, no)
    return torch.where(mask, a, b)


@op
def exp(x: Number) -> Tensor:
    return torch.exp(*_tensors("exp", x))


@op
def log(x: Number) -> Tensor:
    return torch.log(*_tensors("log", x))


@op
def tanh(x: Number) -> Tensor:
    return torch.tanh(*_tensors("tanh", x))


@op
def sigmoid(x: Number) -> Tensor:
    return torch.sigmoid(*_tensors("sigmoid", x))


@op
def isfinite(x: Number) -> Tensor:
    return torch.isfinite(*_tensors("isfinite", x))


_ALL = (sqrt, absolute, sign, minimum, maximum, where, exp, log, tanh, sigmoid, isfinite)
OPS: dict[str, Callable[..., Any]] = {f.__name__: f for f in _ALL}


@fn
def lerp(a, b, w):
    """From a towards b by the share w."""
    return a + (b - a) * w
