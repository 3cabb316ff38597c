"""Bugs planted in the CUDA kernels: each must be seen. Which check saw which: benchmarks/results/cuda_mutants.json."""

from __future__ import annotations

import json

import pytest
from simt.mutants import CORE, MUTANTS, TABLE, UNITS_OF, witnesses


@pytest.mark.parametrize(
    "bug", [pytest.param(m, marks=() if m.name in CORE else pytest.mark.slow, id=m.name) for m in MUTANTS]
)
def test_a_planted_bug_is_seen(bug, cuda_bindings, tmp_path):
    found = witnesses(bug.family, cuda_bindings, tmp_path, bug)
    assert found, f"{bug.name}: no check sees it"
    assert set(found) & set(json.loads(TABLE.read_text())[bug.name])


@pytest.mark.parametrize("family", UNITS_OF)
def test_without_a_bug_nothing_is_seen(family, cuda_bindings, tmp_path):
    """The mutants' own build; of floats a further one, which only their mutants share."""
    assert witnesses(family, cuda_bindings, tmp_path) == []


def test_the_table_is_whole():
    table = json.loads(TABLE.read_text())
    assert list(table) == [bug.name for bug in MUTANTS]
    assert all(table.values())
    assert {bug.name for bug in MUTANTS} >= CORE
    for family in UNITS_OF:
        assert sum(bug.family == family and bug.name in CORE for bug in MUTANTS) >= 12
