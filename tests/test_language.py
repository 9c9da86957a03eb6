"""The rule language: all that it refuses, each with file, line and remedy."""

import importlib.util
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import gradkit
from gradkit import RuleError, measure, rule
from gradkit.ops import absolute

HEAD = "import torch\nfrom gradkit import derive, fn, measure, rule, Stage\nfrom gradkit.ops import *\nK = 2.0\n"
# a body of f(u, s, k, j), the line at fault marked; what and remedy in the message
REFUSED: dict[str, tuple[str, str]] = {
    "and": ("u = where(u > 0.0 and s > 0.0, u, s)  #<", "`and`.*combine masks with &"),
    "or": ("u = where(u > 0.0 or s > 0.0, u, s)  #<", "`or`.*combine masks with |"),
    "not": ("u = where(not u > 0.0, u, s)  #<", "write the opposite comparison, or ~mask"),
    "chained comparison": ("u = where(0.0 < u < 1.0, u, s)  #<", r"chained comparison.*\(a < b\) & \(b < c\)"),
    "equal": ("u = where(u == s, u, s)  #<", "compare with <, <=, > or >="),
    "not equal": ("u = where(u != s, u, s)  #<", "compare with <, <=, > or >="),
    "is": ("u = where(u is s, u, s)  #<", "compare with <, <=, > or >="),
    "in": ("u = where(u in s, u, s)  #<", "compare with <, <=, > or >="),
    "power": ("u = u ** 2.0  #<", "write x [*] x, or compute the scalar in derive"),
    "modulo": ("u = u % 2.0  #<", "compute the scalar in derive"),
    "floor division": ("u = u // 2.0  #<", "compute the scalar in derive"),
    "literal over a value": ("u = 0.3 / u  #<", "a literal over a value.*1.0 / x [*] c"),  # torch multiplies by 1 / u
    "matrix product": ("u = u @ s  #<", r"[+] - [*] /"),
    "xor": ("u = where((u > 0.0) ^ (s > 0.0), u, s)  #<", "& [|] between masks"),
    "shift": ("u = u << 1.0  #<", "[+] - [*] /"),
    "if": ("if k > 0.5:  #<\n        u = -u", r"where\(mask, a, b\)"),
    "if expression": ("u = u if k > 0.5 else s  #<", r"where\(mask, a, b\)"),
    "for": ("for _ in range(3):  #<\n        u = u + s", "write the terms out"),
    "while": ("while True:  #<\n        u = u + s", "write the terms out"),
    "comprehension": ("u = sum([u for _ in range(2)])  #<", "calling sum.*functions of gradkit.ops"),
    "with": ("with torch.no_grad():  #<\n        u = u + s", "name = expression"),
    "assert": ("assert k > 0.0  #<", "name = expression"),
    "bare expression": ("sqrt(u)  #<", "bare expression.*name = expression"),
    "import": ("import math  #<", "name = expression"),
    "inner function": ("def inner(x):  #<\n        return x", "name = expression"),
    "global": ("global K  #<", "name = expression"),
    "early return": ("return u, s  #<", "name = expression, then a final return"),
    "augmented": ("u += s  #<", "write name = name [+] x"),
    "annotated": ("x: float = u  #<", "write name = expression"),
    "two targets": ("x, y = u, s  #<", "name = expression"),
    "chained targets": ("x = y = u  #<", "name = expression"),
    "walrus": ("u = (x := u) + s  #<", "name = expression"),
    "subscript": ("u = u[0]  #<", "give each scalar a name of its own in derive"),
    "attribute": ("u = u.T  #<", "import the function by its name"),
    "method": ("u = u.sqrt()  #<", "import the function by its name"),
    "module's function": ("u = torch.sqrt(u)  #<", "import the function by its name"),
    "lambda inside": ("u = (lambda x: x)(u)  #<", "plain name"),
    "builtin": ("u = max(u, s)  #<", "calling max.*gradkit.ops.*@fn"),
    "function": ("u = helper(u)  #<", "calling helper.*gradkit.ops.*@fn"),
    "rule": ("u = other(u)  #<", "calling other.*gradkit.ops.*@fn"),
    "number of the module": ("u = u * K  #<", "'K'.*make it a parameter, or write the number"),
    "unknown name": ("u = u * nowhere  #<", "'nowhere'.*make it a parameter"),
    "keyword": ("u = lerp(u, s, w=k)  #<", "by position"),
    "star": ("u = sqrt(*u)  #<", "by position"),
    "too few": ("u = where(u > 0.0, u)  #<", "takes 3"),
    "too many": ("u = sqrt(u, s)  #<", "takes 1"),
    "whole number": ("u = 2 * u  #<", r"2\.0"),
    "text": ("u = u * 'k'  #<", r"finite floats, e.g. 2\.0"),
    "true": ("u = where(True, u, s)  #<", r"finite floats, e.g. 2\.0"),
    "infinite literal": ("u = minimum(u, 1e999)  #<", r"finite floats, e.g. 2\.0"),
    "unary plus": ("u = +u  #<", "only -x and ~mask"),
    "mask as number": ("u = u * (u > 0.0)  #<", r"where\(mask, a, b\)"),
    "gate by multiplication": ("u = u * (k > 0.5)  #<", r"where\(mask, a, b\)"),
    "negated mask": ("u = where(-(u > 0.0), u, s)  #<", r"where\(mask, a, b\)"),
    "number as mask": ("u = where(u, u, s)  #<", "compare it, e.g. x > 0.5"),
    "scalar as mask": ("u = where(k, u, s)  #<", "compare it, e.g. x > 0.5"),
    "and of numbers": ("u = where(u & s, u, s)  #<", "compare it, e.g. x > 0.5"),
    "complement of a number": ("u = where(~u, u, s)  #<", "compare it, e.g. x > 0.5"),
    "mask of masks": ("u = where(u > 0.0, u > 0.0, s > 0.0)  #<", r"where\(mask, a, b\)"),
    "name changes its kind": ("u = u > 0.0  #<", "use another name"),
    "scalars only": ("u = u * (1.0 - k)  #<", "arithmetic among scalars.*compute it in derive and ask for the result"),
    "two scalars": ("u = u * (k * j)  #<", "arithmetic among scalars"),
    "negated scalar times": ("x = -k  #<\n    u = u * x", "arithmetic among scalars"),
    "function of a scalar": ("u = u * sqrt(k)  #<", "arithmetic among scalars"),
    "choice among scalars": ("u = u * where(u > 0.0, k, j)  #<", "arithmetic among scalars"),
    "comparing two scalars": ("u = where(k > j, u, s)  #<", "derive a gate"),
    "comparing literals": ("u = where(1.0 > 0.5, u, s)  #<", "derive a gate"),
}
HEADERS: dict[str, tuple[str, str]] = {  # whole functions; what and remedy
    "default": ("@rule\ndef f(u, k=1.0):  #<\n    return u * k", "defaults go into derive"),
    "star": ("@rule\ndef f(u, *k):  #<\n    return u", "use plain parameters"),
    "double star": ("@rule\ndef f(u, **k):  #<\n    return u", "use plain parameters"),
    "keyword only": ("@rule\ndef f(u, *, k):  #<\n    return u * k", "use plain parameters"),
    "positional only": ("@rule\ndef f(u, k, /):  #<\n    return u * k", "use plain parameters"),
    "no return": ("@rule\ndef f(u, k):  #<\n    u = u * k", "final return"),
    "only a docstring": ("@rule\ndef f(u, k):  #<\n    'It does nothing.'", "final return"),
    "empty return": ("@rule\ndef f(u, k):  #<\n    return", "final return"),
    "scalar returned": ("@rule\ndef f(u, k):\n    return k  #<", "return a value made of u, p, g or a slot"),
    "literal returned": ("@rule\ndef f(u):\n    return 0.0  #<", "return a value made of u, p, g or a slot"),
    "mask returned": ("@rule\ndef f(u):\n    return u > 0.0  #<", r"where\(mask, a, b\)"),
    "slot missing": ("@rule(slots=('s',))  #<\ndef f(u, s):\n    return u", "returns 1 values; it must return u, s"),
    "p missing": ("@rule(stage=Stage.WRITE, uses=('s',))  #<\ndef f(u, p, s):\n    return p", "must return p, s"),
    "two from an fn": ("@fn  #<\ndef f(u):\n    return u, u", "an @fn returns one number"),
    "refused in an fn": ("@fn\ndef f(u):\n    return u ** 2.0  #<", "write x [*] x"),
    "async": ("@rule\nasync def f(u):  #<\n    return u", "write it with def"),
    "generator": ("@rule\ndef f(u):\n    yield u  #<\n    return u", "name = expression"),
    "refused in a map": (
        "@measure(scope='all', reduce={'t': 'sum'}, gives=('c',), finish=end)\ndef f(u):\n    return u // 2.0  #<",
        "compute the scalar in derive",
    ),
}
OUTSIDE = "def end(t):\n    return t\ndef helper(x):\n    return x\n@rule\ndef other(u):\n    return u\n"


def load(folder: Path, text: str) -> ModuleType:
    """A module of this text, in a file that Python can show the source of."""
    path = folder / f"rules_{abs(hash(text))}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_refused(folder: Path, text: str, message: str) -> None:
    line = 1 + text[: text.index("#<")].count("\n")
    with pytest.raises(RuleError) as raised:
        load(folder, text)
    said = str(raised.value)
    assert re.match(rf".*rules_\d+\.py:{line}: f:? ", said), f"line {line} expected: {said}"
    assert re.search(message, said), said


@pytest.mark.parametrize("name", REFUSED)
def test_a_construct_outside_the_language_is_refused_where_it_stands(name, tmp_path):
    body, message = REFUSED[name]
    text = f"{HEAD}{OUTSIDE}\n@rule(slots=('s',))\ndef f(u, s, k, j):\n    'Something.'\n    {body}\n    return u, s\n"
    assert_refused(tmp_path, text, message)


@pytest.mark.parametrize("name", HEADERS)
def test_a_function_of_another_form_is_refused_where_it_stands(name, tmp_path):
    text, message = HEADERS[name]
    assert_refused(tmp_path, f"{HEAD}{OUTSIDE}\n{text}\n", message)


def test_the_refused_body_is_fine_without_its_line(tmp_path):
    """So that no test above fails for another reason than the one it names."""
    rest = "@rule(slots=('s',))\ndef f(u, s, k, j):\n    'Something.'\n    return u, s\n"
    module = load(tmp_path, f"{HEAD}{OUTSIDE}\n{rest}")
    assert module.f.scalars == ("k", "j")


def test_lambdas_closures_and_other_callables_are_refused():
    outer = 2.0

    def closed(u):
        return u * outer

    for bad, remedy in ((lambda u: u, "with def"), (closed, "outer.*pass each as a scalar"), (print, "with def")):
        with pytest.raises(RuleError, match=remedy):
            rule(bad)
    with pytest.raises(RuleError, match=rf"{re.escape(__file__)}:\d+: closed"):
        rule(closed)


def wrong_orders() -> Iterator[tuple[Callable[..., Any], dict[str, Any]]]:
    def no_u(p, u):
        return u

    def slot_behind_scalar(u, k, s):
        return u * k, s

    def p_behind_slot(u, s, p):
        return u * p, s

    def g_behind_scalar(u, k, g):
        return u * k * g

    def borrowed_first(u, b, s):
        return u, b, s

    def slot_unnamed(u, t):
        return u * t, u

    yield no_u, {}
    yield slot_behind_scalar, {"slots": ("s",)}
    yield p_behind_slot, {"slots": ("s",)}
    yield g_behind_scalar, {}
    yield borrowed_first, {"slots": ("s",), "uses": ("b",)}
    yield slot_unnamed, {"slots": ("s",)}


@pytest.mark.parametrize(("function", "given"), list(wrong_orders()), ids=lambda x: getattr(x, "__name__", ""))
def test_parameters_stand_in_one_order(function, given):
    with pytest.raises(RuleError, match=rf"{function.__name__}\(.*the parameters are u, then p and g if wanted, then"):
        rule(**given)(function)


def test_measures_and_derives_have_forms_of_their_own():
    def total(u):
        return absolute(u)

    def finish(t, k):
        return 1.0 - k * t  # arithmetic among scalars is what a finish is for

    good = {"scope": "all", "reduce": {"t": "sum"}, "gives": ("c",), "finish": finish}
    assert measure(**good)(total).scalars == ("k",)

    def sees_a_slot(u, s):
        return u * s

    def needs_two(t, v):
        return t, v

    def branches(t):
        return t if t > 0.0 else 0.0

    for change, kind, message in (
        ({"scope": "rows"}, ValueError, "scope='rows'; use 'row', 'column', 'tensor' or 'all'"),
        ({"reduce": {"t": "median"}}, ValueError, "'median'; use one of sum, mean, max"),
        ({"reduce": {"t": "sum", "v": "sum"}}, RuleError, "returns 1 values; reduce names"),
        ({"finish": needs_two}, RuleError, "finish"),
        ({"finish": branches}, RuleError, r"where\(mask, a, b\)"),
        ({"reduce": {"other": "sum"}}, RuleError, "finish takes"),
    ):
        with pytest.raises(kind, match=message):
            measure(**{**good, **change})(total)
    with pytest.raises(RuleError, match="a measure maps u, and p, g, before"):
        measure(**good)(sees_a_slot)
    with pytest.raises(TypeError, match="has no parameter 'step'"):
        gradkit.derive("step")(finish)
