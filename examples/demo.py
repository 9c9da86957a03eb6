"""Four of our optimizers and torch's AdamW train the same small language model, side by side; about two minutes.

    python examples/demo.py [--steps 1000] [--out demo.png]
"""

import argparse
from pathlib import Path
from typing import Any

import language_model
import text
import torch
from curves import Costed, Params, draw

import gradkit

SEED = 0


def entries() -> list[Costed]:
    """Each with the best of three learning rates, a factor of two apart, as tried on this text, model and length."""
    decay, betas = 0.1, (0.9, 0.99)

    def torch_adamw(params: Params, steps: int) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=1.2e-2, betas=betas, weight_decay=decay)

    def adamw(params: Params, steps: int) -> torch.optim.Optimizer:
        return gradkit.AdamW(params, lr=1.2e-2, betas=betas, weight_decay=decay)

    def ademamix(params: Params, steps: int) -> torch.optim.Optimizer:
        # A beta3 of 0.9999 averages over 10,000 steps, of which this run has a tenth: 0.99 fits its length. alpha and
        # beta3 grow to their values over the run, as in the paper.
        return gradkit.AdEMAMix(
            params, 3e-3, (*betas, 0.99), 5.0, weight_decay=decay, alpha_warmup=steps, beta3_warmup=steps
        )

    def diffgrad(params: Params, steps: int) -> torch.optim.Optimizer:
        # Its default decay is the authors' L2; decoupled as for the others here.
        return gradkit.DiffGrad(params, lr=2.4e-2, betas=betas, weight_decay=decay, decay="decoupled")

    def lion(params: Params, steps: int) -> torch.optim.Optimizer:
        # The paper's betas for language, and a larger weight_decay for its smaller lr: decay moves by their product.
        return gradkit.Lion(params, lr=5e-4, betas=(0.95, 0.98), weight_decay=3 * decay)

    return [
        Costed("torch.optim.AdamW", "lr 1.2e-2", torch_adamw, "#222222", "--"),
        Costed("AdamW", "lr 1.2e-2", adamw, "#1f77b4"),
        Costed("AdEMAMix", "lr 3e-3", ademamix, "#d62728"),
        Costed("DiffGrad", "lr 2.4e-2", diffgrad, "#2ca02c"),
        Costed("Lion", "lr 5e-4", lion, "#ff7f0e"),
    ]


def train(entry: Costed, corpus: language_model.Corpus, steps: int) -> language_model.LanguageModel:
    """The same first weights and the same batches for each entry."""
    model = language_model.build(len(corpus.alphabet), SEED)
    entry.train(model, entry.make(list(model.parameters()), steps), corpus, steps, SEED)
    return model


def tail(losses: list[float]) -> float:
    """Mean loss of the last twentieth of the run: that of one batch jumps about."""
    last = losses[-max(1, len(losses) // 20) :]
    return sum(last) / len(last)


def print_table(results: list[Costed]) -> None:
    print(f"\n{'optimizer':<18} {'settings':<10} {'train':>7} {'held out':>9} {'step, ms':>9} {'state, bytes':>13}")
    for e in results:
        print(
            f"{e.name:<18} {e.settings:<10} {tail(e.losses):>7.3f} {e.held_out[-1][1]:>9.3f} "
            f"{e.step_ms:>9.3f} {e.state_bytes:>13,}"
        )


def print_remarks(results: list[Costed], pair_loss: float) -> None:
    """What the table shows and what it doesn't."""
    end = {e.name: e.held_out[-1][1] for e in results}
    gap = {name: f"{loss - end['torch.optim.AdamW']:+.3f}" for name, loss in end.items()}
    print(
        f"""
Losses in nats a character; counting pairs of characters reaches {pair_loss:.3f}. The step is the optimizer's alone.
Each lr is the best of three tried at 1000 steps. In brackets: held-out loss less that of torch.optim.AdamW.
AdamW    ({gap["AdamW"]}) computes what torch's does; the rounding differs, and training amplifies that.
AdEMAMix ({gap["AdEMAMix"]}) adds a slow momentum; its beta3 has to fit the length of the run.
DiffGrad ({gap["DiffGrad"]}) halves the step where a gradient hardly changes. These gradients are so small that this is
         everywhere: AdamW at half the lr, so its best lr is twice as large.
Lion     ({gap["Lion"]}) is made for large batches: its paper finds 4096 best for it, 256 for AdamW. At
         {language_model.BATCH}, as here, it loses to AdamW. It keeps half of AdamW's state.
One seed of one small model: it shows that they run side by side, not which to use for yours."""
    )


def draw_all(results: list[Costed], pair_loss: float, out: Path) -> str:
    """The loss curves, and what counting pairs reaches; returns what to tell the user."""

    def mark(axes: Any) -> None:
        axes.axhline(pair_loss, color="#999999", linewidth=1, linestyle=":")
        place = {"color": "#777777", "ha": "right", "va": "bottom", "fontsize": 9}
        axes.text(len(results[0].losses), pair_loss, "counting pairs of characters", **place)

    title = "A small character language model: same weights, batches, schedule and steps for each optimizer"
    return draw(results, title, out, mark)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000, help="training steps for each optimizer (1000)")
    parser.add_argument("--out", type=Path, default=Path("demo.png"), help="where the picture goes (demo.png)")
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"--steps {options.steps}: at least 1")
    corpus, results = language_model.Corpus(text.load()), entries()
    for entry in results:
        model = train(entry, corpus, options.steps)
        if entry.name == "AdEMAMix":
            sample = language_model.write(model, corpus, "The ", 150, SEED)
    print_table(results)
    print_remarks(results, corpus.pair_loss())
    print(f"\nThe model that AdEMAMix trained writes:\n  {' '.join(sample.split())}\n")
    print(draw_all(results, corpus.pair_loss(), options.out))


if __name__ == "__main__":
    main()
