"""A Llama's parameters at any size, and what explain() says of their state."""

import torch
from torch import Tensor, nn

import gradkit


class Block(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.o(self.q(y) * self.k(y).softmax(-1) + self.v(y))
        y = self.norm2(x)
        return x + self.down(self.gate(y).relu() * self.up(y))


class Llama(nn.Module):
    """The parameters of a Llama with an untied head; its attention is none."""

    def __init__(self, width: int, hidden: int, layers: int, words: int):
        super().__init__()
        self.embed_tokens = nn.Embedding(words, width)
        self.layers = nn.ModuleList([Block(width, hidden) for _ in range(layers)])
        self.norm = nn.RMSNorm(width)
        self.lm_head = nn.Linear(width, words, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


def small() -> Llama:
    torch.manual_seed(0)
    return Llama(8, 12, 2, 20)


def train(optimizer: torch.optim.Optimizer, model: nn.Module, steps: range) -> None:
    for t in steps:
        tokens = torch.randint(20, (3, 5), generator=torch.Generator().manual_seed(t))
        nn.functional.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def by_role(optimizer: gradkit.Optimizer) -> str:
    (line,) = [x for x in optimizer.explain().splitlines() if x.startswith("state by role: ")]
    return line.removeprefix("state by role: ")
