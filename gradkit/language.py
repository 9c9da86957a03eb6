"""What a rule may contain: one walk over its source checks it, when the decorator runs, and writes it as C."""

import ast
import inspect
import math
import textwrap
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar
from zlib import crc32

F = TypeVar("F", bound=Callable[..., Any])
ARITHMETIC = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
COMPARISON = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="}
REMEDY: dict[type, str] = {
    **dict.fromkeys((ast.If, ast.IfExp), "choose with where(mask, a, b)"),
    **dict.fromkeys((ast.For, ast.While), "write the terms out"),
    **dict.fromkeys((ast.Mod, ast.FloorDiv), "compute the scalar in derive"),
    ast.And: "combine masks with &",
    ast.Or: "combine masks with |",
    ast.Not: "write the opposite comparison, or ~mask",
    ast.Pow: "write x * x, or compute the scalar in derive",
    ast.Subscript: "give each scalar a name of its own in derive",
    ast.Attribute: "import the function by its name",
    ast.AugAssign: "write name = name + x",
    ast.Lambda: "write a function marked @fn",
}
CALLED: dict[type, str] = {ast.Expr: "a bare expression", ast.Assign: "assigning to anything but one name"}


class RuleError(TypeError):
    """A rule, or a function it calls, holds what the rule language does not have."""


class Code:
    """A checked function: parameters, and (where the source can be read) C statements and the C of what it returns.

    An expression is a "value" (varies over elements), a "scalar", a "literal" or a "mask". Only `finish` of a measure
    may do arithmetic among scalars (`scalar_math`); for rules that belongs to derive.
    """

    def __init__(self, fn: Callable[..., Any], varies: Callable[[str], bool], scalar_math: bool = False):
        if not inspect.isfunction(fn) or fn.__name__ == "<lambda>":
            raise RuleError(f"{fn!r} is not in the rule language; write a function with def")
        self.fn, self.scalar_math, self.name = fn, scalar_math, fn.__name__
        self.file, self.first = fn.__code__.co_filename, fn.__code__.co_firstlineno
        self.params = list(inspect.signature(fn).parameters)
        self.kinds = {name: "value" if varies(name) else "scalar" for name in self.params}
        self.calls: list[Code] = []
        self.statements: list[str] = []
        self.returns: list[str] = []
        self.assigned: set[str] = set()
        self.symbol = ""
        self.tree: ast.AST = ast.Module([], [])  # of the function, where its source can be read
        self.no_source = ""  # why there is no C, for rules typed into a prompt
        if fn.__closure__:
            self.refuse(None, f"a closure over {', '.join(fn.__code__.co_freevars)}", "pass each as a scalar argument")
        try:
            lines, self.first = inspect.getsourcelines(fn)
        except (OSError, TypeError):
            self.no_source = f"the source of {self.name} can't be read: put it into a file or a notebook cell"
            return
        node: Any = ast.parse(textwrap.dedent("".join(lines))).body[0]
        if not isinstance(node, ast.FunctionDef):
            self.refuse(node, "anything but a plain function", "write it with def")
        a = node.args
        if a.vararg or a.kwarg or a.kwonlyargs or a.posonlyargs or a.defaults:
            self.refuse(node, "a parameter list with *, / or defaults", "use plain parameters; defaults go into derive")
        self.tree = node
        self.body(node, node.body[1:] if ast.get_docstring(node) is not None else node.body)
        text = " ".join((*self.params, *self.statements, *self.returns))
        self.symbol = f"fn_{self.name}_{crc32(text.encode()):08x}"  # two helpers of one name may differ

    def refuse(self, node: ast.AST | None, what: str = "", remedy: str = "") -> NoReturn:
        what = what or CALLED.get(type(node), type(node).__name__.lower())
        remedy = remedy or REMEDY.get(type(node), "write name = expression, then a final return")
        line = self.first + getattr(node, "lineno", 1) - 1
        raise RuleError(f"{self.file}:{line}: {self.name}: {what} is not in the rule language; {remedy}")

    def body(self, node: ast.AST, statements: list[Any]) -> None:
        *before, last = statements or [None]
        for s in before if isinstance(last, ast.Return) else statements:
            self.assignment(s)
        if not isinstance(last, ast.Return) or last.value is None:
            self.refuse(node, "a body without a final return", "end with return u, <each slot in order>")
        for x in last.value.elts if isinstance(last.value, ast.Tuple) else [last.value]:
            kind, c = self.number(x)
            if kind != "value" and not self.scalar_math:
                self.refuse(x, "returning what does not vary over elements", "return a value made of u, p, g or a slot")
            self.returns.append(c)

    def assignment(self, s: Any) -> None:
        if not (isinstance(s, ast.Assign) and len(s.targets) == 1 and isinstance(s.targets[0], ast.Name)):
            self.refuse(s)
        kind, c = self.expression(s.value)
        name = s.targets[0].id
        before = self.kinds.get(name)
        if before and (before == "mask") != (kind == "mask"):
            self.refuse(s, f"{name} changing between a number and a mask", "use another name")
        self.kinds[name] = kind
        self.assigned.add(name)
        self.statements.append(("" if before else "int " if kind == "mask" else "T ") + f"v_{name} = {c};")

    def number(self, node: ast.expr) -> tuple[str, str]:
        kind, c = self.expression(node)
        if kind == "mask":
            self.refuse(node, "a mask used as a number", "use it in where(mask, a, b)")
        return kind, c

    def mask(self, node: ast.expr) -> str:
        kind, c = self.expression(node)
        if kind != "mask":
            self.refuse(node, "a number used as a mask", "compare it, e.g. x > 0.5")
        return c

    def varying(self, node: ast.AST, *kinds: str) -> str:
        if "value" not in kinds and not self.scalar_math:
            self.refuse(node, "arithmetic among scalars", "compute it in derive and ask for the result by name")
        return "value" if "value" in kinds else "scalar"

    def expression(self, n: ast.expr) -> tuple[str, str]:
        """The kind of an expression, and its C."""
        handler = getattr(self, f"on_{type(n).__name__.lower()}", None)
        return handler(n) if handler else self.refuse(n)

    def on_name(self, n: ast.Name) -> tuple[str, str]:
        if n.id not in self.kinds:
            self.refuse(n, f"the name {n.id!r}, which is no parameter,", "make it a parameter, or write the number")
        return self.kinds[n.id], f"v_{n.id}"

    def on_constant(self, n: ast.Constant) -> tuple[str, str]:
        if type(n.value) is not float or not math.isfinite(n.value):
            self.refuse(n, f"the literal {n.value!r}", "write numbers as finite floats, e.g. 2.0")
        return "literal", f"((T){n.value!r})"

    def on_unaryop(self, n: ast.UnaryOp) -> tuple[str, str]:
        if isinstance(n.op, ast.Invert):
            return "mask", f"(!{self.mask(n.operand)})"
        if not isinstance(n.op, ast.USub):
            self.refuse(n, type(n.op).__name__.lower(), REMEDY.get(type(n.op), "only -x and ~mask"))
        kind, c = self.number(n.operand)
        return kind if kind == "literal" else self.varying(n, kind), f"(-{c})"

    def on_binop(self, n: ast.BinOp) -> tuple[str, str]:
        if isinstance(n.op, ast.BitAnd | ast.BitOr):
            sign = "&" if isinstance(n.op, ast.BitAnd) else "|"
            return "mask", f"({self.mask(n.left)} {sign} {self.mask(n.right)})"
        if type(n.op) not in ARITHMETIC:
            self.refuse(n, type(n.op).__name__.lower(), REMEDY.get(type(n.op), "only + - * / and & | between masks"))
        (left, a), (right, b) = self.number(n.left), self.number(n.right)
        if left == "literal" and isinstance(n.op, ast.Div) and a != "((T)1.0)" and not self.scalar_math:
            self.refuse(n, "a literal over a value", "write 1.0 / x * c, which is what torch computes for c / x")
        return self.varying(n, left, right), f"({a} {ARITHMETIC[type(n.op)]} {b})"

    def on_boolop(self, n: ast.BoolOp) -> NoReturn:
        self.refuse(n, f"`{type(n.op).__name__.lower()}`", REMEDY[type(n.op)])

    def on_compare(self, n: ast.Compare) -> tuple[str, str]:
        if len(n.ops) > 1:
            self.refuse(n, "a chained comparison", "write (a < b) & (b < c)")
        if type(n.ops[0]) not in COMPARISON:
            self.refuse(n, f"the comparison {type(n.ops[0]).__name__.lower()}", "compare with <, <=, > or >=")
        (left, a), (right, b) = self.number(n.left), self.number(n.comparators[0])
        if "value" not in (left, right) and not self.scalar_math and {left, right} != {"scalar", "literal"}:
            self.refuse(n, "comparing two scalars", "derive a gate (1.0 or 0.0) and compare it with 0.5")
        return "mask", f"({a} {COMPARISON[type(n.ops[0])]} {b})"

    def on_call(self, n: ast.Call) -> tuple[str, str]:
        if not isinstance(n.func, ast.Name):
            self.refuse(n, "a call of anything but a plain name", "import the function by its name")
        name = n.func.id
        if n.keywords or any(isinstance(x, ast.Starred) for x in n.args):
            self.refuse(n, f"calling {name} with keywords or *", "give the arguments by position")
        f = None if name in self.kinds else self.fn.__globals__.get(name)
        if f is None or not (isinstance(f, Fn) or getattr(f, "is_op", False)):
            self.refuse(n, f"calling {name}", "only functions of gradkit.ops and functions marked @fn, by name")
        wanted = len(f.code.params) if isinstance(f, Fn) else len(inspect.signature(f).parameters)
        if len(n.args) != wanted:
            self.refuse(n, f"{name} with {len(n.args)} arguments", f"it takes {wanted}")
        if f.__name__ == "where":
            condition, (yes, a), (no, b) = self.mask(n.args[0]), *map(self.number, n.args[1:])
            return self.varying(n, yes, no), f"({condition} ? {a} : {b})"
        kinds, cs = zip(*map(self.number, n.args), strict=True)
        kind, symbol = self.varying(n, *kinds), f"k_{f.__name__}"  # its own name, also where imported under another
        if isinstance(f, Fn):
            self.calls.append(f.code)
            self.no_source, symbol = self.no_source or f.code.no_source, f.code.symbol
        return "mask" if f.__name__ == "isfinite" else kind, f"{symbol}({', '.join(cs)})"


def op(function: F) -> F:
    """Mark a function of gradkit.ops: each backend has a form of its own for it."""
    function.is_op = True  # type: ignore[attr-defined]
    return function


class Fn:
    """A helper that rules may call; made by @fn."""

    def __init__(self, fn: Callable[..., Any]):
        self.fn = fn
        self.code = Code(fn, lambda name: True)
        if not self.code.no_source and len(self.code.returns) != 1:
            raise RuleError(f"{self.code.file}:{self.code.first}: {self.code.name}: an @fn returns one number")
        self.__name__, self.__doc__, self.__module__ = fn.__name__, fn.__doc__, fn.__module__

    def __call__(self, *args: Any) -> Any:
        return self.fn(*args)


def fn(function: Callable[..., Any]) -> Fn:
    """Mark a function of numbers as one that rules may call; it obeys the rule language too."""
    return Fn(function)
