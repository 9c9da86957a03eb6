"""From a rule to a Triton function: the same code object among other globals, where every op is its form in ops.py."""

import ast
import inspect
import types
from collections.abc import Callable
from functools import cache
from typing import Any

import triton
import triton.language as tl

from ..language import Fn, RuleError
from . import ops

DIVIDE = "_divide_"  # no name that a rule would use


@cache
def as_jit(function: Any) -> Any:
    """A link or a plain function as one that Triton kernels may call; part of their cache key: an edit changes it.

    Call it with tensors of float32, or of float64. Launch with enable_fp_fusion=False, or products and sums contract.
    """
    plain = getattr(function, "fn", function)
    try:
        inspect.getsource(plain)
    except (OSError, TypeError):
        raise RuleError(
            f"backend='triton' needs the source of every rule: the source of {plain.__name__} can't be read: "
            f"put it into a file or a notebook cell"
        ) from None
    scope: dict[str, Any] = {name: twin(plain.__globals__[name]) for name in called(plain)}
    # The interpreter looks for triton.language among a function's globals. The module's name is kept: with the
    # function's name it is what the compiler calls it, and two rules of one name must not be taken for each other.
    scope |= {"__name__": plain.__module__, "tl": tl, DIVIDE: ops.divide}
    jitted = triton.jit(types.FunctionType(plain.__code__, scope, plain.__name__))
    if isinstance(jitted, triton.JITFunction):  # the interpreter divides exactly
        text = ast.unparse(ast.fix_missing_locations(Divisions().visit(jitted.parse())))
        jitted._unsafe_update_src(text)  # the source is all that can say what `/` means
    return jitted


def called(function: Callable[..., Any]) -> tuple[str, ...]:
    """The globals that a checked function uses: the rule language has calls, and no other ones."""
    return function.__code__.co_names


def twin(function: Any) -> Any:
    return as_jit(function) if isinstance(function, Fn) else getattr(ops, function.__name__)


class Divisions(ast.NodeTransformer):
    """Every `a / b` as a call: Triton's own division is 2 ulp off."""

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        self.generic_visit(node)
        if not isinstance(node.op, ast.Div):
            return node
        return ast.Call(ast.Name(DIVIDE, ast.Load()), [node.left, node.right], [])
