"""Modules as users write them, with torch's optimizer and with ours; their data, and a Trainer that says little."""

from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

import gradkit
from gradkit.integrations.lightning import GradientTransforms, MultiLoss
from gradkit.multiloss import PCGrad
from gradkit.transforms import clip_by_global_norm, grokfast_ema

BATCHES, ROWS = 6, 8
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "log_every_n_steps": 1,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
# Lightning's, where it would have more processes load data than these few rows need; and its own about torch's pytree.
FEW_WORKERS = "ignore:The 'train_dataloader' does not have many workers"
OWN_PYTREE = "ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated"


def data(rows: int = BATCHES * ROWS) -> DataLoader:
    """Batches of eight, always in the same order; the last three labels don't count."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 4, generator=generator)
    y = torch.randint(3, (rows,), generator=generator)
    y[-3:] = -100
    return DataLoader(TensorDataset(x, y), ROWS)


def fit(module: LightningModule, loader: Any = None, ckpt_path: Any = None, **options: Any) -> pl.Trainer:
    """One epoch, unless options say otherwise."""
    trainer = pl.Trainer(**{**QUIET, "max_epochs": 1, **options})
    trainer.fit(module, data() if loader is None else loader, ckpt_path=ckpt_path)
    return trainer


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


class TorchAutomatic(LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = net()

    def forward(self, x):
        return self.layers(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)
        return [optimizer], [{"scheduler": StepLR(optimizer, 2, 0.5), "interval": "step"}]


class Automatic(LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = net()

    def forward(self, x):
        return self.layers(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = gradkit.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)
        return [optimizer], [{"scheduler": StepLR(optimizer, 2, 0.5), "interval": "step"}]


class TorchManual(LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = net()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        x, y = batch
        self.manual_backward(F.cross_entropy(self.layers(x), y) / 2)
        if batch_idx % 2 == 1:
            self.clip_gradients(optimizer, 0.1, "norm")
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)


class Manual(LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = net()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        x, y = batch
        self.manual_backward(F.cross_entropy(self.layers(x), y) / 2)
        if batch_idx % 2 == 1:
            self.clip_gradients(optimizer, 0.1, "norm")
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self):
        return gradkit.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)


def torch_trainer():
    return pl.Trainer(
        max_epochs=1,
        callbacks=[],
        gradient_clip_val=0.1,
        **QUIET,
    )


def trainer():
    return pl.Trainer(
        max_epochs=1,
        callbacks=[GradientTransforms(grokfast_ema())],
        gradient_clip_val=0.1,
        **QUIET,
    )


class Clipping(Automatic):
    """The clip inside the step."""

    def configure_optimizers(self):
        return gradkit.AdamW(self.named_parameters(), lr=1e-2, transforms=[clip_by_global_norm(0.1)])


class Curved(Automatic):
    """With Sophia; dropout and what is drawn for estimates depend on random numbers."""

    def __init__(self, dropout: float = 0.5, **options: Any):
        super().__init__()
        self.dropout, self.options = nn.Dropout(dropout), options

    def forward(self, x):
        return self.dropout(self.layers(x))

    def configure_optimizers(self):
        return gradkit.Sophia(self.parameters(), lr=1e-2, **{"hessian_every": 2, **self.options})


class Tasks(MultiLoss, LightningModule):
    """Three tasks, whose orders matter to PCGrad."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.heads = nn.Linear(4, 6), nn.ModuleList(nn.Linear(6, 1) for _ in range(3))
        self.method = PCGrad(seed=4)

    def each(self, batch: Any) -> list[Tensor]:
        h = self.trunk(batch[0]).tanh()
        return [(head(h).sigmoid() - k / 2).square().mean() for k, head in enumerate(self.heads)]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.losses(*self.each(batch))
        self.log("train_loss", loss)
        return {"loss": loss, "trunk": self.trunk(batch[0])}  # more with a graph than the loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.5)


class ManualTasks(Tasks):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(self.losses(*self.each(batch)) / 2)
        if batch_idx % 2:
            optimizer.step()
            optimizer.zero_grad()
