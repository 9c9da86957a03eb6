"""How a step is timed: interleaved, medians, against torch's fused AdamW and a copy in the same rounds."""

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

import torch

from .shapes import Tensors

WARM_UP = 2  # steps, beside the first
LEAST_ROUNDS = 9
SMALL_BUDGET = 2.0  # seconds that the rounds of a small shape may take
ADAMW_BYTES = 28  # an element: gradient read, parameter and two moments read and written, all float32
COPY_BYTES = 8  # an element: read and written; the target's lines, which are fetched first, are not counted

PROTOCOL = (
    f"One process for each row. Medians of at least {LEAST_ROUNDS} rounds after {1 + WARM_UP} warm-up steps; in each "
    "round every contender takes one step: torch's fused float32 AdamW, a copy, the row; who is first rotates. "
    "Gradients are contiguous, random, set once; an optimizer that changes or drops them gets them back outside the "
    f"timed part. Bytes: the least that the algorithm must move for an element; fused AdamW moves {ADAMW_BYTES}. "
    f"Copy bandwidth counts {COPY_BYTES} bytes an element (not the target's lines, which are fetched before they are "
    "overwritten: 12 are moved), so a step in place can reach more than 100 %. Extra memory: VmHWM after writing 5 to "
    "/proc/self/clear_refs and one warm step, above what was resident before. Start-up: first step on ResNet-50's "
    "shapes, state included, less a warm step, with empty caches in a fresh process. Host work: a step of 300 tensors "
    "of one element; moved: every gradient is another tensor than a step before. MLP: beside torch's default AdamW, "
    "with clip_grad_norm_ where the row clips."
)
ON_GPU = (
    f"One process for each row. Medians of at least {LEAST_ROUNDS} rounds after {1 + WARM_UP} warm-up steps; in each "
    "round every contender takes one step: torch's fused float32 AdamW, a copy, the row; who is first rotates. A step "
    "is timed by events on the device, queued behind 4 GiB of zeros: the caches are cold and the host is a millisecond "
    "ahead, as it is behind a backward pass; an optimizer that keeps the host longer shows it. Gradients are random, "
    f"set once. Bytes: the least that the algorithm must move for an element; fused AdamW moves {ADAMW_BYTES}. Copy "
    f"bandwidth counts {COPY_BYTES} bytes an element. Extra memory: torch.cuda.max_memory_allocated over one warm "
    "step, above what was allocated before. Start-up: first step on the first model, state and compilation included, "
    "less a warm step, with empty caches in a fresh process. Compiled: kernels that Triton built at that step; again: "
    "for the other models and another learning rate. Host work: what the call keeps the host busy for, 300 tensors of "
    "one element, the device idle; moved: every gradient is another tensor than a step before."
)


def nothing() -> None:
    pass


class Contender(NamedTuple):
    """What takes a step, and what is done before, outside the timed part."""

    step: Callable[[], Any]
    prepare: Callable[[], Any] = nothing


def race(
    contenders: Mapping[str, Contender], rounds: int, seconds: Callable[[Callable[[], Any]], float]
) -> dict[str, list[float]]:
    """Seconds of each contender's step in each round; the first of one round is the last of the next."""
    names = list(contenders)
    times: dict[str, list[float]] = {name: [] for name in names}
    for r in range(rounds):
        turn = r % len(names)
        for name in names[turn:] + names[:turn]:
            step, prepare = contenders[name]
            prepare()
            times[name].append(seconds(step))
    return times


def affordable(rounds: int, seconds: float) -> int:
    """Fewer rounds where one takes long, but never fewer than the least; a short run stays as short as it is."""
    return min(rounds, max(LEAST_ROUNDS, int(SMALL_BUDGET / max(seconds, 1e-9))))


def figures(times: Mapping[str, Sequence[float]], row: str, elements: int, bytes_: float) -> dict[str, Any]:
    """What is reported of one race, in milliseconds and ratios."""
    ms = {name: 1e3 * median(seconds) for name, seconds in times.items()}
    ratio = ms[row] / ms["fused"]
    return {
        "rounds": len(times[row]),
        "ms": ms[row],
        "ms_low": 1e3 * min(times[row]),
        "ms_high": 1e3 * max(times[row]),
        "fused_ms": ms["fused"],
        "copy_ms": ms["copy"],
        "copy_gb_s": COPY_BYTES * elements / ms["copy"] / 1e6,
        "ratio": ratio,
        "ratio_per_byte": ratio / (bytes_ / ADAMW_BYTES),
        "copy_share": (bytes_ / ms[row]) / (COPY_BYTES / ms["copy"]),
        "others": {name: ms[row] / ms[name] for name in ms if name not in (row, "fused", "copy")},
    }


class Model:
    """Parameters with gradients; those that an optimizer changes are put back before each step."""

    def __init__(self, tensors: Tensors, device: torch.device, dtype: torch.dtype = torch.float32):
        generator = torch.Generator(device).manual_seed(0)
        self.grads = [torch.randn(t, generator=generator, device=device).to(dtype) for t in tensors]
        self.params = [torch.nn.Parameter(g * 0.1) for g in self.grads]
        self.give()

    @property
    def elements(self) -> int:
        return sum(p.numel() for p in self.params)

    def give(self) -> None:
        for p, g in zip(self.params, self.grads, strict=True):
            p.grad = g

    def contender(self, step: Callable[[], Any]) -> Contender:
        """Take one step to see whether it leaves the gradients as they are."""
        before = [g.clone() for g in self.grads]
        step()
        params = zip(self.params, self.grads, before, strict=True)
        if all(p.grad is g and torch.equal(g, b) for p, g, b in params):
            return Contender(step)

        def restore() -> None:
            for g, b in zip(self.grads, before, strict=True):
                g.copy_(b)
            self.give()

        return Contender(step, restore)

    def moving(self, step: Callable[[], Any]) -> Contender:
        """Other gradient tensors before every step, of the same values."""
        values = [g.clone() for g in self.grads]
        sets = [self.grads, [g.clone() for g in self.grads]]

        def move() -> None:
            sets.reverse()
            for p, g, value in zip(self.params, sets[0], values, strict=True):
                p.grad = g.copy_(value)

        return Contender(step, move)


def copying(elements: int, device: torch.device) -> Contender:
    """A float32 copy of as many elements as the model has."""
    source, target = torch.ones(elements, device=device), torch.empty(elements, device=device)
    return Contender(lambda: target.copy_(source))

