"""The parameters' shapes of real models, in the models' order."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

Tensors = Sequence[tuple[int, ...]]


class Shape(NamedTuple):
    """A model as an optimizer sees it, and how many rounds are timed on it."""

    key: str
    title: str
    tensors: Tensors
    rounds: int

    @property
    def elements(self) -> int:
        total = 0
        for tensor in self.tensors:
            n = 1
            for size in tensor:
                n *= size
            total += n
        return total


# He et al. 2015, as in torchvision: (blocks, width) of each stage; a block ends at four times its width
RESNET50_STAGES = ((3, 64), (4, 128), (6, 256), (3, 512))
# Radford et al. 2019, the smallest: the head is tied to the first tensor
GPT2_LAYERS, GPT2_WIDTH, GPT2_WORDS, GPT2_POSITIONS = 12, 768, 50257, 1024
# Llama 3.2 1B, as in its config.json: the head is tied to the first tensor
LLAMA_LAYERS, LLAMA_WIDTH, LLAMA_WORDS, LLAMA_HIDDEN, LLAMA_KEYS = 16, 2048, 128256, 8192, 512


def resnet50() -> Iterator[tuple[int, ...]]:
    """Convolutions, each with the scale and shift of its batch norm, and the classifier."""

    def with_norm(*convolution: int) -> Iterator[tuple[int, ...]]:
        yield from (convolution, convolution[:1], convolution[:1])

    yield from with_norm(64, 3, 7, 7)
    before = 64
    for blocks, width in RESNET50_STAGES:
        for block in range(blocks):
            yield from with_norm(width, before, 1, 1)
            yield from with_norm(width, width, 3, 3)
            yield from with_norm(4 * width, width, 1, 1)
            if block == 0:
                yield from with_norm(4 * width, before, 1, 1)
            before = 4 * width
    yield from ((1000, before), (1000,))


def gpt2() -> Iterator[tuple[int, ...]]:
    """Embeddings, layers, the last norm."""
    w = GPT2_WIDTH
    yield from ((GPT2_WORDS, w), (GPT2_POSITIONS, w))
    for _ in range(GPT2_LAYERS):
        yield from ((w,), (w,), (w, 3 * w), (3 * w,), (w, w), (w,))
        yield from ((w,), (w,), (w, 4 * w), (4 * w,), (4 * w, w), (w,))
    yield from ((w,), (w,))


def llama() -> Iterator[tuple[int, ...]]:
    """Embedding, layers, the last norm; a layer's eight key and value heads are shared by its 32 query heads."""
    w, hidden, keys = LLAMA_WIDTH, LLAMA_HIDDEN, LLAMA_KEYS
    yield (LLAMA_WORDS, w)
    for _ in range(LLAMA_LAYERS):
        yield from ((w, w), (keys, w), (keys, w), (w, w))
        yield from ((hidden, w), (hidden, w), (w, hidden))
        yield from ((w,), (w,))
    yield (w,)


RESNET50 = Shape("resnet50", "ResNet-50", tuple(resnet50()), 15)
GPT2 = Shape("gpt2", "GPT-2", tuple(gpt2()), 9)
MLP = Shape("mlp", "MLP", ((100, 89), (100,), (10, 100), (10,)), 300)
HOST = Shape("host", "300 tensors of one element", ((1, 1),) * 300, 300)
FULL = (RESNET50, GPT2, MLP, HOST)
LLAMA = Shape("llama", "Llama 1B", tuple(llama()), 15)
RACED = (RESNET50, GPT2, LLAMA)  # those that are timed beside fused AdamW and a copy
ON_GPU = (RESNET50._replace(rounds=51), GPT2._replace(rounds=31), LLAMA, HOST)

SMALL = ((40, 30), (30,), (7, 5, 3), (1,))


def quick(shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
    """The same parts on next to nothing."""
    return tuple(s._replace(tensors=SMALL if s.key != "host" else ((1, 1),) * 3, rounds=3) for s in shapes)
