"""transformers' Trainer with its optimizer exchanged, watched, stopped half-way and resumed; about a minute.

    python examples/transformers_trainer.py [--steps 300]

Needs `pip install 'gradkit[transformers]'`. The model is made from a configuration: nothing is downloaded.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import text
import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PrinterCallback, Trainer, TrainingArguments
from transformers.utils.logging import disable_progress_bar

import gradkit
from gradkit.integrations.transformers import OptimizerMonitor, SophiaHessian

LENGTH, HELD_OUT = 64, 20_000


class Windows(Dataset):
    """Pieces of a text, a character a token."""

    def __init__(self, characters: str, alphabet: str) -> None:
        numbers = {c: i for i, c in enumerate(alphabet)}
        self.tokens = torch.tensor([numbers[c] for c in characters])

    def __len__(self) -> int:
        return len(self.tokens) // LENGTH

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        piece = self.tokens[i * LENGTH : (i + 1) * LENGTH]
        return {"input_ids": piece, "labels": piece}


def build(vocabulary: int) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": vocabulary, "hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": LENGTH}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads))


# The argument of Trainer that changes, and callbacks. Lion and Sophia move each weight by about lr a step, whatever its
# gradient's size: they want an lr several times smaller than AdamW's. Trainer gives the class groups of its own, by
# what decays; SCALE's go by role, so it brings them along.
WAYS: dict[str, Any] = {
    "torch.optim.AdamW": lambda model: ((torch.optim.AdamW, {"lr": 4e-3}), []),
    "AdamW": lambda model: ((gradkit.AdamW, {"lr": 4e-3}), []),
    "AdEMAMix": lambda model: ((gradkit.AdEMAMix, {"lr": 4e-3}), []),
    "Lion": lambda model: ((gradkit.Lion, {"lr": 1e-3}), []),
    "Sophia": lambda model: ((gradkit.Sophia, {"lr": 1e-3}), [SophiaHessian()]),
    "SCALE": lambda model: ((gradkit.SCALE, {"lr": 4e-3, "params": gradkit.param_groups(model)}), []),
}


def trainer(way: str, steps: int, folder: Path) -> Trainer:
    characters = text.load()
    alphabet = "".join(sorted(set(characters)))
    seen, held_out = (Windows(part, alphabet) for part in (characters[:-HELD_OUT], characters[-HELD_OUT:]))
    model = build(len(alphabet))
    chosen, callbacks = WAYS[way](model)
    if chosen[0] is not torch.optim.AdamW:
        callbacks.append(OptimizerMonitor(every=max(1, steps // 2)))
    args = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=64,
        weight_decay=0.1,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 10,
        save_strategy="steps",
        save_steps=steps // 2,
        logging_strategy="no",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    sets = {"train_dataset": seen, "eval_dataset": held_out}
    made = Trainer(model, args, **sets, optimizer_cls_and_kwargs=chosen, callbacks=callbacks)
    made.remove_callback(PrinterCallback)  # the table is what is to be read
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description="One Trainer, several optimizers.")
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        finished = {}
        print("optimizer           held-out loss   update / weight, a step")
        for way in WAYS:
            finished[way] = run = trainer(way, steps, Path(name, way))
            run.train()
            loss = run.evaluate()["eval_loss"]
            ratio = [row[key] for row in run.state.log_history for key in row if key.endswith("/update_to_weight")]
            print(f"{way:20}{loss:13.4f}   {' -> '.join(f'{x:.1e}' for x in ratio) or '-'}", flush=True)

        for way in ("AdEMAMix", "Sophia"):  # schedules and estimates, too, go on where they were
            resumed = trainer(way, steps, Path(name, way))
            resumed.train(resume_from_checkpoint=str(Path(name, way, f"checkpoint-{steps // 2}")))
            for a, b in zip(finished[way].model.parameters(), resumed.model.parameters(), strict=True):
                assert torch.equal(a, b), "a resumed run must be the run that never stopped, bit for bit"
    print(f"ok: stopped at step {steps // 2} and resumed, AdEMAMix and Sophia end in the same weights bit for bit")


if __name__ == "__main__":
    main()
