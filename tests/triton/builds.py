"""The kernels of an optimizer compiled for a GPU that is not here, and what their code says."""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gradkit.explain import expected
from gradkit.triton_kernels import source
from gradkit.triton_kernels.launch import SHAPES, options
from gradkit.triton_kernels.load import kernel

TYPES = {
    **dict.fromkeys(("step", "fixed", "joint", "items"), "*i64"),
    **dict.fromkeys(("blocks", "counters"), "*i32"),
    **{"measured": "*fp32", "partials": "*fp64", "memory": "*fp64", "out": "*fp64"},
    **dict.fromkeys(("T", "O", "base"), "i32"),
    **dict.fromkeys(("CHUNK", "TILE", "WIDE"), "constexpr"),
}
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Build(NamedTuple):
    """A pass of a batch, ready to compile."""

    name: str
    source: ASTSource
    target: GPUTarget
    options: dict[str, Any]

    def compile(self) -> Any:
        return triton.compile(self.source, target=self.target, options=self.options)


def builds(optimizer: Any, arch: str) -> Iterator[Build]:
    """The kernels that a step of this optimizer launches; its parameters may be on any device, or meta."""
    for batch in optimizer.batches(expected(optimizer)):
        for ps in batch.program.passes:
            yield build(batch.kind, ps, source.measure if ps.measure else source.apply, arch)


def build(kind: Any, ps: Any, write: Any, arch: str) -> Build:
    made, target = write(kind, ps), TARGETS[arch]
    run, cut = kernel(made.text, **made.rules), SHAPES[target.backend]
    assert isinstance(run, triton.JITFunction), "the interpreter's form can't be compiled"
    given = options(cut.reduce if ps.measure else cut.apply, cut)
    constants = {n: given.pop(n) for n in ("CHUNK", "TILE", "WIDE")}
    signature = {p.name: TYPES[p.name] for p in run.params}
    return Build(write.__name__, ASTSource(run, signature=signature, constexprs=constants), target, given)


def disassembled(built: Any) -> str:
    return tool("nvdisasm", built, "-c")


def used(built: Any) -> dict[str, int]:
    """Registers and bytes of memory of one thread (NVIDIA)."""
    text = tool("cuobjdump", built, "-res-usage")
    return {k: int(v) for k, v in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", text)}


def tool(name: str, built: Any, option: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(built.asm["cubin"])
        return subprocess.run([TOOLS / name, option, file], capture_output=True, text=True, check=True).stdout
