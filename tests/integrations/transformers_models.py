"""A model, data and arguments for transformers' Trainer: nothing is downloaded, and a step takes milliseconds."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Trainer, TrainingArguments

import gradkit

VOCABULARY, LENGTH = 32, 8


def language_model(**config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": LENGTH}
    return LlamaForCausalLM(
        LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, **config)
    )


def sentences(count: int = 32) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    start = torch.randint(VOCABULARY, (count, 1), generator=generator)
    tokens = (start + torch.arange(LENGTH) * 3) % VOCABULARY
    return [{"input_ids": row, "labels": row} for row in tokens]


def arguments(folder: Path, **given: Any) -> TrainingArguments:
    usual = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_steps": 2}
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
    return TrainingArguments(str(folder), **{**usual, **quiet, **given})


class TwoLosses(Trainer):
    """The page's: the next token, and the one after it."""

    def __init__(self, *args: Any, method: Any, **given: Any) -> None:
        super().__init__(*args, **given)
        self.method, self.seen = method, []

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        inputs = self._prepare_inputs(inputs)
        self.seen.append(inputs)
        with self.compute_loss_context_manager():
            losses = [loss / self.args.gradient_accumulation_steps for loss in two_losses(model, inputs)]
        gradkit.backward(losses, self.optimizer, self.method, scaler=self.accelerator.scaler)
        return sum(losses).detach()


def two_losses(model: nn.Module, inputs: Any) -> list[Tensor]:
    logits, labels = model(input_ids=inputs["input_ids"]).logits, inputs["labels"]
    return [F.cross_entropy(logits[:, :-k].flatten(0, 1).float(), labels[:, k:].flatten()) for k in (1, 2)]


@torch.no_grad()
def assert_same_way(left: nn.Module, right: nn.Module, bound: float = 1e-2) -> None:
    """From the untrained model; an entry whose gradient is nearly 0 may go either way under Adam, few do."""
    starts = dict(language_model().named_parameters())
    far = torch.cat([(p - starts[name]).flatten() for name, p in left.named_parameters()]).norm()
    apart = torch.cat([(p - right.get_parameter(name)).flatten() for name, p in left.named_parameters()]).norm()
    assert far > 0.01
    assert apart < bound * far, (float(apart), float(far))
