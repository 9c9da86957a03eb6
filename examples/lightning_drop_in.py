"""A Lightning script in which one line is new: the optimizer, or a callback; half a minute.

    python examples/lightning_drop_in.py [--epochs 100]

Needs the package lightning: pip install 'gradkit[lightning]'.
"""

import argparse
import csv
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from swap_optimizer import spirals
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import gradkit
from gradkit.integrations.lightning import GradientTransforms, OptimizerMonitor
from gradkit.transforms import zclip

POINTS, BATCH = 1000, 250
Make = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class Net(pl.LightningModule):
    """The module you have already."""

    def __init__(self, make: Make) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
        self.make = make

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, label = batch
        return nn.functional.cross_entropy(self.layers(x), label)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make(self.parameters())

    def accuracy(self) -> float:
        x, label = spirals(POINTS)
        return (self.layers(x).argmax(1) == label).float().mean().item()


def adamw(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The line before."""
    return torch.optim.AdamW(params, lr=1e-2, weight_decay=1e-2)


def lion(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The line after: lr 3 to 10 times smaller than AdamW's, and weight_decay as much larger."""
    return gradkit.Lion(params, lr=3e-3, weight_decay=5e-2)


def train(net: Net, epochs: int, folder: str, ckpt_path: Any = None, **options: Any) -> pl.Trainer:
    """The Trainer you have already; here it says little."""
    trainer = pl.Trainer(
        **{"logger": False, **options},
        max_epochs=epochs,
        accelerator="cpu",
        default_root_dir=folder,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(net, DataLoader(TensorDataset(*spirals(POINTS)), BATCH), ckpt_path=ckpt_path)
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=100, help="of four batches (100)")
    epochs = parser.parse_args().epochs
    if epochs < 2:
        parser.error(f"--epochs {epochs}: at least 2")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "The 'train_dataloader' does not have many workers")
    with tempfile.TemporaryDirectory() as folder:
        before = Net(adamw)
        train(before, epochs, folder)
        print(f"torch's AdamW                      accuracy {before.accuracy():.1%}")

        clipped = Net(adamw)
        train(clipped, epochs, folder, callbacks=[GradientTransforms(zclip(warmup_steps=10))])  # one line: a callback
        print(f"torch's AdamW behind zclip         accuracy {clipped.accuracy():.1%}")

        straight, logger = Net(lion), CSVLogger(folder)  # one line: the optimizer
        train(straight, epochs, folder, logger=logger, callbacks=[OptimizerMonitor(every=epochs)])
        print(f"gradkit.Lion                       accuracy {straight.accuracy():.1%}")
        with open(Path(logger.log_dir, "metrics.csv")) as file:
            for row in csv.DictReader(file):
                move = float(row["Lion/update_to_weight"])
                print(f"  batch {int(row['step']) + 1:>4}: a step moves the weights by {move:.2%} of their norm")

        path = Path(folder, "half.ckpt")
        train(Net(lion), epochs // 2, folder).save_checkpoint(path)
        resumed = Net(lion)
        train(resumed, epochs, folder, ckpt_path=path)
        for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
            assert torch.equal(a, b), "a resumed run must be the run that never stopped, bit for bit"
        print("ok: resumed and uninterrupted weights are equal bit for bit")


if __name__ == "__main__":
    main()
