"""Every test that asks for `make` runs for each optimizer of the table, on eager and on the default backend."""

import pytest

from tests.contract.rows import SUBJECTS, Subject


@pytest.fixture(params=SUBJECTS, ids=str)
def make(request: pytest.FixtureRequest) -> Subject:
    return request.param
