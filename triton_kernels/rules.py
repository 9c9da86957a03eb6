"""From a rule to a Triton function: the same code object among other globals, where every op is its form in ops.py."""

import ast
import types
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from typing import Any

import triton
import triton.language as tl

from ..language import Code, Fn, RuleError
from . import ops

DIVIDE = "_divide_"  # no name that a rule would use


@cache
def as_jit(link: Any) -> Any:
    """A link, or the code of one, as a function that Triton kernels may call; part of their key: an edit changes it.

    Call it with tensors of float32, or of float64. Launch with enable_fp_fusion=False, or products and sums contract.
    """
    code: Code = getattr(link, "code", link)
    if code.no_source:
        raise RuleError(f"backend='triton' needs the source of every rule: {code.no_source}")
    plain = code.fn
    scope: dict[str, Any] = {name: twin(plain.__globals__[name]) for name in called(plain)}
    scope |= {"tl": tl, DIVIDE: ops.divide}  # the interpreter looks for triton.language among a function's globals
    copied = types.FunctionType(plain.__code__, scope, plain.__name__)
    # Two functions that the compiler calls by one name become one, whatever they hold.
    copied.__module__, copied.__qualname__ = plain.__module__, code.symbol
    jitted = triton.jit(copied)
    if isinstance(jitted, triton.JITFunction):  # the interpreter divides exactly
        # What was checked, and not what the file holds by now; and the source is all that can say what `/` means.
        jitted._unsafe_update_src(ast.unparse(ast.fix_missing_locations(Divisions().visit(deepcopy(code.tree)))))
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
