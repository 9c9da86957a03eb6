"""Weight decay as rules, one for each mode, and the write: the end of every chain."""

from ..chain import Chain, chain
from ..ops import sign, where
from ..transform import Stage, derive, rule


@rule(stage=Stage.GRAD)
def l2(u, p, weight_decay):
    return u + weight_decay * p


@rule(stage=Stage.WRITE)
def decay(u, p, keep):
    return p * keep


@rule(stage=Stage.WRITE)
def cautious_decay(u, p, keep):
    """Decay only what the update shrinks as well."""
    return where(sign(u) * sign(p) > 0.0, p * keep, p)


@rule(stage=Stage.WRITE)
def write(u, p, lr):
    return p - lr * u


@derive()
def decoupled(lr, weight_decay):
    return {"keep": 1 - lr * weight_decay}


@derive()
def independent(lr, lr_ref, weight_decay):
    return {"keep": 1 - lr / lr_ref * weight_decay if lr_ref else 1.0}


L2 = chain(l2)


def last_links(mode: str, weight_decay: float) -> tuple[Chain | None, Chain]:
    """What stands before the moments, and what stands at the end, for one mode of decay."""
    if weight_decay == 0 or mode == "none":
        return None, chain(write)
    return {
        "l2": (L2, chain(write)),
        "decoupled": (None, chain(decay, write, derive=decoupled)),
        "independent": (None, chain(decay, write, derive=independent)),
        "cautious": (None, chain(cautious_decay, write, derive=decoupled)),
    }[mode]
