"""Sophia: a momentum over the Hessian's diagonal, limited. Liu et al. 2023, https://arxiv.org/abs/2305.14342"""

import logging
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState
from typing_extensions import Unpack

from .. import sharding
from ..chain import Chain, chain
from ..ops import absolute, isfinite, lerp, maximum, where
from ..optimizer import Optimizer
from ..options import DTYPES, LIMIT, POSITIVE, STEPS, Number, Options, brief, check_number, listed
from ..transform import Stage, derive, measure, rule
from ..transforms.clip import cut, scale

log = logging.getLogger("gradkit")


@rule(slots=("exp_avg", "hessian"), stage=Stage.PRECONDITION)
def over_curvature(u, exp_avg, hessian, w1, a, gamma, e):
    """The momentum over gamma h; where h is small or negative, over eps: the limit behind it makes that a sign."""
    exp_avg = lerp(exp_avg, u, w1)
    return exp_avg * a / maximum(hessian * gamma, e), exp_avg, hessian


@rule(counts="win_rate")
def limit_move(u, clip):
    return cut(u, clip)


@derive("step")
def sophia_scalars(betas, eps, correct_bias, step):
    b1, _ = betas
    return {"w1": 1 - b1, "a": 1 / (1 - b1**step) if correct_bias else 1.0, "e": eps}


@rule
def square(u):
    return u * u


def all_finite(largest):
    return where(isfinite(largest), 1.0, 0.0)


@measure(scope="all", reduce={"largest": "max"}, gives=("usable",), finish=all_finite)
def largest_estimate(u):
    return absolute(u)


@rule(slots=("hessian",))
def into_hessian(u, hessian, usable, w2):
    return u, where(usable > 0.5, lerp(hessian, u, w2), hessian)


@derive()
def estimate_scalars(betas):
    return {"w2": 1 - betas[1]}


ESTIMATES = chain(scale, largest_estimate, into_hessian, derive=estimate_scalars)
SQUARES = chain(scale, square, largest_estimate, into_hessian, derive=estimate_scalars)


class Sophia(Optimizer):
    r"""Momentum over an estimate of the Hessian's diagonal, limited in each entry.

        m <- b1 m + (1 - b1) g                             h <- b2 h + (1 - b2) estimate, at each `update_hessian`
        p <- (1 - lr weight_decay) p - lr max(-clip, min(clip, m / max(gamma h, eps)))

    An estimate every `hessian_every` steps, by `gradkit.estimators`; without any it is sign descent.

    lr: largest change of every weight per step, where clip is 1.
    betas: decay of the momentum per step, and of h per estimate.
    gamma: how much curvature counts; so that `win_rate()` is 0.1 to 0.5.
    eps: floor of gamma h.
    clip: limit of each entry of the direction.
    hessian_every: steps from one time that `hessian_due` is true to the next; the first group's.
    correct_bias: divide m by 1 - b1^t.
    """

    ranges: ClassVar = {"gamma": POSITIVE, "clip": LIMIT, "hessian_every": STEPS}

    def __init__(
        self,
        params: Any,
        lr: Number = 6e-4,
        betas: tuple[Number, Number] = (0.965, 0.99),
        gamma: Number = 0.05,
        eps: Number = 1e-12,
        weight_decay: Number = 0.1,
        *,
        clip: Number = 1.0,
        hessian_every: int = 10,
        correct_bias: bool = False,
        **options: Unpack[Options],
    ):
        own: dict[str, Any] = {"gamma": gamma, "clip": clip}
        own |= {"hessian_every": hessian_every, "correct_bias": correct_bias}
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **own, **options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        first = self.param_groups[0]
        first.setdefault("hessian_stale_at", 2.0 * float(first["hessian_every"]))  # the clock, if no estimate comes

    def links(self, group: Any) -> Chain:
        return chain(over_curvature, limit_move, derive=sophia_scalars)

    @property
    def hessian_due(self) -> bool:
        """Whether an estimate is due: before steps 1, k + 1, 2k + 1, ... for k = `hessian_every`."""
        every = self.param_groups[0]["hessian_every"]
        check_number(type(self).__name__, "hessian_every", every, STEPS)  # the group may have been edited
        return self._clock() % float(every) == 0

    def _clock(self) -> float:
        return float(self.param_groups[0].get("clock", 0.0))

    def update_hessian(
        self,
        *,
        batch_size: int | None = None,
        estimates: Sequence[Tensor | None] | None = None,
        scaler: Any = None,
    ) -> None:
        """Let an estimate of the Hessian's diagonal into h: `batch_size * p.grad**2`, or one tensor a parameter.

        Where any entry is infinite or NaN, the whole estimate is left out. A parameter without a gradient, or with
        None, keeps its h. Gradients are left alone.

        batch_size: how many drawn labels the mean loss is over, behind the gradients of all ranks and micro-batches.
        estimates: in the order of the groups.
        scaler: the `torch.amp.GradScaler` that scaled the loss; its factor is divided out.
        """
        who = f"{type(self).__name__}.update_hessian"
        if (batch_size is None) == (estimates is None):
            raise ValueError(f"{who}: give either batch_size=, the number of drawn labels, or estimates=[...]")
        if not isinstance(scaler, GradScaler | None):
            raise TypeError(f"{who}: scaler={brief(scaler)}: give the torch.amp.GradScaler of the loss, or None")
        params = [p for g in self.param_groups for p in g["params"]]
        unscale = 1.0 if scaler is None else 1.0 / self._scale_of(scaler)
        if batch_size is None:
            given = checked(who, estimates, params)
            self.run_beside(ESTIMATES, given, coef=unscale)
        else:
            check_number(who, "batch_size", batch_size, STEPS)
            given = [p.grad for p in params]
            if all(g is None for g in given):
                raise ValueError(f"{who}: no parameter has a gradient; call it after backward() and before zero_grad()")
            self.run_beside(SQUARES, given, coef=float(batch_size) ** 0.5 * unscale)
        first = self.param_groups[0]
        first["hessian_stale_at"] = self._clock() + 2.0 * float(first["hessian_every"])

    def _scale_of(self, scaler: Any) -> float:
        """The factor of a scaler that has not unscaled yet."""
        stage = getattr(scaler, "_per_optimizer_states", {}).get(id(self), {}).get("stage")  # a disabled one has none
        if stage is OptState.UNSCALED:
            raise RuntimeError(
                f"{type(self).__name__}.update_hessian: scaler.unscale_() has been called on this optimizer, and would "
                f"not act on the step's gradients; call it behind update_hessian(scaler=scaler) and the next backward"
            )
        return float(scaler.get_scale())

    @torch.no_grad()
    def win_rate(self) -> float:
        """The share of all entries whose step is not limited, |m| < clip gamma h, as m and h are now.

        One synchronisation; with sharded parameters all ranks have to call it.
        """
        wins, count = [], 0
        for group in self.param_groups:
            for p in (p for p in group["params"] if "hessian" in self.state.get(p, {})):
                state = self.state[p]
                b1, step = float(group["betas"][0]), float(state["step"])
                corrected = 1 - b1**step if group["correct_bias"] and step else 1.0
                bound = float(group["clip"]) * float(group["gamma"]) * corrected
                wins.append(sharding.whole((state["exp_avg"].abs() < bound * state["hessian"]).sum()))
                count += p.numel()
        return float(torch.stack([x.to(wins[0].device) for x in wins]).sum()) / count if count else 0.0

    def applied(self) -> None:
        first = self.param_groups[0]
        who, steps = type(self).__name__, 2.0 * float(first["hessian_every"])
        if self._clock() == first.get("hessian_stale_at"):  # so once
            log.warning(
                "%s: no update_hessian() in the last %d steps: h is old, or 0, which makes it sign descent; "
                "call it when optimizer.hessian_due",
                who,
                steps,
            )
        elif self._clock() == steps and not any(  # at this step alone: it waits for the device
            sharding.local(s["hessian"]).any() for s in self.state.values() if "hessian" in s
        ):
            log.warning(
                "%s: no estimate has entered h in the first %d steps: each had an infinity or a NaN, or was 0; look at "
                "the gradients before update_hessian()",
                who,
                steps,
            )


def checked(who: str, estimates: Any, params: Sequence[Tensor]) -> list[Tensor | None]:
    """The estimates, None for a frozen parameter; raises unless there is one of each parameter's shape, or None."""
    if not isinstance(estimates, list | tuple) or len(estimates) != len(params):
        found = f"{len(estimates)} estimates" if isinstance(estimates, list | tuple) else brief(estimates)
        raise ValueError(f"{who}: {found} for {len(params)} parameters; give a list, in the order of the groups")
    for i, (x, p) in enumerate(zip(estimates, params, strict=True)):
        if x is None:
            continue
        if not isinstance(x, Tensor) or x.shape != p.shape:
            raise ValueError(
                f"{who}: estimate {i} is {tuple(x.shape) if isinstance(x, Tensor) else brief(x)}, its parameter "
                f"{tuple(p.shape)}; give one tensor for each parameter, in the order of the groups"
            )
        if x.dtype not in DTYPES or x.device != p.device or x.layout != torch.strided:
            raise ValueError(
                f"{who}: estimate {i} is {x.dtype}, {x.layout} on {x.device}; give a dense one on {p.device} of one of "
                f"{listed(DTYPES)}"
            )
    given = [x if p.requires_grad else None for x, p in zip(estimates, params, strict=True)]
    if all(x is None for x in given):
        raise ValueError(f"{who}: there is no estimate for a parameter that is trained; give one tensor for each")
    return given
