"""What is measured: gradkit's optimizers, torch's, those of other packages, and a chain as a user writes it."""

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from math import prod
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from gradkit import Choices, Stage, chain, derive, rule
from gradkit.ops import absolute, lerp, sign, sqrt, where
from gradkit.selection import Turn
from gradkit.transforms import clip_by_global_norm, clip_by_value

from .shapes import Tensors

Make = Callable[[list[Any]], Any]  # of parameters, or groups -> something with step()
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
    roles: Mapping[str, int] = MappingProxyType({})  # where they differ, the bytes of each
    turn: Turn | None = None  # of a split that selects whole tensors

    def bytes_on(self, tensors: Tensors) -> float:
        """An element's, the mean of a model."""
        if not self.roles:
            return self.bytes
        roles, sizes = roles_of(tensors), [prod(shape) for shape in tensors]
        each = [self.roles[r] for r in roles]
        if self.turn:  # of the tensors that are selected in it, as of all other roles
            matrices = [i for i, r in enumerate(roles) if r == "matrix"]
            for j in Choices().tensors(self.turn, 0, len(matrices)):
                each[matrices[j]] = self.roles["last"]
        return sum(n * b for n, b in zip(sizes, each, strict=True)) / sum(sizes)


def roles_of(tensors: Tensors) -> list[str]:
    """What shapes alone, without modules, are measured as: the final matrix is the last layer."""
    last = max((i for i, shape in enumerate(tensors) if len(shape) > 1), default=-1)
    return ["vector" if len(shape) < 2 else "last" if i == last else "matrix" for i, shape in enumerate(tensors)]


def by_role(make: Make) -> Make:
    """With a group for each role."""

    def grouped(params: list[torch.nn.Parameter]) -> Any:
        groups: dict[str, dict[str, Any]] = {}
        for p, role in zip(params, roles_of([tuple(p.shape) for p in params]), strict=True):
            groups.setdefault(role, {"params": [], "role": role})["params"].append(p)
        return make([*groups.values()])

    return grouped


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
# The last layer's momentum is read once more, by the measure.
# A fourth of the matrices' elements, or of the matrices, has state.
DENSITY = 0.25
SPLITS = {f"FRUGAL {split}": {"split": split, "density": DENSITY} for split in ("blocks", "columns")}
ROLES = {
    "SCALE": {"matrix": 16, "last": 28, "vector": 28},
    "FRUGAL blocks": {"matrix": 12, "last": 28, "vector": 28},
    "FRUGAL columns": {"matrix": 16, "last": 28, "vector": 28},
}
BF16_ROLES = {
    "SCALE": {"matrix": 8, "last": 20, "vector": 22},
    "FRUGAL blocks": {"matrix": 6, "last": 22, "vector": 22},
    "FRUGAL columns": {"matrix": 10, "last": 22, "vector": 22},
}


CLIPPED, CLIPPED_BF16 = (f"torch AdamW fused{dtype}, clip_grad_norm_" for dtype in ("", " bf16"))


def with_roles(roles: Mapping[str, Mapping[str, int]], backend: str, name: str, *dtype: torch.dtype) -> list[Row]:
    """The optimizers that take roles; their bytes are those of most elements."""
    rows = []
    for n, of_each in roles.items():
        algorithm, *given = n.split()
        make = by_role(of("gradkit", algorithm, **SPLITS.get(n, {}), backend=backend))
        turn = Turn("blocks", "random", DENSITY, 0, 0) if given == ["blocks"] else None
        rows.append(Row(name.format(n), "gradkit", n, of_each["matrix"], make, *dtype, roles=of_each, turn=turn))
    return rows


def in_float32(limits: str, backend: str) -> list[Row]:
    """What both suites measure of ours in float32."""
    clip = of("gradkit", "AdamW", transforms=[clip_by_global_norm(1.0)], backend=backend)
    own = partial(own_chain, backend=backend)
    plain = [Row(f"gradkit {n}", "gradkit", n, b, of("gradkit", n, backend=backend)) for n, b in BYTES.items()]
    clipped = Row("gradkit AdamW, global clip", "gradkit", "AdamW, clip", 32, clip, also=(CLIPPED,))
    rows = [*plain, *with_roles(ROLES, backend, "gradkit {}"), clipped]
    rows.append(Row("gradkit, own chain of five links", "gradkit", "own", 36, own))
    return [row._replace(limits=limits) for row in rows]


def in_bf16(backend: str) -> list[Row]:
    low, makes = torch.bfloat16, {n: of("gradkit", n, backend=backend) for n in BF16_BYTES}
    rows = [Row(f"gradkit {n} bf16", "gradkit", n, b, makes[n], low) for n, b in BF16_BYTES.items()]
    return [*rows, *with_roles(BF16_ROLES, backend, "gradkit {} bf16", low)]


def ours() -> list[Row]:
    chunked, eager = (of("gradkit", "AdamW", backend=b) for b in ("chunked", "eager"))
    return [
        *in_float32("native", "auto"),
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
        *in_float32("triton", backend),
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
