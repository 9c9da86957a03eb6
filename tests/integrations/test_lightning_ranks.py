"""gradkit under Lightning's DDP, with two processes."""

import pytest

from tests.integrations.lightning_ranks import LAWS
from tests.sharding.world import run_world


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_world(LAWS, tmp_path_factory.mktemp("lightning"))


@pytest.mark.parametrize("name", LAWS)
def test_on_two_ranks(ranks, name):
    errors = [f"rank {rank}:\n{error}" for rank, error in enumerate(ranks[name]) if error]
    assert not errors, "\n".join(errors)
