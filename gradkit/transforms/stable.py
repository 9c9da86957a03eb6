"""Stable-SPAM's two: a limit for spikes that adapts, a norm that adapts. Huang et al. 2025, https://arxiv.org/abs/2502.17055"""

from ..chain import Chain, chain
from ..language import fn
from ..ops import absolute, isfinite, lerp, sqrt, where
from ..options import FRACTION
from ..transform import derive, measure, rule


@fn
def average(kept, new, share):
    """A running average; what is not finite is not counted."""
    return where(isfinite(new), lerp(kept, new, share), kept)


def spike_limit(absmax, absmax_avg, w3, c3):
    absmax_avg = average(absmax_avg, absmax, w3)
    limit = absmax_avg * c3
    return limit, where(absmax > 0.0, limit / absmax, 1.0), absmax_avg


@measure(scope="tensor", reduce={"absmax": "max"}, state=("absmax_avg",), gives=("limit", "shrink"), finish=spike_limit)
def largest_entry(u):
    return absolute(u)


@rule(counts="spikes")
def shrink_spikes(u, limit, shrink):
    return where(absolute(u) > limit, u * shrink, u)


def norm_target(total, norm_avg, norm_sq_avg, v1, v2, c1, c2, e):
    norm_avg = average(norm_avg, sqrt(total), v1)
    norm_sq_avg = average(norm_sq_avg, total, v2)
    target = norm_avg * c1 / (sqrt(norm_sq_avg * c2) + e)
    return where(total > 0.0, target / sqrt(total), 1.0), norm_avg, norm_sq_avg


@measure(
    scope="tensor", reduce={"total": "sum"}, state=("norm_avg", "norm_sq_avg"), gives=("gain",), finish=norm_target
)
def norm_of_each(u):
    return u * u


@rule
def to_target(u, gain):
    return u * gain


@derive("adaclip_step")
def adaclip_scalars(gamma, adaclip_step):
    return {"w3": 1 - gamma, "c3": 1 / (1 - gamma**adaclip_step)}


@derive("adagn_step")
def adagn_scalars(gammas, adagn_step):
    g1, g2 = gammas
    return {"v1": 1 - g1, "v2": 1 - g2, "c1": 1 / (1 - g1**adagn_step), "c2": 1 / (1 - g2**adagn_step), "e": 1e-8}


def adaclip(gamma: float = 0.999, name: str | None = None) -> Chain:
    """Shrink entries beyond the running average of each tensor's largest entry.

    M <- gamma M + (1 - gamma) max|g|        g <- g M / max|g|  where |g| > M, bias-corrected
    """
    made = chain(
        largest_entry, shrink_spikes, derive=adaclip_scalars, name="adaclip", ranges={"gamma": FRACTION}, gamma=gamma
    )
    return made.named(name)


def adagn(gammas: tuple[float, float] = (0.7, 0.9), name: str | None = None) -> Chain:
    """Give each tensor's gradient the norm that is usual: the running mean of its norm over their root mean square.

    n1 <- g1 n1 + (1 - g1) |g|        n2 <- g2 n2 + (1 - g2) |g|^2
    g <- g / |g| n1 / (sqrt(n2) + 1e-8), both bias-corrected
    """
    ranges = {"gammas": FRACTION._replace(example=(0.7, 0.9))}
    made = chain(norm_of_each, to_target, derive=adagn_scalars, name="adagn", ranges=ranges, gammas=gammas)
    return made.named(name)
