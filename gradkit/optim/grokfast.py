"""Grokfast: Adam behind a filter that amplifies slow gradients. Lee et al. 2024, https://arxiv.org/abs/2405.20233"""

from typing import Any, ClassVar

from typing_extensions import Unpack

from ..chain import Chain, chain
from ..optimizer import Optimizer
from ..options import FRACTION, NOT_NEGATIVE, STEPS, Number, Options, check_choice
from ..transforms.filter import AVERAGES, ema_filter, ema_from_first, ma_filter, ma_scalars
from .adamw import adam, adam_scalars

FILTERS = ("ema", "ma")


class Grokfast(Optimizer):
    r"""Adam behind a low-pass filter of the gradient.

        ema:  e <- alpha e + (1 - alpha) g (e = g at first)            g <- g + lamb e
        ma:   g <- g + lamb mean(last `window` gradients), once there are that many (with `warmup`)
        p <- p - lr Adam(g + weight_decay p)

    `decay` is "l2" as in the authors' runs; without any decay their task does not grok.

    lr: about the change of every weight per step.
    filter: "ema", one slot, or "ma", `window` + 2 slots.
    alpha: decay of the average per step. lamb: weight of the filtered gradient.
    mode: "mean" or "sum" over the window.
    """

    ranges: ClassVar = {"alpha": FRACTION, "lamb": NOT_NEGATIVE, "window": STEPS}

    def __init__(
        self,
        params: Any,
        lr: Number = 1e-3,
        betas: tuple[Number, Number] = (0.9, 0.98),
        eps: Number = 1e-8,
        weight_decay: Number = 0.0,
        *,
        filter: str = "ema",
        alpha: Number = 0.98,
        lamb: Number = 2.0,
        window: int = 100,
        mode: str = "mean",
        warmup: bool = True,
        **options: Unpack[Options],
    ):
        options.setdefault("decay", "l2")
        own: dict[str, Any] = {"filter": filter, "alpha": alpha, "lamb": lamb, "window": window}
        own |= {"mode": mode, "warmup": warmup}
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **own, **options)

    def links(self, group: Any) -> Chain:
        check_choice("Grokfast", "filter", group["filter"], FILTERS)
        check_choice("Grokfast", "mode", group["mode"], AVERAGES)
        moving = chain(ma_filter, derive=ma_scalars)
        return chain(
            moving if group["filter"] == "ma" else chain(ema_filter, derive=ema_from_first),
            chain(adam, derive=adam_scalars),
        )
