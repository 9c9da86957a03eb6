"""FRUGAL's direction: matrices are those with two axes or more."""

import numpy as np

from tests.reference import adamw, lion
from tests.reference.selection import selected


def sgdm(u, state, momentum):
    b = state["b"] = momentum * state.get("b", 0.0) + u
    return b


def quirky(u, state, momentum, start):
    b = state["b"] = momentum * state.get("b", start) + u
    return b


def links(
    *, split="blocks", block_order="random", density=0.25, update_gap=200, base="adamw", betas=(0.9, 0.999), eps=1e-8,
    momentum=0.9, state_free="signsgd", state_free_lr_scale=1.0, lr_scale=1.0, reset_state=True, official_quirks=False,
    masks=None, seed=0,
):  # fmt: skip
    """masks: of a step and a parameter, in place of those that the seed gives."""

    def based(u, state, matrix):
        if base == "adamw":
            return adamw.direction(u, state, betas=betas, eps=eps)
        if base == "lion":
            return lion.direction(u, state, betas=betas)
        if official_quirks:
            return quirky(u, state, momentum, u if matrix else state["p"])
        return sgdm(u, state, momentum)

    def direction(u, state):
        if u.ndim < 2:
            return based(u, state, matrix=False)
        clock, at = state["clock"], state["at"]
        number = (clock - 1) // update_gap
        if masks:
            chosen = masks(clock, at)
        else:
            chosen = selected(split, number, at, state["shapes"], density, block_order, seed)
        inner = state.setdefault("inner", {})
        if number != state.get("number"):
            keeps = not reset_state and chosen.any() and state.get("chosen", ~chosen).any()
            if not keeps:
                inner.clear()
            state["number"], state["chosen"] = number, chosen
        inner["p"] = state["p"][chosen]
        out = {"signsgd": lambda x: np.where(np.isnan(x), 0.0, np.sign(x)), "sgd": lambda x: x, "none": np.zeros_like}
        rest = lr_scale * state_free_lr_scale * out[state_free](u)
        rest = rest.astype(u.dtype)
        if chosen.any():
            rest[chosen] = lr_scale * based(u[chosen], inner, matrix=True)
        return rest

    return {"direction": direction}
