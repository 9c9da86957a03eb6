"""What the compiler makes of each kernel for GPUs that needn't be here: registers, bytes, widths of the fast path.

`python -m tests.triton.gate` prints the table of docs/kernels.md.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import gradkit
from gradkit import chain
from gradkit.explain import moved
from gradkit.plan import Batch, Pass
from gradkit.transforms import cautious, clip_by_global_norm, clip_by_norm, grokfast_ema
from gradkit.triton_kernels import launch, load, source

NVIDIA = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TYPES = {"blocks": "*i32", "measured": "*fp32", "partials": "*fp64", "counters": "*i32"}
NUMBERS = {"T": "i32", "base": "i32", "O": "i32"}
BYTES = {"f32": 4, "bf16": 2, "f16": 2}

BF16 = torch.bfloat16
CLIP = {"transforms": [clip_by_global_norm(1.0)]}
FIVE = {"transforms": [clip_by_norm(1.0), grokfast_ema(), cautious()], "decay": "cautious", "weight_decay": 0.1}
# each optimizer as users run it; of those with transforms every pass is a row
CHAINS: dict[str, tuple[type, torch.dtype, dict[str, Any]]] = {
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
    "own chain of five links": (gradkit.AdamW, torch.float32, FIVE),
}


class Row(NamedTuple):
    """A kernel on one target: what it holds, and what the loop over full tiles does for an element."""

    registers: int
    spilled: int
    read: float
    written: float
    conversions: int  # between layouts: a trip through shared memory
    wide: int  # accesses of 4 elements at once
    accesses: int


def batch_of(name: str) -> Batch:
    cls, dtype, options = CHAINS[name]
    p = torch.nn.Parameter(torch.zeros(4, dtype=dtype))
    p.grad = torch.zeros_like(p)
    (batch,) = cls([p], **options).batches([p], [True])
    return batch


def build(batch: Batch, ps: Pass, target: GPUTarget) -> Any:
    made = (source.measure if ps.measure else source.apply)(batch.kind, ps)
    run = load.kernel(made.text, **made.rules)
    cut = launch.SHAPES[target.backend]
    options = launch.options(cut, cut.reduce if ps.measure else cut.apply)
    constants = {name: options.pop(name) for name in ("CHUNK", "TILE")}
    types = {p.name: {**TYPES, **NUMBERS}.get(p.name, "*i64") for p in run.params} | dict.fromkeys(constants, "constexpr")
    return triton.compile(ASTSource(run, signature=types, constexprs=constants), target=target, options=options)


def row(batch: Batch, ps: Pass, target: GPUTarget) -> Row:
    built = build(batch, ps, target)
    fast = re.search(r"scf\.(?:while|for)\b.*?scf\.yield", built.asm["ttgir"], re.S)
    assert fast, "no loop over full tiles"
    lines = fast[0].splitlines()
    loads, stores = ([x for x in lines if re.search(rf"\b(?:tt\.|buffer_){what}\b", x)] for what in ("load", "store"))
    sizes = [BYTES[re.search(r"tensor<\d+x(?:!tt\.ptr<)?(b?f\d+)", x)[1]] for x in (*loads, *stores)]  # type: ignore[index]
    assert not any(re.search(r"tt\.(?:load \S+,|store \S+, \S+,) %", x) for x in loads + stores), "a mask in the fast path"
    registers, spilled = (nvidia if target.backend == "cuda" else amd)(built.asm)
    return Row(
        registers,
        spilled,
        sum(sizes[: len(loads)]),
        sum(sizes[len(loads) :]),
        fast[0].count("convert_layout"),
        wide(built.asm, sizes),
        len(sizes),
    )


def wide(asm: Any, sizes: list[int]) -> int:
    """Accesses of four elements at once: 128 bits of float32, 64 bits of bf16."""
    forms = {4: r"\bglobal\.v4\.b32\b|\bbuffer_\w+_dwordx4\b", 2: r"\bglobal\.v2\.b32\b|\bbuffer_\w+_dwordx2\b"}
    text = asm["ptx"] if "ptx" in asm else asm["amdgcn"]
    return sum(len(re.findall(forms[size], text)) for size in set(sizes))


def nvidia(asm: Any) -> tuple[int, int]:
    """Registers of a thread, and bytes that did not fit."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(asm["cubin"])
        command = [NVIDIA / "cuobjdump", "-res-usage", file]
        used = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", used)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def amd(asm: Any) -> tuple[int, int]:
    vectors, spilled, scratch = (
        int(re.search(rf"\.{name}:?\s+(\d+)", asm["amdgcn"])[1])  # type: ignore[index]
        for name in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    )
    return vectors, spilled + scratch


def table() -> str:
    """Each pass of each chain on each target."""
    lines = [
        "| kernel | bytes read | written | " + " | ".join(f"{t}: registers" for t in TARGETS) + " | wide accesses |",
        "| --- |" + " --- |" * (len(TARGETS) + 3),
    ]
    for name in CHAINS:
        batch = batch_of(name)
        for ps in batch.program.passes:
            rows = [row(batch, ps, target) for target in TARGETS.values()]
            kernel = f"{name}: {ps.measure.label}" if ps.measure else name
            registers = " | ".join(str(r.registers) for r in rows)
            first = rows[0]
            lines.append(
                f"| {kernel} | {first.read:g} | {first.written:g} | {registers} | {first.wide} of {first.accesses} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
