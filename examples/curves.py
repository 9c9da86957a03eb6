"""What the demo and its neighbours show of a run: its progress, its costs, its loss curves beside the others'."""

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import language_model
import torch

Params = list[torch.nn.Parameter]


@dataclass
class Run:
    """One optimizer: how it is made, how it is drawn, and what came out."""

    name: str
    settings: str
    make: Callable[[Any, int], torch.optim.Optimizer]  # of parameters or groups, and the number of steps
    color: str
    line: str = "-"
    losses: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)


@dataclass
class Costed(Run):
    """A run, and what its optimizer costs: the median time of a step, and the state that it holds."""

    step_ms: float = math.nan
    state_bytes: int = 0

    def train(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        corpus: language_model.Corpus,
        steps: int,
        seed: int,
        disturb: Callable[[int], None] = lambda step: None,
    ) -> None:
        """Train the model, and note losses and costs; `disturb` as in `language_model.train`."""
        progress, started, times = Progress(self.name, steps), 0.0, []

        def start(*_: Any) -> None:
            nonlocal started
            started = time.perf_counter()

        optimizer.register_step_pre_hook(start)
        optimizer.register_step_post_hook(lambda *_: times.append(time.perf_counter() - started))
        for loss in language_model.train(model, optimizer, corpus, steps, seed, disturb):
            follow(self, loss, lambda: corpus.held_out_loss(model), progress)
        self.step_ms, self.state_bytes = 1000 * median(times), state_bytes(optimizer)


class Progress:
    """A bar on a terminal; a line at each quarter where the output goes to a file."""

    def __init__(self, name: str, steps: int):
        self.name, self.steps, self.started, self.drawn = name, steps, time.perf_counter(), 0.0

    def show(self, done: int, loss: float) -> None:
        now, last = time.perf_counter(), done == self.steps
        line = f"{self.name:<18} {done:>5}/{self.steps}  loss {loss:.3f}  {now - self.started:4.0f} s"
        if not sys.stdout.isatty():
            if done * 4 // self.steps > (done - 1) * 4 // self.steps:
                print(line, flush=True)
        elif last or now - self.drawn > 0.1:
            self.drawn = now
            full = 28 * done // self.steps
            print(f"\r{line}  {'━' * full}{'╌' * (28 - full)}", end="\n" if last else "", flush=True)


def follow(run: Run, loss: float, held_out_loss: Callable[[], float], progress: Progress) -> None:
    """Note the loss of a step; the held-out loss at each tenth of the way, but no more often than in 20 steps."""
    run.losses.append(loss)
    n, steps = len(run.losses), progress.steps
    if n % max(20, steps // 10) == 0 or n == steps:
        run.held_out.append((n, held_out_loss()))
    progress.show(n, sum(run.losses[-20:]) / len(run.losses[-20:]))


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """What the optimizer keeps for elements of parameters: counters have no dimension."""
    held = (x for state in optimizer.state.values() for x in state.values())
    return sum(x.numel() * x.element_size() for x in held if isinstance(x, torch.Tensor) and x.dim())


def smooth(losses: list[float], keep: float) -> list[float]:
    """A running mean that forgets, corrected for its start at zero."""
    mean, curve = 0.0, []
    for n, loss in enumerate(losses, 1):
        mean = keep * mean + (1 - keep) * loss
        curve.append(mean / (1 - keep**n))
    return curve


def label_ends(axes: Any, runs: Sequence[Run]) -> None:
    """Name and last held-out loss beside each curve's end, none over another."""
    low, high = axes.get_ylim()
    place = -math.inf
    for run in sorted(runs, key=lambda run: run.held_out[-1][1]):
        step, loss = run.held_out[-1]
        place = max(place + 0.045 * (high - low), loss)
        axes.text(1.03 * step, place, f"{run.name} {loss:.3f}", color=run.color, va="center", fontsize=9)
    first, _ = axes.set_xlim(right=1.6 * step)  # room for the labels, without ticks under it
    axes.set_xticks([tick for tick in axes.get_xticks() if first <= tick <= step])


def draw(runs: Sequence[Run], title: str, out: Path, mark: Callable[[Any], None] = lambda axes: None) -> str:
    """The loss curves, with what `mark` adds to those of training; returns what to tell the user."""
    try:
        import matplotlib
    except ImportError:
        return "no picture: matplotlib is missing (pip install 'gradkit[plot]')"
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    steps = len(runs[0].losses)
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), width_ratios=(3, 2), layout="constrained")
    for n, run in enumerate(runs):
        over = 9 - n  # the dashed line over the one that it all but equals
        curve, label = smooth(run.losses, 1 - min(1.0, 40 / steps)), f"{run.name}, {run.settings}"
        left.plot(range(1, steps + 1), curve, run.line, color=run.color, label=label, zorder=over)
        late = [point for point in run.held_out if point[0] >= 0.4 * steps]
        right.plot(*zip(*late, strict=True), run.line, color=run.color, marker="o", markersize=4, zorder=over)
    mark(left)
    label_ends(right, runs)
    left.set(xlabel="step", ylabel="loss, nats a character", title="training loss, smoothed")
    left.legend(frameon=False)
    right.set(xlabel="step", title="held-out loss, later part of the run")
    for axes in (left, right):
        axes.grid(color="#eeeeee")
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    figure.savefig(out, dpi=120)
    plt.close(figure)
    return f"picture: {out.resolve()}"
