"""ZClip: a limit for the norm of all gradients that follows its statistics. Kumar et al. 2025, https://arxiv.org/abs/2504.02507"""

import math
from typing import Any

from ..chain import Chain, chain
from ..ops import absolute, isfinite, minimum, sqrt, where
from ..options import FRACTION, LIMIT, Range, check_choice, check_flag
from ..transform import derive, measure
from .clip import scale

MODES = ("zscore", "percentile")
TARGETS = ("adaptive_scaling", "mean")


def z_coef(total, largest, count, mean, var, z_thresh, w, limit, warmup_steps, by_score, to_mean, clip_factor, learns):
    """Population statistics of the first norms, then running ones; what isn't finite is neither cut nor counted.

    A norm that is infinite though every entry is finite, since squares overflow, is beyond any limit.
    """
    norm = sqrt(total)
    std = sqrt(var)
    score = (norm - mean) / (std + 1e-6)
    bound = mean + z_thresh * std
    spike = (count >= warmup_steps) & (where(by_score > 0.5, score - z_thresh, norm - bound) > 0.0)
    adapted = where(to_mean > 0.5, mean, (mean + z_thresh * std / (score / z_thresh)) * clip_factor)
    seen = where(spike, where(by_score > 0.5, adapted, bound), norm)
    target = minimum(seen, limit)
    cut = where(norm > target, target / (norm + 1e-6), 1.0)
    coef = where(isfinite(norm), cut, where(isfinite(largest), 0.0, 1.0))

    first = count < warmup_steps
    share = where(first, 1.0 / (count + 1.0), w)
    mean_now = mean + share * (seen - mean)
    away = (seen - mean_now) * where(first, seen - mean, seen - mean_now)
    counted = isfinite(norm) & (where(spike, learns, 1.0) > 0.5)
    mean = where(counted, mean_now, mean)
    var = where(counted, var + share * (away - var), var)
    return coef, where(counted & first, count + 1.0, count), mean, var


SEEN = {"total": "sum", "largest": "max"}


@measure(scope="all", reduce=SEEN, state=("count", "mean", "var"), gives=("coef",), finish=z_coef)
def energy(u):
    return u * u, absolute(u)


@derive()
def z_scalars(alpha, max_grad_norm, mode, clip_option, skip_update_on_spike):
    check_choice("zclip", "mode", mode, MODES)  # a group may have been edited
    check_choice("zclip", "clip_option", clip_option, TARGETS)
    return {
        "w": 1 - alpha,
        "limit": math.inf if max_grad_norm is None else max_grad_norm,
        "by_score": mode == "zscore",
        "to_mean": clip_option == "mean",
        "learns": not skip_update_on_spike,
    }


def zclip(
    alpha: float = 0.97,
    z_thresh: float = 2.5,
    max_grad_norm: float | None = 1.0,
    warmup_steps: int = 25,
    mode: str = "zscore",
    clip_option: str = "adaptive_scaling",
    clip_factor: float = 1.0,
    skip_update_on_spike: bool = False,
    name: str | None = None,
) -> Chain:
    """Scale all gradients together where their norm n stands out from the norms before.

        z <- (n - mean) / (std + 1e-6)        n* <- mean + z_thresh^2 std / z  where z > z_thresh, else n
        g <- g min(n*, max_grad_norm) / (n + 1e-6)  where that is less
        mean <- alpha mean + (1 - alpha) n*        var <- alpha var + (1 - alpha) (n* - mean)^2

    z_thresh: how many standard deviations are a spike.
    max_grad_norm: a limit in any case; None: none. Gradients are small late in training: choose it for your model.
    warmup_steps: the first norms, of which the plain mean and variance are taken; only `max_grad_norm` cuts there.
    mode: "zscore", or "percentile": n* <- mean + z_thresh std where n is above that.
    clip_option: of "zscore": "adaptive_scaling" as above, or "mean": n* <- mean.
    clip_factor: of "adaptive_scaling": factor of n*.
    skip_update_on_spike: spikes don't count for the statistics; else n* does.

    A gradient that is not finite is left as it is and is not counted.
    """
    check_choice("zclip", "mode", mode, MODES)
    check_choice("zclip", "clip_option", clip_option, TARGETS)
    check_flag("zclip", "skip_update_on_spike", skip_update_on_spike)
    arguments: dict[str, Any] = {
        "alpha": alpha,
        "z_thresh": z_thresh,
        "max_grad_norm": max_grad_norm,
        "warmup_steps": warmup_steps,
        "mode": mode,
        "clip_option": clip_option,
        "clip_factor": clip_factor,
        "skip_update_on_spike": skip_update_on_spike,
    }
    ranges = {
        "alpha": FRACTION,
        "z_thresh": LIMIT,
        "max_grad_norm": LIMIT._replace(optional=True),
        "warmup_steps": Range("a whole number >= 2", 2, whole=True),  # one norm has no spread
        "clip_factor": LIMIT,
    }
    return chain(energy, scale, derive=z_scalars, name="zclip", ranges=ranges, **arguments).named(name)
