"""Rules as Triton functions: the only place that imports triton, and imported only as gradkit.triton_kernels."""

from .rules import as_jit

__all__ = ["as_jit"]
