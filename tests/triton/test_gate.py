"""No kernel moves a byte more than its chain needs, spills, or takes its fast path in small pieces."""

import os

if os.environ.get("TRITON_INTERPRET", "0") != "0":
    raise RuntimeError("tests/triton/test_gate.py compiles: unset TRITON_INTERPRET; `make test` does")

from pathlib import Path

import pytest
import triton
from gate import CHAINS, TARGETS, optimizer_of, passes_of, table

from gradkit.explain import expected, moved, numel, selected

LEAST = {"AdamW": 28, "AdamW bf16": 22, "Lion": 20, "Lion bf16": 14, "AdEMAMix": 36, "AdamW bf16, Kahan": 26}
LEAST |= {"attached clip by value": 8, "attached clip by value, bf16": 4}
PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("name", CHAINS)
def test_a_kernel_is_as_good_as_its_chain_allows(name, arch):
    for batch, ps, found in passes_of(name, arch):
        stored = [n for n in ps.stores if n in ps.low]
        share = selected(batch) / numel(batch)
        of_selected = share * (found.read_selected + found.written_selected)
        assert found.read + found.written + of_selected == moved(batch, ps)
        assert found.narrow == len(ps.low) + len(stored)
        assert not found.spilled and found.conversions <= 3 * len(stored)
        assert found.wide == found.accesses - found.narrow
        assert not found.approximate
        assert found.registers <= 128, "fewer than 16 warps would fit on a multiprocessor"


@pytest.mark.parametrize("name", LEAST)
def test_a_step_moves_the_bytes_of_its_state(name):
    optimizer = optimizer_of(name)
    (batch,) = optimizer.batches(expected(optimizer))
    assert moved(batch, batch.program.passes[-1]) == LEAST[name]


@pytest.mark.skipif(not triton.__version__.startswith("3.9."), reason="the page's registers are those of triton 3.9")
def test_the_page_has_the_table():
    assert table() in PAGE.read_text(), "python tests/triton/gate.py prints it"
