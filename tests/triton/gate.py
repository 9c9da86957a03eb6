"""What the compiler makes of each kernel for GPUs that needn't be here: registers, bytes, widths of the fast path.

`python tests/triton/gate.py` prints the table of docs/kernels.md.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from builds import TARGETS, Build, builds, used

import gradkit
from gradkit import chain
from gradkit.explain import expected
from gradkit.plan import Batch, Pass
from gradkit.stats import norms
from gradkit.transforms import (
    adaptive_clip,
    cautious,
    clip_by_global_norm,
    clip_by_norm,
    clip_by_value,
    grokfast_ema,
    zclip,
)

BYTES = {"f32": 4, "bf16": 2, "f16": 2}
ELEMENT = re.compile(r"tensor<\d+x(?:!tt\.ptr<)?(b?f\d+)")
MASKED = re.compile(r"(?:load [^,:]+|store [^,:]+, [^,:]+), %")

BF16 = torch.bfloat16
CLIP = {"transforms": [clip_by_global_norm(1.0)]}
FIVE = {"transforms": [clip_by_norm(1.0), grokfast_ema(), cautious()], "decay": "cautious", "weight_decay": 0.1}


def clipped(params: list[torch.nn.Parameter], **options: Any) -> Any:
    return gradkit.attach(torch.optim.SGD(params), clip_by_value(1.0))


def scale(params: list[torch.nn.Parameter], role: str) -> gradkit.Optimizer:
    return gradkit.SCALE([{"params": params, "role": role}])


def frugal(params: list[torch.nn.Parameter], **options: Any) -> gradkit.Optimizer:
    return gradkit.FRUGAL([{"params": params, "role": "matrix"}], **options)


# each optimizer as users run it; of those with transforms every pass is a row
CHAINS: dict[str, tuple[Callable[..., gradkit.Optimizer], torch.dtype, dict[str, Any]]] = {
    "AdamW": (gradkit.AdamW, torch.float32, {}),
    "AdamW bf16": (gradkit.AdamW, BF16, {}),
    "AdamW bf16, stochastic": (gradkit.AdamW, BF16, {"rounding": "stochastic"}),
    "AdamW bf16, Kahan": (gradkit.AdamW, BF16, {"rounding": "kahan"}),
    "AdamW bf16, state too": (gradkit.AdamW, BF16, {"state_dtype": BF16}),
    "AdamW fp16": (gradkit.AdamW, torch.float16, {}),
    "AdamW amsgrad": (gradkit.AdamW, torch.float32, {"amsgrad": True}),
    "AdamW, global clip": (gradkit.AdamW, torch.float32, CLIP),
    "Lion": (gradkit.Lion, torch.float32, {"weight_decay": 0.1}),
    "Lion bf16": (gradkit.Lion, BF16, {"weight_decay": 0.1}),
    "DiffGrad": (gradkit.DiffGrad, torch.float32, {}),
    "AdEMAMix": (gradkit.AdEMAMix, torch.float32, {}),
    "AdEMAMix bf16": (gradkit.AdEMAMix, BF16, {}),
    "Grokfast": (gradkit.Grokfast, torch.float32, {}),
    "Grokfast, window": (gradkit.Grokfast, torch.float32, {"filter": "ma"}),
    "AdamW, adaptive clip": (gradkit.AdamW, torch.float32, {"transforms": [adaptive_clip()]}),
    "AdamW, ZClip": (gradkit.AdamW, torch.float32, {"transforms": [zclip()]}),
    "SPAM": (gradkit.SPAM, torch.float32, {}),
    "StableSPAM": (gradkit.StableSPAM, torch.float32, {}),
    "Sophia": (gradkit.Sophia, torch.float32, {}),
    "SCALE, last layer": (scale, torch.float32, {"role": "last"}),
    "SCALE, embedding": (scale, torch.float32, {"role": "embedding"}),
    "SCALE, embedding bf16": (scale, BF16, {"role": "embedding"}),
    "FRUGAL, entries": (frugal, torch.float32, {"split": "randk"}),
    "FRUGAL, entries, bf16": (frugal, BF16, {"split": "randk"}),
    "FRUGAL, entries, stats": (frugal, torch.float32, {"split": "randk", "transforms": [chain(norms)]}),
    "attached clip by value": (clipped, torch.float32, {}),
    "attached clip by value, bf16": (clipped, BF16, {}),
    "own chain of five links": (gradkit.AdamW, torch.float32, FIVE),
}


class Row(NamedTuple):
    """A kernel on one target: what it holds, and what the loop over full tiles does for an element."""

    registers: int
    spilled: int
    read: int
    written: int
    conversions: int  # between layouts: a trip through shared memory
    wide: int  # accesses of 4 elements at once
    accesses: int
    narrow: int  # of what a split selects, element by element
    read_selected: int  # for a selected element
    written_selected: int
    approximate: int  # or flushing, or contracted instructions


def optimizer_of(name: str) -> gradkit.Optimizer:
    make, dtype, options = CHAINS[name]
    p = torch.nn.Parameter(torch.zeros(2, 2, dtype=dtype))
    p.grad = torch.zeros_like(p)
    return make([p], **options)


def passes_of(name: str, arch: str) -> Iterator[tuple[Batch, Pass, Row]]:
    optimizer = optimizer_of(name)
    (batch,) = optimizer.batches(expected(optimizer))
    for ps, build in zip(batch.program.passes, builds(optimizer, arch), strict=True):
        yield batch, ps, row(build)


def row(build: Build) -> Row:
    built = build.compile()
    fast = re.search(r"scf\.(?:while|for)\b.*?scf\.yield", built.asm["ttgir"], re.S)  # the first loop
    assert fast, "no loop over full tiles"
    loads, stores = (re.findall(rf"^.*\b(?:tt\.|buffer_){what}\b.*", fast[0], re.M) for what in ("load", "store"))
    (read, read_selected), (written, written_selected) = sizes(loads), sizes(stores)
    registers, spilled = (nvidia if build.target.backend == "cuda" else amd)(built)
    whole, selected = [*read, *written], [*read_selected, *written_selected]
    return Row(
        registers,
        spilled,
        sum(read),
        sum(written),
        fast[0].count("convert_layout"),
        min(wide(built.asm, set(whole)), len(whole)),  # words of a box's item may be read together too
        len(whole) + len(selected),
        len(selected),
        sum(read_selected),
        sum(written_selected),
        len(re.findall(r"\S*(?:approx|\.full|\.ftz|\bfma)\S*", built.asm.get("ptx", ""))),
    )


def sizes(accesses: list[str]) -> tuple[list[int], list[int]]:
    """Bytes of an element in each, of those of whole tiles and of those under a mask."""
    found = [(bool(MASKED.search(line)), BYTES[x]) for line in accesses for x in ELEMENT.findall(line)]
    return [size for masked, size in found if not masked], [size for masked, size in found if masked]


def wide(asm: Any, sizes: set[int]) -> int:
    """Accesses of four elements at once: 128 bits of float32, 64 bits of bf16."""
    amd = r"\b(?:buffer|global)_\w+_dwordx"
    forms = {4: rf"\bglobal\.v4\.b32\b|{amd}4\b", 2: rf"\bglobal\.v2\.b32\b|{amd}2\b"}
    text = asm["ptx"] if "ptx" in asm else asm["amdgcn"]
    return sum(len(re.findall(forms[size], text)) for size in sizes)


def nvidia(built: Any) -> tuple[int, int]:
    """Registers of a thread, and bytes that did not fit."""
    found = used(built)
    return found["REG"], found["STACK"] + found["LOCAL"]


def amd(built: Any) -> tuple[int, int]:
    text = built.asm["amdgcn"]
    names = ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    vectors, *lost = (int(n) for name in names for n in re.findall(rf"^\s+\.{name}:\s+(\d+)", text, re.M))
    return vectors, sum(lost)


def table() -> str:
    """Each pass of each chain on each target."""
    lines = [
        "| kernel | bytes read | written | wide accesses | " + " | ".join(f"{t}: registers" for t in TARGETS) + " |",
        "| --- |" + " --- |" * (len(TARGETS) + 3),
    ]
    for name in CHAINS:
        for each in zip(*(passes_of(name, arch) for arch in TARGETS), strict=True):
            (_, ps, first), registers = each[0], [str(found.registers) for _, _, found in each]
            kernel = f"{name}: {ps.measure.link.name}" if ps.measure else name
            moved = [f"{a} + {b}s" if b else a for a, b in zip(first[2:4], first[8:10], strict=True)]
            cells = [kernel, *moved, f"{first.wide} of {first.accesses}", *registers]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
