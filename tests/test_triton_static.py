"""Every Triton kernel compiles for every target, on tensor cores, within the committed budget of spills and memory."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec

import pytest
from tree import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import triton_static

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")

TENSOR = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCMMA", "sm_120": "HMMA", "gfx942": "MFMA"}
# Shared memory that one block may have, bytes (CUDA C++ Programming Guide, table of compute capabilities; CDNA 3: 64 KiB).
SHARED = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376, "gfx942": 65536}


@pytest.fixture(scope="module")
def budget():
    return json.loads(triton_static.RESULTS.read_text())


@pytest.fixture(scope="module")
def rows():
    return triton_static.measure_all()


def test_the_budget_has_every_kernel(budget, rows):
    assert set(budget["rows"]) == set(rows), "run: python benchmarks/triton_static.py --save"


def test_spills_and_memory_stay_within_the_budget(budget, rows):
    import triton

    if triton.__version__ != budget["triton"]:
        pytest.skip(f"the budget is of triton {budget['triton']}, this is {triton.__version__}")
    worse = [
        f"{name}: {figure} {row[figure]}, budget {budget['rows'][name][figure]}"
        for name, row in rows.items()
        for figure in ("spills", "shared")
        if row[figure] > budget["rows"][name][figure]
    ]
    assert not worse, "\n".join(worse)


def test_shared_memory_fits_the_target(rows):
    for name, row in rows.items():
        assert row["shared"] <= SHARED[name.split(" | ")[0]], name


def test_products_run_on_tensor_cores(rows):
    """16-row tiles are below what wgmma and tcgen05 take: decode multiplies with mma.sync there."""
    for name, row in rows.items():
        target, _, kernel = name.split(" | ")
        if kernel.startswith("attention_"):
            wanted = {TENSOR[target]} | ({"HMMA"} if kernel == "attention_decode_kernel" else set())
            assert wanted & set(row["tensor"]), f"{name}: {row['tensor']}"
