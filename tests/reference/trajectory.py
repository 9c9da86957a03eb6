"""A whole run: which link acts on what, and in which order."""

import numpy as np

from tests.reference import decay as modes


class Run:
    """Parameters, and a state for each of them and for each link; `filters` see all gradients of a step at once.

    `before` sees them too, and the states of the direction.
    """

    def __init__(
        self, start, direction, *, before=None, filters=(), masks=(), decays_after=False, dtype=np.float64,
        maximize=False, **decay,
    ):  # fmt: skip
        self.params = [np.asarray(x, dtype) for x in start]
        self.direction, self.filters, self.masks, self.decays_after = direction, filters, masks, decays_after
        self.before, self.dtype, self.decay = before, dtype, {"weight_decay": 0.0, "mode": "none", **decay}
        self.sign, self.clock = -1.0 if maximize else 1.0, 0
        self.states = [[{} for _ in start] for _ in range(len(filters) + 1)]

    def step(self, gradients, lr, lr_ref):
        """Move the parameters that have a gradient; None leaves one alone, its counts too."""
        live = [i for i, g in enumerate(gradients) if g is not None]
        self.clock += bool(live)
        for states in self.states:
            for i, (state, p) in enumerate(zip(states, self.params, strict=True)):
                state.update(clock=self.clock, p=p, at=i, shapes=tuple(x.shape for x in self.params))
        grads = [self.sign * np.asarray(gradients[i], self.dtype) for i in live]
        flow = grads
        with np.errstate(all="ignore"):
            if self.before and live:
                self.before(grads, [self.states[0][i] for i in live])
            for filtered, states in zip(self.filters, self.states[1:], strict=True):
                flow = filtered(flow, [states[i] for i in live])
            l2 = {k: self.decay[k] for k in ("weight_decay", "mode")}
            flow = [modes.into_gradient(u, self.params[i], **l2) for u, i in zip(flow, live, strict=True)]
            flow = [self.direction(u, self.states[0][i]) for u, i in zip(flow, live, strict=True)]
            for masked in self.masks:
                flow = masked(flow, grads)
            for u, i in zip(flow, live, strict=True):
                if self.decays_after and l2["mode"] == "decoupled":
                    self.params[i] = (self.params[i] - lr * u) * self.dtype(1 - lr * l2["weight_decay"])
                else:
                    self.params[i] = modes.written(self.params[i], u, lr=lr, lr_ref=lr_ref, **l2).astype(self.dtype)
        return [p.copy() for p in self.params]
