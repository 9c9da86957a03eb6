"""The optimizers that the torch contract holds for, and what its tests share: parameters, gradients, comparing."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import gradkit
from gradkit import transforms as tx
from tests.curvature import EVERY, SquaresOfGradients
from tests.heads import LastLayers, Matrices
from tests.tolerance import assert_equal, tolerance

LR = 0.05
SHAPES = ((5, 3), (7,), (2, 3, 2, 4))


@dataclass(frozen=True)
class Row:
    """One optimizer."""

    name: str
    cls: type[gradkit.Optimizer]
    slots: frozenset[str]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    counters: frozenset[str] = frozenset({"step"})
    kept: frozenset[str] = frozenset()  # numbers of measures, float64
    exact: bool = True  # no sum and no polynomial function: layout and backend change no bit
    coupled: bool = False  # one parameter's gradient, or its place among them, changes another's step
    momentum: str = "exp_avg"  # what the state calls it
    other: Mapping[str, Any] = field(default_factory=lambda: {"betas": (0.5, 0.6)})  # what schedulers cycle, elsewhere

    @property
    def part(self) -> bool:
        """Whether its state is of a part of each matrix."""
        return self.momentum.startswith("low_")


def slots(*names: str) -> frozenset[str]:
    return frozenset(names)


ADAM = slots("exp_avg", "exp_avg_sq")
LOW = slots("low_exp_avg", "low_exp_avg_sq")
DECAYED = {"weight_decay": 0.1}
WARM = {"alpha_warmup": 4, "beta3_warmup": 6, "weight_decay": 0.1}
WINDOW = {"filter": "ma", "window": 3, "weight_decay": 0.1}
SPIKES = {"reset_every": 7, "warmup_after_reset": 2, "clip_free_steps": 1, "threshold": 3.0, "weight_decay": 0.1}
COLUMNS = {"split": "columns", "density": 0.5, "update_gap": 4, "weight_decay": 0.1}
STABLE = {"reset_every": 7, "total_steps": 6, "weight_decay": 0.1}
AVERAGES = slots("absmax_avg", "norm_avg", "norm_sq_avg")
FILTERED = slots("step", "filter_step")
BOUNDED = (tx.clip_by_global_norm(1.0), tx.cautious())
ROWS = (
    Row("adamw", gradkit.AdamW, ADAM, DECAYED),
    Row("amsgrad", gradkit.AdamW, ADAM | {"max_exp_avg_sq"}, {"amsgrad": True}),
    Row("lion", gradkit.Lion, slots("exp_avg"), DECAYED, counters=slots()),
    Row("diffgrad", gradkit.DiffGrad, ADAM | {"previous_grad"}, DECAYED, exact=False),
    Row("ademamix", gradkit.AdEMAMix, ADAM | {"exp_avg_slow"}, WARM, other={"betas": (0.5, 0.6, 0.7)}),
    Row("grokfast_ema", gradkit.Grokfast, ADAM | {"grad_ema"}, DECAYED, FILTERED),
    Row("grokfast_ma", gradkit.Grokfast, ADAM | {"grad_ring", "grad_head", "grad_tail"}, WINDOW, FILTERED),
    Row("spam", gradkit.SPAM, ADAM, SPIKES),
    Row("stablespam", gradkit.StableSPAM, ADAM, STABLE, slots("step", "stat_step"), AVERAGES, exact=False),
    Row("sophia", SquaresOfGradients, slots("exp_avg", "hessian"), {**EVERY, **DECAYED}),
    Row("scale", LastLayers, slots("exp_avg"), DECAYED, slots(), exact=False, other={"momentum": 0.5}),
    Row("frugal", Matrices, LOW, COLUMNS, slots("low_step"), coupled=True, momentum="low_exp_avg"),
    Row(
        "spam_density",
        gradkit.SPAM,
        LOW,
        {**SPIKES, "density": 0.5},
        slots("low_step"),
        coupled=True,
        momentum="low_exp_avg",
    ),
    Row("zclip", gradkit.AdamW, ADAM, {"transforms": (tx.zclip(warmup_steps=3),)}, exact=False, coupled=True),
    Row("adaptive", gradkit.Lion, slots("exp_avg"), {"transforms": (tx.adaptive_clip(0.5),)}, slots(), exact=False),
    Row("bounded", gradkit.AdamW, ADAM, {"transforms": BOUNDED}, exact=False, coupled=True),
)


@dataclass(frozen=True)
class Subject:
    """An optimizer on a backend: called with parameters it makes one."""

    row: Row
    backend: str

    def __call__(self, params: Iterable[Any], **given: Any) -> gradkit.Optimizer:
        return self.row.cls(params, **{"lr": LR, **self.row.arguments, "backend": self.backend, **given})

    def __str__(self) -> str:
        return f"{self.row.name}-{self.backend}"


SUBJECTS = [Subject(row, backend) for row in ROWS for backend in ("eager", "auto")]
ALONE = [s for s in SUBJECTS if not s.row.coupled]  # a parameter's steps don't depend on its company


def parameters(dtype: torch.dtype = torch.float32, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def gradients(params: Sequence[Tensor], t: int) -> list[Tensor]:
    """Those of step t: the same for the same shapes and step, in the parameters' dtype."""
    generator = torch.Generator().manual_seed(100 + t)
    return [torch.randn(p.shape, generator=generator).to(p.dtype) for p in params]


def train(optimizer: torch.optim.Optimizer, params: Sequence[Tensor], steps: Iterable[int], late: int = 0) -> None:
    """Steps with drawn gradients; the last parameter gets none before step `late`."""
    for t in steps:
        for p, g in zip(params, gradients(params, t), strict=True):
            p.grad = g
        if t < late:
            params[-1].grad = None
        optimizer.step()


def values(params: Iterable[Tensor]) -> list[Tensor]:
    return [p.detach().clone() for p in params]


def everything(optimizer: torch.optim.Optimizer, params: Iterable[Tensor]) -> dict[str, Any]:
    """A copy of all that a step may change."""
    return {"parameters": values(params), **copy.deepcopy(optimizer.state_dict())}


def assert_same(a: Any, b: Any, what: str = "") -> None:
    """The same structure, types and bits."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return assert_equal(a.detach(), b.detach(), what)
    assert type(a) is type(b), f"{what}: {a!r} and {b!r}"
    if isinstance(a, dict):
        assert a.keys() == b.keys(), f"{what}: {list(a)} and {list(b)}"
        for k in a:
            assert_same(a[k], b[k], f"{what}[{k!r}]")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), what
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{what}[{i}]")
    else:
        assert a == b, f"{what}: {a!r} and {b!r}"


def assert_moved(before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
    """Every parameter with an element has changed, and is finite."""
    for a, b in zip(before, after, strict=True):
        assert not a.numel() or not torch.equal(a, b)
        assert b.isfinite().all()


def assert_same_numbers(row: Row, a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
    """Bitwise where the row's arithmetic is elementwise and exact, else within the table."""
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        if row.exact:
            assert_equal(x.detach().contiguous(), y.detach().contiguous(), f"parameter {i}")
        else:
            limit = tolerance("backends", x.dtype, "native")
            torch.testing.assert_close(x, y, rtol=limit, atol=8 * limit * LR)
