"""SCALE: gradients normalised by output, momentum on the last layer only.

Glentis et al. 2025, https://arxiv.org/abs/2506.16659
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import Unpack

from ..chain import Chain, chain
from ..ops import lerp
from ..optimizer import Optimizer
from ..options import FRACTION, NOT_NEGATIVE, POSITIVE, Number, Options, check_choice
from ..roles import check_axes, check_role, with_roles
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

    Groups carry `role` and `fan_in`: `SCALE(gradkit.param_groups(model))`. Parameters alone go by shape; it warns.

    lr: about the change of every weight per step.
    momentum: decay of the last layer's mean per step; 0: none, and no state for it.
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
        momentum: Number = 0.9,
        norm: str = "rms",
        vector_lr: Number | None = None,
        vector_betas: tuple[Number, Number] = (0.9, 0.999),
        vector_eps: Number = 1e-8,
        **options: Unpack[Options],
    ):
        who = type(self).__name__
        own: dict[str, Any] = {"momentum": momentum, "norm": norm, "vector_lr": vector_lr}
        own |= {"vector_betas": vector_betas, "vector_eps": vector_eps}
        super().__init__(with_roles(who, params), lr=lr, weight_decay=weight_decay, **own, **options)
        if all(group["role"] == "vector" for group in self.param_groups):
            raise ValueError(f"{who}: no matrix among the parameters, and vectors get AdamW: use gradkit.AdamW")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict) and param_group.get("role") == "vector":
            vector_lr = param_group.get("vector_lr", self.defaults["vector_lr"])
            if vector_lr is not None:
                param_group.setdefault("lr", vector_lr)
        super().add_param_group(param_group)

    def check_parameter(self, p: Tensor, group: Mapping[str, Any]) -> None:
        check_axes(type(self).__name__, p, group)

    def links(self, group: Mapping[str, Any]) -> Chain:
        role, fan_in = check_role(type(self).__name__, group)
        check_choice(type(self).__name__, "norm", group["norm"], NORMS)
        if role == "vector":
            return chain(adam, derive=vector_scalars)
        size = one_size(group["norm"], fan_in)
        if role == "last" and group["momentum"]:
            return chain(momentum_alone, *size, derive=momentum_scalars)
        return chain(*size, stage=Stage.PRECONDITION)  # behind l2, as the momentum is
