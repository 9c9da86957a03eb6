"""Adaptive gradient clipping, by rows. Brock et al. 2021, https://arxiv.org/abs/2102.06171"""

from collections.abc import Sequence
from typing import Any

from ..chain import Chain, chain
from ..ops import maximum, sqrt, where
from ..options import LIMIT, POSITIVE, check_patterns
from ..transform import measure
from .clip import scale


def agc_coef(gradient, weight, clip, eps, excluded):
    norm = sqrt(gradient)
    most = clip * maximum(sqrt(weight), eps)
    return where((excluded < 0.5) & (norm >= most), most / maximum(norm, 1e-6), 1.0)


@measure(scope="row", reduce={"gradient": "sum", "weight": "sum"}, gives=("coef",), finish=agc_coef)
def squares_of_rows(u, p):
    return u * u, p * p


def adaptive_clip(clip: float = 0.01, eps: float = 1e-3, exclude: Sequence[str] = (), name: str | None = None) -> Chain:
    """Scale the gradient of each row so that its norm is at most `clip` of the row's own (AGC).

    g <- g min(1, clip max(|p|, eps) / |g|)        each row: what gives one output; a vector as a whole

    clip: 0.01 for large batches; up to 0.16 for small ones.
    eps: the least norm of a row, so that one of zeros can move.
    exclude: patterns of parameters' names that are left alone, as `("head.*",)` for the last layer, where the authors
        clip nothing; needs names: give the optimizer `model.named_parameters()`.
    """
    check_patterns("adaptive_clip", "exclude", exclude)
    arguments: dict[str, Any] = {"clip": clip, "eps": eps, "exclude": tuple(exclude), "excluded": False}
    ranges = {"clip": LIMIT, "eps": POSITIVE}
    return chain(squares_of_rows, scale, name="adaptive_clip", ranges=ranges, **arguments).named(name)
