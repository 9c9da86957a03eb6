"""Grokfast's exponential filter: the average starts at the first gradient (or at zero) and is added, amplified."""


def filtered(grads, states, *, alpha=0.98, lamb=2.0, init="first"):
    out = []
    for g, state in zip(grads, states, strict=True):
        before = state.get("average", g if init == "first" else 0.0 * g)
        state["average"] = alpha * before + (1 - alpha) * g
        out.append(g + lamb * state["average"])
    return out
