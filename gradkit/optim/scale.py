"""SCALE: gradients normalised by output, momentum on the last layer only. Glentis et al. 2025, https://arxiv.org/abs/2506.16659"""

from collections.abc import Mapping
from typing import Any, ClassVar

from typing_extensions import Unpack

from ..chain import Chain, chain
from ..ops import lerp
from ..optimizer import Optimizer
from ..options import FRACTION, NOT_NEGATIVE, POSITIVE, Number, Options, check_choice
from ..roles import ROLES, by_shape
from ..transform import Stage, derive, rule
from ..transforms.column import NORMS, one_size
from .adamw import adam


@rule(slots=("exp_avg",), stage=Stage.PRECONDITION)
def momentum_alone(u, exp_avg, w1):
    exp_avg = lerp(exp_avg, u, w1)
    return exp_avg, exp_avg


@derive()
def momentum_scalars(momentum):
    return {"w1": 1 - momentum}


@derive("step")
def vector_scalars(vector_betas, vector_eps, step):
    b1, b2 = vector_betas
    a = (1 - b2**step) ** 0.5 / (1 - b1**step)  # eps beside the uncorrected root, as in the authors' code
    return {"w1": 1 - b1, "k2": b2, "w2": 1 - b2, "a": a, "b": 1.0, "e": vector_eps}


class SCALE(Optimizer):
    r"""Each output's gradient brought to one size; no state but for the last layer and vectors.

        hidden matrices, embeddings   p <- (1 - lr weight_decay) p - lr C(g)
        last layer                    m <- momentum m + (1 - momentum) g         p <- (1 - lr weight_decay) p - lr C(m)
        vectors                       AdamW
        C(g) = g / max(rms(g), 1e-8)  over the inputs of each output

    Groups carry `role` and `fan_in`: `SCALE(gradkit.param_groups(model))`. Without, shapes decide, and it warns.

    lr: about the change of every weight per step.
    momentum: decay of the last layer's mean per step.
    norm: "rms", the authors' code, or "l2", the paper's text: C(g) = g / max(|g|, 1e-8), for a far larger lr.
    vector_lr: lr of groups with the role "vector" that give none; None: as the others.
    vector_betas: decay of the vectors' mean and mean square per step.
    vector_eps: floor of their denominator, in units of the gradient.
    """

    ranges: ClassVar = {
        "momentum": FRACTION,
        "vector_lr": NOT_NEGATIVE._replace(optional=True),
        "vector_betas": FRACTION,
        "vector_eps": POSITIVE,
    }

    def __init__(
        self,
        params: Any,
        lr: Number = 1e-3,
        weight_decay: Number = 0.0,
        *,
        momentum: float = 0.9,
        norm: str = "rms",
        vector_lr: Number | None = None,
        vector_betas: tuple[float, float] = (0.9, 0.999),
        vector_eps: float = 1e-8,
        **options: Unpack[Options],
    ):
        own: dict[str, Any] = {"momentum": momentum, "norm": norm, "vector_lr": vector_lr}
        own |= {"vector_betas": vector_betas, "vector_eps": vector_eps}
        super().__init__(with_roles("SCALE", params), lr=lr, weight_decay=weight_decay, **own, **options)
        if all(group["role"] == "vector" for group in self.param_groups):
            raise ValueError("SCALE: no matrix among the parameters, and vectors get AdamW: use gradkit.AdamW")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        role = param_group.get("role") if isinstance(param_group, dict) else None
        check_choice(type(self).__name__, "role", role, ROLES)
        vector_lr = param_group.get("vector_lr", self.defaults["vector_lr"])
        if role == "vector" and vector_lr is not None:
            param_group.setdefault("lr", vector_lr)
        super().add_param_group(param_group)

    def links(self, group: Mapping[str, Any]) -> Chain:
        check_choice(type(self).__name__, "norm", group["norm"], NORMS)
        if group["role"] == "vector":
            return chain(adam, derive=vector_scalars)
        fan_in = group.get("fan_in")
        fan_in = int(group["role"] != "embedding") if fan_in is None else fan_in
        size = one_size(group["norm"], fan_in)
        return chain(momentum_alone, *size, derive=momentum_scalars) if group["role"] == "last" else chain(*size)


def with_roles(who: str, params: Any) -> Any:
    """Groups as given, or by shape, where they come without roles."""
    given = params if isinstance(params, list | tuple) else list(params)
    grouped = bool(given) and all(isinstance(g, dict) for g in given)
    return given if not given or grouped else by_shape(who, given).groups()
