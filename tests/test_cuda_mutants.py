"""Bugs planted in the CUDA kernels: each must be seen. Which check saw which: benchmarks/results/cuda_mutants.json."""

from __future__ import annotations

import json

import pytest
from simt.emulator import Emulator
from simt.mutants import CORE, FAMILIES, MUTANTS, TABLE, build_without_bugs, witnesses
from simt.probes import complaints


@pytest.fixture(scope="module")
def sound(cuda_bindings, tmp_path_factory):
    return build_without_bugs(cuda_bindings, tmp_path_factory.mktemp("sound"))


@pytest.mark.parametrize(
    "bug", [pytest.param(m, marks=() if m.name in CORE else pytest.mark.slow, id=m.name) for m in MUTANTS]
)
def test_a_planted_bug_is_seen(bug, cuda_bindings, tmp_path, sound):
    found = witnesses(bug, cuda_bindings, tmp_path, sound.parent)
    assert found, f"{bug.name}: no check sees it"
    assert set(found) & set(json.loads(TABLE.read_text())[bug.name])


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=pytest.mark.slow) if f == "products_f32" else f for f in FAMILIES]
)
def test_without_a_bug_nothing_is_seen(family, sound, cuda_bindings, tmp_path):
    """The mutants' own build, but for the dtype that they do without."""
    module = build_without_bugs(cuda_bindings, tmp_path, family) if family == "products_f32" else sound
    assert complaints(Emulator(module), family) == set()


def test_the_table_is_whole():
    table = json.loads(TABLE.read_text())
    assert list(table) == [bug.name for bug in MUTANTS]
    assert all(table.values())
    assert {bug.name for bug in MUTANTS} >= CORE
    assert len(CORE) >= 12
    for family in FAMILIES:
        assert sum(bug.family == family for bug in MUTANTS) >= (6 if family == "products_f32" else 12)
