"""What is measured: gradkit's optimizers, torch's, those of other packages, and a chain as a user writes it."""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch

from gradkit import Stage, chain, derive, rule
from gradkit.ops import absolute, lerp, sign, sqrt, where
from gradkit.transforms import clip_by_global_norm, clip_by_value

Make = Callable[[list[torch.nn.Parameter]], Any]  # -> something with step()
LR, DECAY = 1e-3, 1e-2


class Row(NamedTuple):
    """One optimizer: how it is made, and the least that its step must move."""

    name: str
    package: str  # as it is installed
    algorithm: str
    bytes: int  # an element: gradient read, once more for each measure; parameter and each slot read and written
    make: Make
    dtype: torch.dtype = torch.float32
    limits: str = ""  # which bars hold for it
    also: tuple[str, ...] = ()  # rows that take a step in the same rounds


# a user's own chain of five links


@rule(slots=("smoothed",), stage=Stage.GRAD)
def smooth(u, smoothed, w):
    smoothed = lerp(smoothed, u, w)
    return u + smoothed, smoothed


@rule(slots=("exp_avg", "exp_avg_sq"), stage=Stage.PRECONDITION)
def direction(u, exp_avg, exp_avg_sq, w1, w2, a, b):
    exp_avg = lerp(exp_avg, u, w1)
    exp_avg_sq = lerp(exp_avg_sq, u * u, w2)
    return exp_avg * a / (sqrt(exp_avg_sq) * b + 1e-8), exp_avg, exp_avg_sq


@rule(stage=Stage.UPDATE)
def soften(u):
    return u / (1.0 + absolute(u))


@rule(stage=Stage.UPDATE)
def brake(u, g):
    return where(sign(u) * sign(g) > 0.0, u, 0.5 * u)


@derive("step")
def own_scalars(smoothing, beta1, beta2, step):
    corrections = {"a": 1 / (1 - beta1**step), "b": (1 - beta2**step) ** -0.5}
    return {"w": 1 - smoothing, "w1": 1 - beta1, "w2": 1 - beta2, **corrections}


def own_chain(params: list[torch.nn.Parameter], **arguments: Any) -> Any:
    five = (clip_by_value(2.0), smooth, direction, soften, brake)
    made = chain(*five, derive=own_scalars, name="own", smoothing=0.9, beta1=0.9, beta2=0.999)
    return import_module("gradkit").Optimizer(params, made, lr=LR, weight_decay=DECAY, **arguments)


def of(module: str, path: str, **arguments: Any) -> Make:
    """A class of a module that is imported only when it is measured."""

    def make(params: list[torch.nn.Parameter]) -> Any:
        found: Any = import_module(module)
        for name in path.split("."):
            found = getattr(found, name)
        return found(params, lr=LR, weight_decay=DECAY, **arguments)

    return make


class WithClip:
    """Torch's AdamW behind torch's clipping."""

    def __init__(self, params: list[torch.nn.Parameter], fused: bool | None = None):
        self.params = params
        self.optimizer = torch.optim.AdamW(params, lr=LR, weight_decay=DECAY, fused=fused)

    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimizer.step()


BYTES = {"AdamW": 28, "Lion": 20, "DiffGrad": 36, "AdEMAMix": 36, "Grokfast": 36, "SPAM": 28, "StableSPAM": 36}
# The slots are float32.
BF16_BYTES = {"AdamW": 22, "Lion": 14, "DiffGrad": 30, "AdEMAMix": 30, "Grokfast": 30, "SPAM": 22, "StableSPAM": 26}


CLIPPED, CLIPPED_BF16 = (f"torch AdamW fused{dtype}, clip_grad_norm_" for dtype in ("", " bf16"))


def elementwise(limits: str, backend: str) -> list[Row]:
    """What both suites measure of ours in float32."""
    clip = of("gradkit", "AdamW", transforms=[clip_by_global_norm(1.0)], backend=backend)
    own = partial(own_chain, backend=backend)
    plain = [Row(f"gradkit {n}", "gradkit", n, b, of("gradkit", n, backend=backend)) for n, b in BYTES.items()]
    clipped = Row("gradkit AdamW, global clip", "gradkit", "AdamW, clip", 32, clip, also=(CLIPPED,))
    rows = [*plain, clipped, Row("gradkit, own chain of five links", "gradkit", "own", 36, own)]
    return [row._replace(limits=limits) for row in rows]


def in_bf16(backend: str) -> list[Row]:
    return [
        Row(f"gradkit {n} bf16", "gradkit", n, b, of("gradkit", n, backend=backend), torch.bfloat16)
        for n, b in BF16_BYTES.items()
    ]


def ours() -> list[Row]:
    chunked, eager = (of("gradkit", "AdamW", backend=b) for b in ("chunked", "eager"))
    return [
        *elementwise("native", "auto"),
        *in_bf16("auto"),
        Row("gradkit AdamW chunked", "gradkit", "AdamW", 28, chunked, limits="chunked", also=("torch AdamW foreach",)),
        Row("gradkit AdamW eager", "gradkit", "AdamW", 28, eager),
    ]


def ours_on_gpu(backend: str) -> list[Row]:
    """Every row names the backend: one that can't run is a row with the reason, and never another backend's time."""
    clip = of("gradkit", "AdamW", transforms=[clip_by_global_norm(1.0)], backend=backend)
    kahan, stochastic = (of("gradkit", "AdamW", backend=backend, rounding=r) for r in ("kahan", "stochastic"))
    low, (low_adamw, *others) = torch.bfloat16, in_bf16(backend)
    return [
        *elementwise("triton", backend),
        low_adamw._replace(limits="triton", also=("torch AdamW fused bf16",)),
        *(row._replace(limits="triton") for row in others),
        Row("gradkit AdamW bf16, global clip", "gradkit", "AdamW, clip", 24, clip, low, "triton", (CLIPPED_BF16,)),
        Row("gradkit AdamW bf16, stochastic", "gradkit", "AdamW", 22, stochastic, low, "triton"),
        Row("gradkit AdamW bf16, Kahan", "gradkit", "AdamW", 26, kahan, low, "triton"),
        Row("gradkit AdamW chunked", "gradkit", "AdamW", 28, of("gradkit", "AdamW", backend="chunked")),
    ]


def torch_rows() -> list[Row]:
    default, foreach, fused = (of("torch.optim", "AdamW", **a) for a in ({}, {"foreach": True}, {"fused": True}))
    return [
        Row("torch AdamW fused", "torch", "AdamW", 28, fused),
        Row(CLIPPED, "torch", "AdamW, clip", 40, partial(WithClip, fused=True)),
        Row("torch AdamW foreach", "torch", "AdamW", 28, foreach),
        Row("torch AdamW default", "torch", "AdamW", 28, default),
        Row("torch AdamW fused bf16", "torch", "AdamW", 14, fused, torch.bfloat16),
    ]


def peers() -> list[Row]:
    many = ("Lion", "DiffGrad", "AdEMAMix", "GrokFastAdamW", "SPAM", "StableSPAM")
    modules = {
        "pytorch_optimizer": ("pytorch_optimizer", many),
        "heavyball": ("heavyball", ("AdamW", "AdEMAMix")),
        "torch-optimi": ("optimi", ("AdamW", "Lion")),
        "bitsandbytes": ("bitsandbytes", ("optim.AdamW", "optim.Lion", "optim.AdEMAMix")),
        "flashoptim": ("flashoptim", ("FlashAdamW", "FlashLion")),
    }
    rows = []
    for package, (module, paths) in modules.items():
        for path in paths:
            name = path.split(".")[-1]
            algorithm = {"GrokFastAdamW": "Grokfast", "FlashAdamW": "AdamW", "FlashLion": "Lion"}.get(name, name)
            rows.append(Row(f"{package} {name}", package, algorithm, BYTES[algorithm], of(module, path)))
    return rows


def torch_on_gpu() -> list[Row]:
    low = partial(WithClip, fused=True)
    return [*torch_rows(), Row(CLIPPED_BF16, "torch", "AdamW, clip", 20, low, torch.bfloat16)]


ROWS = {row.name: row for row in (*ours(), *torch_rows(), *peers())}
GPU_ROWS = {row.name: row for row in (*ours_on_gpu("triton"), *torch_on_gpu(), *peers())}
