"""An optimizer from a rule of three lines: how to write it, read its plan, and watch one parameter's update.

    python examples/your_own_rule.py
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

import gradkit
from gradkit import Stage
from gradkit.ops import absolute, lerp


# Adam with the mean of |gradient| in place of the root of the mean square: no square root, and one large gradient
# stretches the denominator in proportion instead of staying in it squared.
#
# A rule says what happens to one element. `u` is what flows in (here the gradient) and, returned, what flows on; the
# slots are its memory; every other name is a number. It is checked when this decorator runs, and from these three lines
# come the plain torch version, the C loop, and later the GPU kernel: there is no second version to keep in step.
@gradkit.rule(slots=("exp_avg", "exp_abs"), stage=Stage.PRECONDITION)
def mean_absolute(u, exp_avg, exp_abs, w1, w2, unbias1, unbias2, eps):
    exp_avg = lerp(exp_avg, u, w1)
    exp_abs = lerp(exp_abs, absolute(u), w2)
    return exp_avg * unbias1 / (exp_abs * unbias2 + eps), exp_avg, exp_abs


# Arithmetic among numbers runs once a step, on the host in float64, not once an element. "step" is a counter: it is
# kept in the state for each parameter, so that one which gets its first gradient late is corrected from its own start.
@gradkit.derive("step")
def numbers(betas, eps, step):
    return {
        "w1": 1 - betas[0],
        "w2": 1 - betas[1],
        "unbias1": 1 / (1 - betas[0] ** step),
        "unbias2": 1 / (1 - betas[1] ** step),
        "eps": eps,
    }


def optimizer_for(params: Iterable[Tensor], lr: float) -> gradkit.Optimizer:
    """The write, weight decay, checkpoints and backends come from Optimizer."""
    # Named, so that the arguments stand in the groups ("mean_absolute.betas"): editable, scheduled, saved.
    own = gradkit.chain(mean_absolute, derive=numbers, name="mean_absolute", betas=(0.9, 0.99), eps=1e-8)
    return gradkit.Optimizer(params, own, lr=lr, weight_decay=1e-2)


def task() -> tuple[nn.Module, Tensor, Tensor]:
    """A regression that a small network can learn."""
    torch.manual_seed(0)
    x = torch.randn(512, 8)
    y = (x[:, :1] * x[:, 1:2]).tanh() + x[:, 2:3].sin()
    return nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 1)), x, y


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, steps: int = 400) -> float:
    """Plain full-batch training."""
    for _ in range(steps):
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def main() -> None:
    model, x, y = task()
    optimizer = optimizer_for(model.parameters(), lr=1e-2)
    first = nn.functional.mse_loss(model(x), y).item()
    last = train(model, optimizer, x, y)
    print(f"loss {first:.4f} -> {last:.6f} after 400 steps", end="   ")
    other, x, y = task()
    print(f"(torch.optim.AdamW: {train(other, torch.optim.AdamW(other.parameters(), lr=1e-2), x, y):.6f})\n")

    # What runs: the links in order, the passes over memory and what each moves, and on which backend and why.
    print(optimizer.explain())

    # What one parameter would do next, after each link, on copies: nothing has moved when this returns.
    nn.functional.mse_loss(model(x), y).backward()
    weight = next(model.parameters())
    before, gradient = weight.detach().clone(), torch.as_tensor(weight.grad)
    print("\ntrace of the first weight, its first three elements:")
    print(f"  {'gradient':<16}", *(f"{v:+.5f}" for v in gradient.flatten()[:3].tolist()))
    trace = dict(optimizer.trace(weight))
    for name, value in trace.items():
        print(f"  {name:<16}", *(f"{v:+.5f}" for v in value.flatten()[:3].tolist()))

    # A rule stays a function that can be called, with tensors or numbers: a test of it needs no optimizer.
    u, exp_avg, exp_abs = mean_absolute(torch.tensor([-2.0]), 0.0, 0.0, 0.1, 0.01, 10.0, 100.0, 0.0)
    assert torch.allclose(u, torch.tensor([-1.0])), "at the first step each element moves by lr against its gradient"
    assert torch.equal(weight, before), "trace() moves nothing"
    optimizer.step()
    assert torch.allclose(weight, trace["write"]), "and the step does what the trace showed"
    assert last < 0.1 * first, (first, last)
    print("\nok: trained, and the step did what the trace showed")


if __name__ == "__main__":
    main()
