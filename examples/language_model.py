"""A small character language model and its batches: what the demo and `make evidence` train."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LENGTH = 64  # characters that the model sees
BATCH = 32


class Block(nn.Module):
    """Attention to the characters before, then a layer for each character."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(b, t, width))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class LanguageModel(nn.Module):
    """A decoder over characters."""

    def __init__(self, characters: int, width: int = 64, layers: int = 2, heads: int = 4):
        super().__init__()
        self.characters, self.places = nn.Embedding(characters, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters, bias=False)
        for table in (self.characters, self.places):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        return self.head(self.norm(self.blocks(self.characters(x) + self.places(places))))


def build(characters: int, seed: int) -> LanguageModel:
    """A model whose first weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LanguageModel(characters)


class Corpus:
    """The text as numbers: the last tenth is held out."""

    def __init__(self, text: str):
        self.alphabet = sorted(set(text))
        number = {character: n for n, character in enumerate(self.alphabet)}
        codes = torch.tensor([number[character] for character in text])
        cut = len(codes) * 9 // 10
        self.train, self.held_out = codes[:cut], codes[cut:]

    def batches(self, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Random windows of the training text: the same for the same seed, whoever trains."""
        generator = torch.Generator().manual_seed(seed)
        window = torch.arange(LENGTH + 1)
        for _ in range(steps):
            starts = torch.randint(len(self.train) - LENGTH, (BATCH, 1), generator=generator)
            rows = self.train[starts + window]
            yield rows[:, :-1], rows[:, 1:]

    def held_out_loss(self, model: nn.Module, windows: int = 256) -> float:
        """Mean loss in nats a character on evenly spaced windows of the held-out text."""
        step = (len(self.held_out) - LENGTH - 1) // windows
        rows = self.held_out[torch.arange(windows)[:, None] * step + torch.arange(LENGTH + 1)]
        with torch.no_grad():
            return float(cross_entropy(model(rows[:, :-1]), rows[:, 1:]))

    def pair_loss(self) -> float:
        """What counting pairs of characters reaches on the held-out text: a mark to read the losses against."""
        n = len(self.alphabet)
        counts = torch.bincount(self.train[:-1] * n + self.train[1:], minlength=n * n).view(n, n).double() + 0.01
        loss = -(counts / counts.sum(1, keepdim=True)).log()
        return float(loss[self.held_out[:-1], self.held_out[1:]].mean())


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over all characters."""
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def warmup(steps: int) -> int:
    """Steps until lr is there: a twentieth of the run."""
    return max(1, steps // 20)


def schedule(steps: int) -> Callable[[int], float]:
    """The factor on lr at a step: up over the warm-up, then down along a cosine to a tenth."""
    return lambda n: min((n + 1) / warmup(steps), 0.55 + 0.45 * math.cos(math.pi * n / steps))


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    corpus: Corpus,
    steps: int,
    seed: int,
    disturb: Callable[[int], None] = lambda step: None,
) -> Iterator[float]:
    """Step by step: yields each one's loss. `disturb` is called with its number, from 1, between gradients and step."""
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(steps))
    for n, (x, y) in enumerate(corpus.batches(steps, seed), 1):
        loss = cross_entropy(model(x), y)
        loss.backward()
        disturb(n)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        yield loss.item()


def write(model: LanguageModel, corpus: Corpus, start: str, length: int, seed: int) -> str:
    """`start`, gone on with by the model."""
    generator = torch.Generator().manual_seed(seed)
    codes = [corpus.alphabet.index(character) for character in start]
    with torch.no_grad():
        for _ in range(length):
            logits = model(torch.tensor([codes[-LENGTH:]]))[0, -1]
            codes.append(int(torch.multinomial(logits.softmax(0), 1, generator=generator)))
    return "".join(corpus.alphabet[code] for code in codes)
