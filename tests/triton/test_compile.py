"""The rules compiled by Triton for sm_90, which needs no GPU: what the code holds, and that edits change it."""

import importlib.util
import os
import re
from pathlib import Path

if os.environ.get("TRITON_INTERPRET", "0") != "0":
    raise RuntimeError("tests/triton/test_compile.py compiles: unset TRITON_INTERPRET; `make test` does")

import pytest
import triton
from builds import used
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton_cases import EXACT, ROUNDED, adam_kernel, lion_kernel, pair_kernel

from gradkit import RuleError, rule
from gradkit.optim.adamw import adam
from gradkit.optim.lion import lion
from gradkit.triton_kernels import as_jit, rules

KERNELS = {rule: pair_kernel for rule in (*EXACT, *ROUNDED.values())} | {lion: lion_kernel, adam: adam_kernel}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


def source(kernel, function):
    constants = {"RULE": function, "TILE": 512}
    types = {p.name: "constexpr" if p.name in constants else "i32" if p.name == "n" else "*fp32" for p in kernel.params}
    return ASTSource(kernel, signature=types, constexprs=constants)


def build(kernel, function):
    assert isinstance(function, triton.JITFunction), "the interpreter's form can't be compiled"
    return triton.compile(
        source(kernel, function), target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "enable_fp_fusion": False}
    )


@pytest.mark.parametrize("rule", KERNELS, ids=lambda rule: rule.name)
def test_a_rule_compiles_without_calls_spills_or_approximations(rule):
    built = build(KERNELS[rule], as_jit(rule))
    ptx = built.asm["ptx"]
    assert re.search(r"\.target sm_90", ptx) and "st.global" in ptx
    assert not re.findall(r"\bcall\b.*", ptx) and "tt.call" not in built.asm["ttgir"]
    assert not re.findall(r"\S*(?:approx|\.full|\.ftz|fma)\S*", ptx), "approximate, flushing or contracted"
    held = used(built)
    assert held["STACK"] == 0 and held["LOCAL"] == 0, held


def test_division_and_root_are_rounded_as_ieee_says():
    ptx = build(adam_kernel, as_jit(adam)).asm["ptx"]
    assert "div.rn.f32" in ptx and "sqrt.rn.f32" in ptx


HELPED = """from gradkit import fn, rule
@fn
def scaled(x): return x * 5.0
@rule
def edited(u, p): return scaled(u) + p * 3.0
"""


def module(folder, text):
    """A module of one name, whatever stands in it."""
    folder.mkdir()
    (folder / "a_users_rules.py").write_text(text)
    spec = importlib.util.spec_from_file_location("a_users_rules", folder / "a_users_rules.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def keys(function):
    return function.cache_key, source(pair_kernel, function).hash()


def test_an_unchanged_rule_keeps_its_cache_key(tmp_path):
    first, second = (module(tmp_path / name, HELPED).edited for name in "ab")
    assert first is not second and keys(as_jit(first)) == keys(as_jit(second))


@pytest.mark.parametrize("before, after", [("p * 3.0", "p * 9.0"), ("x * 5.0", "x * 7.0")], ids=["rule", "helper"])
def test_an_edited_rule_or_helper_gives_another_kernel(before, after, tmp_path):
    old = as_jit(module(tmp_path / "old", HELPED).edited)
    new = as_jit(module(tmp_path / "new", HELPED.replace(before, after)).edited)
    assert old.cache_key != new.cache_key and source(pair_kernel, old).hash() != source(pair_kernel, new).hash()
    assert build(pair_kernel, old).asm["ptx"] != build(pair_kernel, new).asm["ptx"]  # one cache folder


@pytest.mark.parametrize("rule", [lion, adam], ids=lambda rule: rule.name)
def test_an_edited_operation_gives_another_kernel(rule, tmp_path, monkeypatch):
    text = Path(rules.ops.__file__).read_text()
    old, edit = as_jit(rule), {"lion": ("x < 0.0, -1.0", "x < 0.0, -2.0"), "adam": ("tl.sqrt_rn(x)", "tl.abs(x)")}
    before, after = edit[rule.name]
    assert before in text
    as_jit.cache_clear()
    monkeypatch.setattr(rules, "ops", module(tmp_path / "edited", text.replace(before, after)))
    new = as_jit(rule)
    as_jit.cache_clear()
    assert old.cache_key != new.cache_key
    assert build(KERNELS[rule], old).asm["ptx"] != build(KERNELS[rule], new).asm["ptx"]


def test_a_rule_without_source_is_refused():
    scope = {}
    exec("def typed(u): return u + 1.0", scope)
    with pytest.raises(RuleError, match="backend='triton' needs the source of every rule: the source of typed"):
        as_jit(rule(scope["typed"]))
