from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import fastattn
from fastattn import _C


@pytest.fixture(params=fastattn.cpu_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that this machine can run, forced for one test."""
    before = _C.isa()
    _C.select_isa(request.param)
    yield request.param
    _C.select_isa(before)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores the thread count that a test changes."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
