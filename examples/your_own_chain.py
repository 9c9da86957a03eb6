"""A chain: clip, filter, an own rule and a mask, on bfloat16 weights that train, because they are written back with
stochastic rounding.

    python examples/your_own_chain.py
"""

import torch
from torch import Tensor, nn

import gradkit
from gradkit import Stage
from gradkit.ops import lerp, sign
from gradkit.transforms import cautious, clip_by_global_norm, grokfast_ema

STEPS = 400


@gradkit.rule(slots=("exp_avg",), stage=Stage.PRECONDITION)
def sign_of_momentum(u, exp_avg, w):
    """Every weight moves by lr, in the direction that its averaged gradient has."""
    exp_avg = lerp(exp_avg, u, w)
    return sign(exp_avg), exp_avg


@gradkit.derive()
def weight_of_the_new(beta):
    return {"w": 1 - beta}


def links():
    """One pass over memory, however many links there are, plus one that only reads for each sum that a link needs."""
    return gradkit.chain(
        # First, while u is still the raw gradient. The norm is that of all parameters together: pass 1 of explain().
        clip_by_global_norm(1.0),
        # Adds a slow average of the gradient, which strengthens what stays the same from step to step. Behind the clip:
        # before it, one spike would enter the average unclipped.
        grokfast_ema(alpha=0.9, lamb=1.0),
        gradkit.chain(sign_of_momentum, derive=weight_of_the_new, name="sign_of_momentum", beta=0.9),
        # Last, on the finished direction: where it points against the gradient of this step, nothing moves, and the
        # rest moves more for it (by the share that agrees: pass 2). A chain in another order is refused when it is
        # made, since each link says on what it works (its stage).
        cautious(),
    )


def data() -> tuple[Tensor, Tensor]:
    """A regression with noise, the same for all runs."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 16, generator=generator)
    y = (x[:, :1] * x[:, 1:2]).tanh() + x[:, 2:3].sin()
    return x, y + 0.05 * torch.randn(y.shape, generator=generator)


def train(dtype: torch.dtype, rounding: str) -> tuple[float, float, gradkit.Optimizer]:
    """Mean loss of the last 20 steps, share of weights that the last step moved, and the optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 1)).to(dtype)
    # The slots and the arithmetic are float32 in each case; only the weights' own storage is `dtype`.
    optimizer = gradkit.Optimizer(model.parameters(), links(), lr=3e-4, weight_decay=0.0, rounding=rounding, seed=0)
    x, y = data()
    losses = []
    for _ in range(STEPS):
        loss = nn.functional.mse_loss(model(x.to(dtype)).float(), y)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
    moved = sum((p != b).sum().item() for p, b in zip(model.parameters(), before, strict=True))
    return sum(losses[-20:]) / 20, moved / sum(b.numel() for b in before), optimizer


def main() -> None:
    # bfloat16 keeps 8 bits of a number: next to 0.2 the numbers lie 0.001 apart, and a move of 3e-4 rounded to nearest
    # is no move at all. Rounded up or down at random, in proportion to what is lost, it is right on average.
    full, moved_full, _ = train(torch.float32, "nearest")
    nearest, moved_nearest, _ = train(torch.bfloat16, "nearest")
    stochastic, moved_stochastic, optimizer = train(torch.bfloat16, "stochastic")
    print(optimizer.explain())
    print(f"\nweights   written back   loss after {STEPS} steps   weights moved by the last step")
    print(f"float32   nearest        {full:<22.4f} {moved_full:.0%}")
    print(f"bfloat16  nearest        {nearest:<22.4f} {moved_nearest:.0%}")
    print(f"bfloat16  stochastic     {stochastic:<22.4f} {moved_stochastic:.0%}")

    # A link's arguments stand in the groups under its name: a scheduler or you can change them, a checkpoint has them.
    optimizer.param_groups[0]["clip_by_global_norm.max_norm"] = 0.5
    again = train(torch.bfloat16, "stochastic")[0]
    assert again == stochastic, "the random bits come from the seed, the step and the element: runs repeat exactly"
    assert stochastic < nearest and stochastic - full < 0.5 * (nearest - full), (full, nearest, stochastic)
    print("\nok: stochastic write-back kept most of what rounding to nearest lost")


if __name__ == "__main__":
    main()
