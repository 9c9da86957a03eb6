"""Sophia with estimates made of its own gradients: what tests of a whole run need no second backward for."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

import gradkit

BATCH = 4  # labels that an estimate counts
EVERY = {"hessian_every": 3}  # the step of tests/scenarios.py whose gradient is not finite has an estimate


class SquaresOfGradients(gradkit.Sophia):
    """Each step's gradient, where an estimate is due, is that of drawn labels too."""

    def estimate(self, grads: Sequence[Tensor | None]) -> None:
        self.update_hessian(batch_size=BATCH)

    def _fitting(self, key: Any, program_of: Any, grads: Sequence[Tensor | None]) -> Any:
        if key == "step" and self.hessian_due:  # behind a closure, before the step
            self.estimate(grads)
        return super()._fitting(key, program_of, grads)


class SignedEstimates(SquaresOfGradients):
    """Estimates of both signs, as Hutchinson's."""

    def estimate(self, grads: Sequence[Tensor | None]) -> None:
        self.update_hessian(estimates=[None if g is None else g * g.abs() for g in grads])
