"""What `gradkit.backward` costs beside plain backwards and TorchJD: `python -m bench.losses [--quick]`.

A trunk with a head for each task, as of a Transformer's feed-forward layers; forward not counted. The bar: one backward
for each task and a tenth, and a trunk of gradients for each task and 16 MiB. Prints a table, medians of 25 rounds;
what is beside a backward of each is the median of the rounds' own ratios. Needs torchjd.
"""

import argparse
from collections.abc import Callable
from statistics import median

import torch
import torchjd
from torch import Tensor, nn

import gradkit
from gradkit.multiloss import CAGrad, PCGrad

from .devices import Cpu
from .protocol import Contender, race

ROUNDS = 25
Outputs = tuple[Tensor, list[Tensor]]


class Net(nn.Module):
    """Most of the parameters are in the trunk."""

    def __init__(self, width: int, layers: int, tasks: int):
        super().__init__()
        self.trunk = nn.Sequential(
            *(nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width)) for _ in range(layers))
        )
        self.heads = nn.ModuleList(nn.Linear(width, 10) for _ in range(tasks))

    def forward(self, x: Tensor) -> Outputs:
        shared = self.trunk(x)
        return shared, [(head(shared) - k).square().mean() for k, head in enumerate(self.heads)]


def ways(net: Net) -> dict[str, Callable[[Outputs], object]]:
    params = list(net.parameters())

    def alone(outputs: Outputs) -> object:
        return [
            torch.autograd.grad(loss, params, retain_graph=loss is not outputs[1][-1], allow_unused=True)
            for loss in outputs[1]
        ]

    def torchjds(aggregator: str) -> Callable[[Outputs], object]:
        make = getattr(torchjd.aggregation, aggregator)
        aggregate = make(0.5) if aggregator == "CAGrad" else make()

        def run(outputs: Outputs) -> None:
            torchjd.autojac.mtl_backward(outputs[1], features=outputs[0])
            torchjd.autojac.jac_to_grad(list(net.trunk.parameters()), aggregate)

        return run

    pcgrad, cagrad = PCGrad(), CAGrad()
    return {
        "a backward of the sum": lambda outputs: sum(outputs[1]).backward(),
        "a backward of each": alone,
        "gradkit PCGrad": lambda outputs: gradkit.backward(outputs[1], params, pcgrad),
        "gradkit CAGrad": lambda outputs: gradkit.backward(outputs[1], params, cagrad),
        "torchjd PCGrad": torchjds("PCGrad"),
        "torchjd CAGrad": torchjds("CAGrad"),
    }


def contender(net: Net, x: Tensor, run: Callable[[Outputs], object]) -> Contender:
    held: list[Outputs] = []

    def prepare() -> None:
        net.zero_grad()
        held[:] = [net(x)]

    return Contender(lambda: run(held.pop()), prepare)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model: shows that it runs")
    quick = parser.parse_args().quick
    width, layers, rows = (64, 2, 8) if quick else (1024, 8, 256)
    for tasks in (2, 3):
        torch.manual_seed(0)
        net, x = Net(width, layers, tasks), torch.randn(rows, width)
        trunk = sum(p.numel() for p in net.trunk.parameters())
        contenders = {name: contender(net, x, run) for name, run in ways(net).items()}
        times = race(contenders, 1 if quick else ROUNDS, Cpu().seconds)
        each, mib = times["a backward of each"], 4 * trunk / 2**20
        print(f"\n{tasks} tasks, trunk of {trunk:,} parameters ({mib:.0f} MiB), batch of {rows}")
        print(f"{'':<24} {'ms':>8} {'of a backward of each':>22} {'MiB':>7} {'trunks of gradients':>20}")
        for name, c in contenders.items():
            ratio = median(x / y for x, y in zip(times[name], each, strict=True))
            ms, extra = 1e3 * median(times[name]), Cpu().extra_memory(c) or float("nan")
            print(f"{name:<24} {ms:>8.1f} {ratio:>22.2f} {extra:>7.0f} {extra / mib:>20.2f}")


if __name__ == "__main__":
    main()
