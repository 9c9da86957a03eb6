"""An ordinary training loop with scheduler, checkpoint and resume; only the line that makes the optimizer is new.

    python examples/swap_optimizer.py
"""

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import gradkit

STEPS = 600


def spirals(points: int) -> tuple[Tensor, Tensor]:
    """Two arms of a spiral, one class each: a line can't part them."""
    t = torch.rand(points, generator=torch.Generator().manual_seed(0)).sqrt() * 3 * torch.pi
    label = torch.arange(points) % 2
    angle = t + label * torch.pi
    return torch.stack((t * angle.cos(), t * angle.sin()), 1) / 10, label


class Run:
    """All that a checkpoint has to hold."""

    def __init__(self, use_torch: bool = False) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
        params = self.model.parameters()
        self.optimizer: torch.optim.Optimizer
        if use_torch:
            self.optimizer = torch.optim.AdamW(params, lr=1e-2, weight_decay=1e-2)
        else:
            # The one line. Lion moves each weight by lr a step whatever its gradient's size, so it wants an lr 3 to 10
            # times smaller than AdamW's, and with decoupled decay (lr * weight_decay) a weight_decay as much larger.
            self.optimizer = gradkit.Lion(params, lr=3e-3, weight_decay=5e-2)
        # A scheduler of torch's: it writes the groups' lr, and the next step reads it from there.
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=STEPS)

    def train(self, steps: int, x: Tensor, y: Tensor) -> float:
        """The loop you have already."""
        for _ in range(steps):
            loss = nn.functional.cross_entropy(self.model(x), y)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
        return loss.item()

    def save(self, path: Path) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }
        torch.save(state, path)

    def load(self, path: Path) -> None:
        # weights_only: the file holds tensors and numbers alone, so a file from elsewhere can't run code here.
        saved = torch.load(path, weights_only=True)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(saved["scheduler"])


def main() -> None:
    x, y = spirals(1000)
    before = Run(use_torch=True)
    print(f"torch.optim.AdamW       loss {before.train(STEPS, x, y):.4f}")

    straight = Run()
    loss = straight.train(STEPS, x, y)
    accuracy = (straight.model(x).argmax(1) == y).float().mean().item()
    print(f"gradkit.Lion            loss {loss:.4f}   accuracy {accuracy:.1%}")

    # The same training, stopped half-way, saved, and gone on with from the file in objects made anew.
    first = Run()
    first.train(STEPS // 2, x, y)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pt"
        first.save(path)
        resumed = Run()
        resumed.load(path)
        print(f"checkpoint at step {STEPS // 2}: {path.stat().st_size / 1024:.0f} KiB, model and state")
    print(f"gradkit.Lion, resumed   loss {resumed.train(STEPS - STEPS // 2, x, y):.4f}")

    assert accuracy > 0.95, accuracy
    for a, b in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), "a resumed run must be the run that never stopped, bit for bit"
    print("ok: resumed and uninterrupted weights are equal bit for bit")


if __name__ == "__main__":
    main()
