"""FRUGAL: a full optimizer for a part of the matrices, a state-free one for the rest.

Zmushko et al. 2024, https://arxiv.org/abs/2411.07837
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import Unpack

from ..chain import Chain, Split, chain
from ..ops import sign, where
from ..optimizer import Optimizer
from ..options import FRACTION, NOT_NEGATIVE, STEPS, Number, Options, check_choice
from ..roles import check_role, with_roles
from ..selection import KINDS, ORDERS, SHARE, every, nothing, scattered
from ..transform import Stage, derive, rule
from .adamw import adam, adam_scalars
from .lion import lion, lion_scalars


@rule(slots=("momentum_buffer",), stage=Stage.PRECONDITION)
def sgdm(u, momentum_buffer, momentum):
    momentum_buffer = momentum * momentum_buffer + u
    return momentum_buffer, momentum_buffer


@rule(slots=("momentum_buffer",), stage=Stage.PRECONDITION)
def sgdm_from_gradient(u, momentum_buffer, momentum, first):
    """As in the authors' code: the first gradient of a selection counts 1 + momentum times."""
    momentum_buffer = momentum * where(first > 0.5, u, momentum_buffer) + u
    return momentum_buffer, momentum_buffer


@rule(slots=("momentum_buffer",), stage=Stage.PRECONDITION)
def sgdm_from_weight(u, p, momentum_buffer, momentum, first):
    """As in the authors' code, outside the split: the momentum starts as the weights themselves."""
    momentum_buffer = momentum * where(first > 0.5, p, momentum_buffer) + u
    return momentum_buffer, momentum_buffer


@derive("step")
def sgdm_scalars(momentum, step):
    return {"momentum": momentum, "first": step == 1}


@rule
def rescaled(u, scale):
    return u * scale


@rule
def signs(u, scale):
    return sign(u) * scale


@derive()
def inside_scale(lr_scale):
    return {"scale": lr_scale}


@derive()
def outside_scale(lr_scale, state_free_lr_scale):
    return {"scale": lr_scale * state_free_lr_scale}


BASES = ("adamw", "lion", "sgdm")
STATE_FREE = {"signsgd": signs, "sgd": rescaled, "none": nothing}


class FRUGAL(Optimizer):
    r"""Full-rank updates with gradient splitting: state for a part of the hidden matrices, which changes.

        selected                  p <- (1 - lr weight_decay) p - lr lr_scale base(g)
        the rest of the matrices  p <- (1 - lr weight_decay) p - lr lr_scale state_free_lr_scale sign(g)
        all other parameters      p <- (1 - lr weight_decay) p - lr base(g)

    Every `update_gap` steps another part is selected; the seed and the number of the selection say which.
    Groups carry `role`: `FRUGAL(gradkit.param_groups(model))`; "matrix" is split. Without, shapes decide, and it warns.

    lr: about the change of every weight per step.
    betas, eps: of AdamW; betas of Lion. momentum: of SGD. base: "adamw", "lion" or "sgdm".
    split: what is selected: "blocks", whole tensors of a group; "columns" or "rows" of each; "randk", single entries.
    block_order: how blocks follow each other: "random", "ascending", "descending", or "mirror", pairs from both ends.
    density: the share that is selected. update_gap: steps between selections.
    state_free: what the rest does: "signsgd", "sgd" or "none". state_free_lr_scale: its lr over that of the selected.
    lr_scale: the matrices' lr over that of the other parameters.
    reset_state: state starts fresh with each selection; if False it stays in its place, and counts go on.
    official_quirks: the authors' start of SGD's momentum: with the first gradient, outside the split with the weights.
    """

    ranges: ClassVar = {
        "density": SHARE,
        "update_gap": STEPS,
        "state_free_lr_scale": NOT_NEGATIVE,
        "lr_scale": NOT_NEGATIVE,
        "momentum": FRACTION,
    }

    def __init__(
        self,
        params: Any,
        lr: Number = 1e-3,
        betas: tuple[Number, Number] = (0.9, 0.999),
        eps: Number = 1e-8,
        weight_decay: Number = 0.0,
        *,
        base: str = "adamw",
        split: str = "blocks",
        block_order: str = "random",
        density: float = 0.25,
        update_gap: int = 200,
        state_free: str = "signsgd",
        state_free_lr_scale: Number = 1.0,
        lr_scale: Number = 1.0,
        momentum: Number = 0.9,
        reset_state: bool = True,
        official_quirks: bool = False,
        **options: Unpack[Options],
    ):
        own: dict[str, Any] = {"base": base, "split": split, "block_order": block_order, "density": density}
        own |= {"update_gap": update_gap, "state_free": state_free, "state_free_lr_scale": state_free_lr_scale}
        own |= {"lr_scale": lr_scale, "momentum": momentum, "reset_state": reset_state}
        own |= {"official_quirks": official_quirks}
        who, params = type(self).__name__, with_roles(type(self).__name__, params)
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **own, **options)
        if all(group["role"] != "matrix" for group in self.param_groups):
            raise ValueError(f"{who}: no matrix among the parameters, and only these are split: use gradkit.AdamW")

    def check_parameter(self, p: Tensor, group: Mapping[str, Any]) -> None:
        role, _ = check_role(type(self).__name__, group)
        how = scattered(p) or ("a vector" if p.dim() < 2 else "")
        if role == "matrix" and group["split"] != "blocks" and how:
            raise ValueError(
                f"{type(self).__name__}: a parameter of shape {tuple(p.shape)} is {how}, and split={group['split']!r} "
                f"takes parts of whole matrices: give it another role, or use split='blocks'"
            )

    def links(self, group: Mapping[str, Any]) -> Chain:
        given = {"base": BASES, "split": KINDS, "block_order": ORDERS, "state_free": STATE_FREE}
        for name, choices in given.items():
            check_choice(type(self).__name__, name, group[name], choices)
        role, _ = check_role(type(self).__name__, group)
        splits, quirks = role == "matrix", group["official_quirks"]
        momentum = (sgdm_from_gradient if splits else sgdm_from_weight) if quirks else sgdm
        base = {
            "adamw": chain(adam, derive=adam_scalars),
            "lion": chain(lion, derive=lion_scalars),
            "sgdm": chain(momentum, derive=sgdm_scalars),
        }[group["base"]]
        if not splits:
            return base
        inside = chain(base, chain(rescaled, derive=inside_scale))
        outside = chain(STATE_FREE[group["state_free"]], derive=outside_scale)
        keep = "nothing" if group["reset_state"] else "all"
        return chain(Split(group["split"], inside, outside, group["block_order"], keep), derive=every)
