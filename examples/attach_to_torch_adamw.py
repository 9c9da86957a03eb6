"""torch's own AdamW with one more line: transforms in front of it, on data with a bad batch now and then.

    python examples/attach_to_torch_adamw.py [--steps 600]

It trains the same network on clean batches, on batches of which one in 20 is broken, and on those with `zclip`
attached, or a plain norm clip, whose limit is yours to find. Then it stops a run with two transforms half-way,
saves it, and goes on from the file.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import gradkit
from gradkit.transforms import clip_by_global_norm, grokfast_ema, zclip

CLEAN = 30  # batches before the first broken one: zclip learns what is usual from the first 25


def spirals(points: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two arms of a spiral, one class each."""
    t = torch.rand(points, generator=generator).sqrt() * 3 * torch.pi
    label = torch.arange(points) % 2
    angle = t + label * torch.pi
    return torch.stack((t * angle.cos(), t * angle.sin()), 1) / 10, label


class Run:
    """A plain training loop of torch's, and the line that is new."""

    def __init__(self, broken: bool, *transforms: gradkit.Chain) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3)
        self.broken, self.step = broken, 0
        if transforms:
            self.handle = gradkit.attach(self.optimizer, *transforms)  # the one line

    def train(self, steps: int) -> float:
        """The loop you have already. Returns the loss on clean data."""
        for _ in range(steps):
            x, y = spirals(256, torch.Generator().manual_seed(self.step))
            self.step += 1
            if self.broken and self.step > CLEAN and self.step % 20 == 0:
                x, y = x * 100, 1 - y  # in other units, and with the labels exchanged
            loss = nn.functional.cross_entropy(self.model(x), y)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        x, y = spirals(2000, torch.Generator().manual_seed(10**6))
        return nn.functional.cross_entropy(self.model(x), y).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)  # on a model this small a second one only waits
    # As in the paper but for the limit in any case, which is for gradients of another size.
    adaptive = zclip(max_grad_norm=None)
    runs = {
        "clean batches": Run(False),
        "broken batches": Run(True),
        "with zclip": Run(True, adaptive),
        "with a norm clip at 1": Run(True, clip_by_global_norm(1.0)),
        "with a norm clip at 0.1": Run(True, clip_by_global_norm(0.1)),
    }
    for name, run in runs.items():
        print(f"AdamW, {name:25}loss {run.train(steps):.4f}")
    print(runs["with zclip"].handle.explain())

    # Stopped half-way, saved with the transforms' state, and gone on with from the file in objects made anew.
    straight, first, resumed = (Run(True, adaptive, grokfast_ema(lamb=0.5)) for _ in range(3))
    straight.train(steps // 2 * 2)
    first.train(steps // 2)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pt"
        torch.save({"model": first.model.state_dict(), "optimizer": first.optimizer.state_dict()}, path)
        saved = torch.load(path, weights_only=True)
    resumed.model.load_state_dict(saved["model"])
    resumed.optimizer.load_state_dict(saved["optimizer"])
    resumed.step = steps // 2
    resumed.train(steps // 2)
    for a, b in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), "a resumed run must be the run that never stopped, bit for bit"
    print("ok: resumed and uninterrupted weights are equal bit for bit")


if __name__ == "__main__":
    main()
