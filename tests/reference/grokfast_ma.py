"""Grokfast's window filter: a list of the last gradients, summed anew at each step."""


def filtered(grads, states, *, window=100, lamb=5.0, mode="mean", warmup=True):
    out = []
    for g, state in zip(grads, states, strict=True):
        last = state["last"] = [*state.get("last", []), g.copy()][-window:]
        if warmup and len(last) < window:
            out.append(g)
        else:
            out.append(g + lamb * sum(last) / (len(last) if mode == "mean" else 1))
    return out
