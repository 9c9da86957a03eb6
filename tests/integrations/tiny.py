"""A model, data and arguments for transformers' Trainer: nothing is downloaded, and a step takes milliseconds."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, TrainingArguments

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
