"""No kernel moves a byte more than its chain needs, spills, or takes its fast path in small pieces."""

import os

if os.environ.get("TRITON_INTERPRET", "0") != "0":
    raise RuntimeError("tests/triton/test_gate.py compiles: unset TRITON_INTERPRET; `make test` does")

import pytest
from gate import CHAINS, TARGETS, batch_of, row

from gradkit.explain import moved

LEAST = {"AdamW": 28, "AdamW bf16": 22, "Lion": 20, "Lion bf16": 14, "AdEMAMix": 36, "AdamW bf16, Kahan": 26}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", CHAINS)
def test_a_kernel_is_as_good_as_its_chain_allows(name, target):
    batch = batch_of(name)
    for ps in batch.program.passes:
        found = row(batch, ps, TARGETS[target])
        assert found.read + found.written == moved(batch, ps)
        assert not found.spilled and not found.conversions
        assert found.wide == found.accesses
        assert found.registers <= 128, "fewer than 16 warps would fit on an SM"


@pytest.mark.parametrize("name", LEAST)
def test_a_step_moves_the_bytes_that_its_state_has(name):
    batch = batch_of(name)
    assert moved(batch, batch.program.passes[-1]) == LEAST[name]
