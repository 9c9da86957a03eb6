"""What compiles when: Triton's own launcher up to the compiler, for a GPU that is not here."""

import os
import re

if os.environ.get("TRITON_INTERPRET", "0") != "0":
    raise RuntimeError("tests/triton/test_specialisation.py compiles: unset TRITON_INTERPRET; `make test` does")

from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from builds import TARGETS, TYPES, Build, build, builds
from test_compile import HELPED, module

import gradkit
from gradkit import backends, chain
from gradkit import transforms as tx
from gradkit.stats import norms
from gradkit.triton_kernels import launch, load, rules, source


class Sm90:
    """As much of a driver as the launcher asks before it compiles."""

    def get_current_target(self) -> Any:
        return TARGETS["sm_90"]

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """The kernels that are compiled from now on, each with its signature; launches end there, nothing runs."""
    seen: list[list[str]] = []

    def begin(run: Any, blocks: int, device: Any, *given: Any, **constants: Any) -> None:
        before = set(run.device_caches[0][0])
        run.warmup(*given, grid=(blocks,), **constants)
        for kernel in (run.device_caches[0][0][key] for key in {*run.device_caches[0][0]} - before):
            seen.append([kind for kind in kernel.src.signature.values() if kind != "constexpr"])

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(launch, "launch", begin)
    monkeypatch.setattr(backends.triton, "why_not", lambda batch: "")
    load.kernel.cache_clear()
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(Sm90())
    yield seen
    triton.runtime.driver.set_active(before)
    load.kernel.cache_clear()


def step(optimizer: gradkit.Optimizer, *idle: torch.Tensor) -> None:
    for p in (p for g in optimizer.param_groups for p in g["params"]):
        p.grad = None if any(p is q for q in idle) else torch.ones_like(p)
    optimizer.step()


def parameters(*sizes: int) -> list[torch.Tensor]:
    return [torch.ones(n, requires_grad=True) for n in sizes]


def test_only_a_new_chain_compiles(compiled):
    """Another lr, other groups, other tensors and late parameters compile nothing."""
    transforms = [tx.clip_by_global_norm(1.0), tx.clip_by_norm(0.5)]
    params = parameters(16, 7, 1, 5000)
    optimizer = gradkit.AdamW(params, transforms=transforms, backend="triton")
    step(optimizer, params[1])
    arguments = [[TYPES[name] for name in names] for names in (source.REDUCE, source.REDUCE, source.APPLY)]
    assert compiled == arguments  # and the helper of the gate compiles the same
    step(optimizer)  # the one without a gradient has a row of its own from here on
    for group in optimizer.param_groups:
        group["lr"] = 1.0
    step(optimizer)
    optimizer.add_param_group({"params": parameters(*range(1, 60)), "lr": 0.5, "betas": (0.5, 0.6)})
    step(optimizer)
    (one,) = parameters(1 << 16)
    step(gradkit.AdamW([one], transforms=transforms, backend="triton"))
    unaligned = torch.ones(8)[1:].requires_grad_()
    step(gradkit.AdamW([unaligned], transforms=transforms, backend="triton"))
    assert len(compiled) == 3
    for _ in range(2):
        step(gradkit.Lion(params, backend="triton"))
        assert len(compiled) == 4


def kernels(chain_: gradkit.Chain) -> list[Build]:
    p = torch.ones(3, requires_grad=True)
    return list(builds(gradkit.Optimizer([p], chain_), "sm_90"))


def assert_other_kernels(old: list[Build], new: list[Build]) -> None:
    """Of the same text: it is what the text calls that differs."""
    for a, b in zip(old, new, strict=True):
        assert a.source.fn is not b.source.fn and a.source.fn.src == b.source.fn.src
        assert a.source.hash() != b.source.hash()


@pytest.mark.parametrize("before, after", [("p * 3.0", "p * 9.0"), ("x * 5.0", "x * 7.0")], ids=["rule", "helper"])
def test_an_edited_rule_or_helper_gives_another_kernel(before, after, tmp_path):
    old = kernels(chain(module(tmp_path / "old", HELPED).edited))
    new = kernels(chain(module(tmp_path / "new", HELPED.replace(before, after)).edited))
    same = kernels(chain(module(tmp_path / "same", HELPED).edited))
    assert_other_kernels(old, new)
    assert [b.source.hash() for b in old] == [b.source.hash() for b in same]


MEASURED = """from gradkit import measure, rule
from gradkit.ops import absolute, sqrt
def root(total): return sqrt(total) * 2.0
@measure(scope="tensor", reduce={"total": "sum"}, gives=("size",), finish=root)
def sizes(u): return absolute(u) * 4.0
@rule
def divided(u, size): return u / size
"""


@pytest.mark.parametrize(
    "before, after", [("sqrt(total) * 2.0", "sqrt(total) * 3.0"), ("absolute(u) * 4.0", "absolute(u) * 5.0")]
)
def test_an_edited_measure_gives_another_kernel(before, after, tmp_path):
    made = [module(tmp_path / n, x) for n, x in (("old", MEASURED), ("new", MEASURED.replace(before, after)))]
    old, new = (kernels(chain(m.sizes, m.divided)) for m in made)
    assert_other_kernels(old[:1], new[:1])
    assert [b.source.hash() for b in old[1:]] == [b.source.hash() for b in new[1:]]


def test_an_edited_operation_gives_another_kernel(tmp_path, monkeypatch):
    text = Path(rules.ops.__file__).read_text()
    old = kernels(chain(tx.clip_by_value(1.0)))
    assert "x < 0.0, -1.0" in text
    caches = (rules.as_jit, source.apply)
    for one in caches:
        one.cache_clear()
    monkeypatch.setattr(rules, "ops", module(tmp_path / "edited", text.replace("x < 0.0, -1.0", "x < 0.0, -2.0")))
    new = kernels(chain(tx.clip_by_value(1.0)))
    for one in caches:
        one.cache_clear()
    assert_other_kernels(old, new)


def test_the_file_of_a_kernel_is_read_again_only_as_it_was_written(tmp_path, monkeypatch):
    """What stands in the cache under its name is not trusted but compared."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    text = "def run(): return 1\n"
    load.kernel.cache_clear()
    assert load.kernel(text)() == 1
    (file,) = (tmp_path / "gradkit").glob("gradkit_*.py")
    file.write_text("def run(): return 2\n")
    load.kernel.cache_clear()
    assert load.kernel(text)() == 1 and file.read_text() == text


def test_without_a_cache_folder_kernels_are_still_loaded(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    load.kernel.cache_clear()
    run = load.kernel("def run(): return 3\n")
    assert run() == 3 and Path(run.__code__.co_filename).read_text() == "def run(): return 3\n"


def test_another_selection_compiles_nothing(compiled):
    params = [torch.ones(n, 7, requires_grad=True) for n in (3, 500)]
    groups = [{"params": params, "role": "matrix"}]
    optimizer = gradkit.FRUGAL(groups, split="randk", update_gap=1, backend="triton")
    step(optimizer)
    assert compiled == [[TYPES[name] for name in source.APPLY]]
    for _ in range(3):
        step(optimizer)
    assert len(compiled) == 1


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
def test_a_split_compiles_for(arch, rounding):
    """And a measure behind it."""
    p = torch.ones(4, 4, dtype=torch.bfloat16, requires_grad=True)
    groups, behind = [{"params": [p], "role": "matrix"}], [chain(norms)]
    optimizer = gradkit.FRUGAL(groups, split="columns", rounding=rounding, transforms=behind)
    assert [b.name for b in builds(optimizer, arch) if b.compile()] == ["measure", "apply"]


@pytest.mark.parametrize("arch", TARGETS)
def test_every_kind_of_kernel_compiles_for(arch):
    """Write-backs, a ring, measures of both scopes, and totals for a `finish` elsewhere."""
    p = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    transforms = [tx.clip_by_global_norm(1.0), tx.clip_by_norm(1.0)]
    for rounding in ("stochastic", "kahan"):
        optimizer = gradkit.Grokfast([p], filter="ma", rounding=rounding, transforms=transforms)
        assert [b.name for b in builds(optimizer, arch) if b.compile()] == ["measure", "measure", "apply"]
    (batch,) = optimizer.batches([p])
    for ps in batch.program.passes[:2]:
        assert build(batch.kind, ps, source.totals, arch).compile()


def test_what_finishes_is_rounded_as_ieee_says():
    measure, _ = builds(gradkit.AdamW(parameters(3), transforms=[tx.clip_by_global_norm(1.0)]), "sm_90")
    ptx = measure.compile().asm["ptx"]
    assert "div.rn.f64" in ptx and "sqrt.rn.f64" in ptx and "atom.global.gpu.acq_rel" in ptx
    assert not re.findall(r"\S*(?:approx|\.full|\.ftz|fma|ld\.global\.nc)\S*", ptx)


def test_partial_results_are_stored_counted_and_read_in_this_order():
    """All threads' stores, a barrier, one count for all to see; what is read then does not come from the L1 cache."""
    measure, _ = builds(gradkit.AdamW(parameters(3), transforms=[tx.clip_by_global_norm(1.0)]), "sm_90")
    ptx = measure.compile().asm["ptx"]
    stored, counted = ptx.index("st.global.b64"), ptx.index("atom.global.gpu.acq_rel")
    assert "bar.sync" in ptx[stored:counted]
    after = re.findall(r"ld\.global\S*\.b64", ptx[counted:])
    assert "ld.global.cg.b64" in after


TWINS = """from gradkit import fn, rule
@rule
def twin(u): return u * 2.5
first = twin
@rule
def twin(u): return u * 3.25
"""


@pytest.mark.parametrize("order", [("first", "twin"), ("twin", "first")])
def test_two_rules_of_one_name_stay_two(order, tmp_path):
    made = module(tmp_path / "twins", TWINS)
    (built,) = kernels(chain(*(getattr(made, name) for name in order)))
    ttir = built.compile().asm["ttir"]
    assert "2.500000e+00" in ttir and "3.250000e+00" in ttir


def test_what_was_checked_is_compiled_whatever_the_file_holds_by_now(tmp_path):
    made = module(tmp_path / "saved", "from gradkit import rule\n@rule\ndef r(u): return u * 2.5\n")
    Path(made.__file__).write_text("from gradkit import rule\n\n@rule\ndef r(u): return u * 7.25\n")
    (built,) = kernels(chain(made.r))
    ttir = built.compile().asm["ttir"]
    assert "2.500000e+00" in ttir and "7.250000e+00" not in ttir


def test_a_kernel_is_compiled_before_a_step_counts_on_it(compiled, monkeypatch):
    """As it is then launched: the step finds every kernel there."""
    loaded = []
    monkeypatch.setattr(triton.compiler.CompiledKernel, "run", property(loaded.append))
    params = parameters(16, 7)
    optimizer = gradkit.AdamW(params, transforms=[tx.clip_by_global_norm(1.0)], backend="triton")
    (batch,) = optimizer.batches(params)
    for ps in batch.program.passes:
        launch.prepare(batch.kind, ps, source.measure if ps.measure else source.apply)
    assert len(loaded) == 2
    step(optimizer)
    assert not compiled


@pytest.mark.parametrize("failure", [OSError("no C compiler"), RuntimeError("0 active drivers")])
def test_a_gpu_that_triton_cannot_reach_falls_back_before_anything_counts(failure, monkeypatch):
    def fails(*given: Any) -> None:
        raise failure

    (p,) = parameters(3)
    (batch,) = gradkit.AdamW([p]).batches([p])
    batch.device = torch.device("cuda", 0)
    monkeypatch.setattr(launch, "prepare", fails)
    backend, why = backends.choose("auto", batch)
    assert backend is backends.Chunked and why == f"{type(failure).__name__}: {failure}"
    with pytest.raises(RuntimeError, match=f"backend='triton' can't run: .*{failure}; use backend='auto'"):
        backends.choose("triton", batch)
