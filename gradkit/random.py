"""The counter-based generator, and rounding by it: the same bits as the C of backends/prelude.h, on any device.

Philox: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", https://doi.org/10.1145/2063384.2063405
"""

import zlib
from typing import Any

import torch
from torch import Tensor

ROUNDS = 7
WORD = 0xFFFFFFFF


def stream(name: str) -> int:
    """The number of a named stream, one half of the generator's key."""
    return zlib.crc32(name.encode())


def philox(element: Tensor, step: int, index: int, seed: int, stream: int) -> Tensor:
    """32 random bits for each element, in int64: a function of the arguments and nothing else."""
    return words(element, step, index, seed, stream)[0]


def words(element: Any, step: int, index: int, seed: int, stream: int) -> tuple[Any, ...]:
    """The same and three words more; of torch's integers or numpy's."""
    c0: Any = element & WORD  # int64 products wrap, and their 64 bits are still those of the unsigned product
    c1: Any = element >> 32 & WORD
    c2: Any = step & WORD
    c3: Any = index & WORD
    for r in range(ROUNDS):
        k0, k1 = (seed + r * 0x9E3779B9) & WORD, (stream + r * 0xBB67AE85) & WORD
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32 & WORD) ^ c1 ^ k0, b & WORD, (a >> 32 & WORD) ^ c3 ^ k1, a & WORD
    return c0, c1, c2, c3


def stochastic_round(x: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Float32 to one of the two neighbours in bfloat16 or float16, with odds by distance; inf and NaN stay."""
    u = x.view(torch.int32)
    a, bits = u & 0x7FFFFFFF, bits.to(torch.int32)  # the magnitude's bits: rounding knows no sign
    if dtype == torch.bfloat16:
        near = (a + (bits & 0xFFFF)) >> 16
        nan = 0x7FC0
    elif dtype == torch.float16:
        normal = (a - (112 << 23) + (bits & 0x1FFF)) >> 13
        tiny = a.clamp(max=0x38800000).view(torch.float32)  # below: in units of 2^-40, 16 bits under fp16's last
        subnormal = ((tiny * 2.0**40).to(torch.int32) + (bits & 0xFFFF)) >> 16
        near = torch.where(a < 0x38800000, subnormal, torch.where(a < 0x47800000, normal, 0x7C00))
        nan = 0x7E00
    else:
        raise TypeError(f"stochastic rounding to {dtype} is not known; use torch.bfloat16 or torch.float16")
    signed = torch.where(x != x, nan, near | (u >> 16 & 0x8000))
    return signed.to(torch.int16).view(dtype)
