"""Two tasks whose gradients conflict in a curved valley: Adam on their sum, behind PCGrad and behind CAGrad; 1 minute.

    python examples/pcgrad_two_tasks.py [--steps 30000] [--out pcgrad_two_tasks.png]

The two-dimensional problem of the PCGrad paper (https://arxiv.org/abs/2001.06782). Each task is a logarithm of how far
one curve is: its gradient is the steeper the nearer that is, so the sum follows one task into its valley and stays.
"""

import argparse
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import gradkit
from gradkit.multiloss import CAGrad, Method, PCGrad

STEPS, POINTS, LR = 30000, 1000, 0.01
START = (0.5, -3.0)


def tasks(at: Tensor) -> list[Tensor]:
    """Both losses; the last dimension of `at` is the two coordinates."""
    x, y = at.unbind(-1)
    one, two = 0.5 * x + torch.tanh(y), 0.5 * x - torch.tanh(y) + 2
    return [20 * one.abs().clamp(min=5e-6).log(), 25 * two.abs().clamp(min=5e-6).log()]


@dataclass
class Run:
    """One way from the start, and where it led."""

    name: str
    method: Method | None  # None: the sum
    color: str
    path: list[list[float]] = field(default_factory=list)
    losses: tuple[float, float] = (0.0, 0.0)
    conflicts: float = 0.0  # the share of steps, of those that are in the path

    def go(self, steps: int) -> None:
        at = torch.tensor(START, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([at], lr=LR)
        seen, every = [], max(1, steps // POINTS)
        for step in range(steps):
            if step % every == 0:
                self.path.append(at.tolist())
            optimizer.zero_grad()
            losses = tasks(at)
            if self.method is None:
                sum(losses).backward()
            else:
                gradkit.backward(losses, optimizer, self.method)  # the one line that differs
                if step % every == 0:
                    seen.append(self.method.last.conflict_rate.item())
            optimizer.step()
        self.path.append(at.tolist())
        one, two = tasks(at.detach())
        self.losses = one.item(), two.item()
        self.conflicts = sum(seen) / max(1, len(seen))


def runs() -> list[Run]:
    """The sum of the two losses, and both methods; of what scale doesn't matter to Adam."""
    return [
        Run("sum of losses", None, "#222222"),
        Run("PCGrad", PCGrad(reduction="sum"), "#1f77b4"),
        Run("CAGrad", CAGrad(), "#d62728"),
    ]


def draw(results: list[Run], out: Path) -> str:
    """The paths over the sum of the losses; returns what to tell the user."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        return "matplotlib is missing, so there is no picture: pip install 'gradkit[plot]'"
    places = torch.tensor([point for run in results for point in run.path])
    (low, high), margin = places.aminmax(dim=0), 1.0
    grid = [torch.linspace(a - margin, b + margin, 300) for a, b in zip(low.tolist(), high.tolist(), strict=True)]
    x, y = torch.meshgrid(*grid, indexing="xy")
    figure, axes = plt.subplots(figsize=(11, 6), layout="constrained")
    levels = axes.contourf(x, y, sum(tasks(torch.stack([x, y], -1))), 40, cmap="Greys_r", alpha=0.6)
    figure.colorbar(levels, label="sum of both losses")
    for run in results:
        one, two = run.losses
        label = f"{run.name}: {one:.0f} and {two:.0f}"
        axes.plot(*zip(*run.path, strict=True), color=run.color, linewidth=2, label=label)
        axes.plot(*run.path[-1], "o", color=run.color)
    axes.plot(*START, "k*", markersize=14)
    axes.set(title="Two tasks, one start (star): where Adam ends, and both losses there", xlabel="x", ylabel="y")
    axes.legend()
    figure.savefig(out, dpi=120)
    plt.close(figure)
    return f"picture: {out.resolve()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of Adam, each way ({STEPS})")
    parser.add_argument("--out", type=Path, default=Path("pcgrad_two_tasks.png"), help="where the picture goes")
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"--steps {options.steps}: at least 1")
    torch.set_num_threads(1)  # two numbers: a second thread only waits
    print(f"{'':<16} {'task 1':>9} {'task 2':>9} {'both':>9} {'steps in conflict':>18}")
    results = runs()
    for run in results:
        run.go(options.steps)
        one, two = run.losses
        share = "-" if run.method is None else f"{run.conflicts:.0%}"
        print(f"{run.name:<16} {one:>9.1f} {two:>9.1f} {one + two:>9.1f} {share:>18}", flush=True)
    print(draw(results, options.out))


if __name__ == "__main__":
    main()
