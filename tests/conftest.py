from __future__ import annotations

from collections.abc import Iterator

import pytest

import fastattn
from fastattn import _C


@pytest.fixture(params=fastattn.cpu_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once per instruction set that this machine has."""
    before = _C.isa()
    _C.select_isa(request.param)
    yield request.param
    _C.select_isa(before)
