"""Trainer and accelerate on two ranks."""

import pytest

from tests.integrations import transformers_ranks
from tests.sharding.world import run_world


@pytest.fixture(scope="module")
def trainers(request, tmp_path_factory):
    """Run the chosen cases in one world: each process imports transformers once."""
    chosen = [item.callspec.params["name"] for item in request.session.items if "trainers" in item.fixturenames]
    return run_world({n: transformers_ranks.CASES[n] for n in chosen}, tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("name", transformers_ranks.CASES)
def test_on_two_ranks(trainers, name):
    errors = [f"rank {rank}:\n{error}" for rank, error in enumerate(trainers[name]) if error]
    assert not errors, "\n".join(errors)
