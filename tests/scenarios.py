"""Gradients that optimizers meet on bad days: eight steps for three parameters, all values exact in float32."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

SHAPES = ((7,), (6, 5), (2, 3, 2, 2))
STEPS = 8
LR = 0.05
Gradients = list[list[Any]]


@dataclass(frozen=True)
class Scenario:
    """Gradients by step and parameter, and the learning rate of each step."""

    gradients: Gradients
    lrs: list[float]
    beyond_float32: bool = False  # squares overflow or vanish


def draw(seed: int = 0, scale: float = 1.0) -> Gradients:
    rng = np.random.default_rng(seed)
    rows = [[(scale * rng.standard_normal(s)).astype(np.float32) for s in SHAPES] for _ in range(STEPS)]
    for t, row in enumerate(rows):
        for g in row:
            g.flat[0] = 0.0  # never a gradient
            g.flat[1] *= t % 3 > 0  # not in each step
    return rows


def start(seed: int = 1) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    params = [rng.standard_normal(s).astype(np.float32) for s in SHAPES]
    for p in params:
        p.flat[2] = 0.0  # where the smallest update shows
    return params


def smooth() -> Scenario:
    return Scenario(draw(), [LR] * STEPS)


def at(value: float, beyond_float32: bool = False) -> Scenario:
    """One entry of one gradient, in the middle of the run."""
    rows = draw()
    rows[3][1].flat[4] = value
    return Scenario(rows, [LR] * STEPS, beyond_float32)


def zeros() -> Scenario:
    """No gradient but zero in the first steps, and again later."""
    rows = draw()
    for t in (0, 1, 5):
        for g in rows[t]:
            g[:] = 0.0
    return Scenario(rows, [LR] * STEPS)


def denormal() -> Scenario:
    """Around the smallest normal float32, 1.2e-38; their squares are 0."""
    return Scenario(draw(scale=1e-38), [LR] * STEPS, beyond_float32=True)


def missing() -> Scenario:
    """A parameter without a gradient in some steps, and one that gets none at all."""
    rows = draw()
    for t in (0, 4, 5):
        rows[t][0] = None
    for row in rows:
        row[2] = None
    return Scenario(rows, [LR] * STEPS)


def late() -> Scenario:
    """A parameter that gets its first gradient when the others have had four: it counts its own steps."""
    rows = draw()
    for t in range(4):
        rows[t][1] = None
    return Scenario(rows, [LR] * STEPS)


def schedule() -> Scenario:
    """A warm-up from zero and a fall."""
    return Scenario(draw(), [LR * x for x in (0.0, 0.25, 0.5, 1.0, 1.0, 0.5, 0.1, 0.0)])


SCENARIOS: dict[str, Callable[[], Scenario]] = {
    "smooth": smooth,
    "spike": lambda: at(1e6),
    "huge": lambda: at(1e30, beyond_float32=True),
    "infinite": lambda: at(np.inf),
    "nan": lambda: at(np.nan),
    "zeros": zeros,
    "denormal": denormal,
    "missing": missing,
    "late": late,
    "schedule": schedule,
}
