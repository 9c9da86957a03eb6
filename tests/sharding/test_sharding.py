"""Sharded parameters: equal to unsharded ones, resumed bitwise, never waiting for each other."""

import subprocess
import sys

import pytest
import torch

from gradkit import sharding
from gradkit.backends import ccache
from tests.sharding import cases
from tests.sharding.world import run_world


@pytest.fixture(scope="module")
def world(request, tmp_path_factory):
    """Run the chosen cases in one world."""
    chosen = [item.callspec.params["name"] for item in request.session.items if "world" in item.fixturenames]
    return run_world({n: cases.CASES[n] for n in chosen}, tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("name", cases.CASES)
def test_on_two_ranks(world, name):
    if "native" in name and ccache.why_not():
        pytest.skip(f"native can't run here: {ccache.why_not()}")
    errors = [f"rank {rank}:\n{error}" for rank, error in enumerate(world[name]) if error]
    assert not errors, "\n".join(errors)


def test_importing_gradkit_leaves_dtensor_unimported():
    code = "import sys, gradkit; sys.exit('torch.distributed.tensor' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_slots_are_laid_out_like_their_parameter():
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    for p in (image, torch.randn(3, 4).T, torch.randn(3), torch.tensor(1.0), torch.empty(0, 3)):
        slot, ring = sharding.slot(p, torch.float64), sharding.slot(p, torch.bfloat16, 3)
        assert (slot.dtype, ring.dtype, ring.shape) == (torch.float64, torch.bfloat16, (3, *p.shape))
        assert not slot.any() and not ring.any()
        for t in (slot, *ring):
            assert t.shape == p.shape and (t.stride() == p.stride() or not p.numel())
