"""The CUDA kernels through nvcc: warnings are errors, no spills, and budgets that may only improve. No GPU is needed."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
from tree import ROOT

from fastattn import available_backends, calls
from fastattn.backends import cuda

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu_static

MAX_INSTRUCTIONS_PER_HMMA = 6.0  # FlashAttention-2's own kernels: 5.3 to 6.3
SAMPLING_KERNELS = {"sample", "edit", "rank"}


@pytest.fixture(scope="module")
def tools():
    for name in ("nvcc", "nvdisasm"):
        if gpu_static.find_tool(name) is None:
            pytest.skip(f"needs {name}: on PATH, or pip install 'fastattn[cuda-build]'")


def committed():
    return json.loads(gpu_static.RESULTS.read_text())["kernels"]


def key(row):
    return tuple(row[name] for name in ("architecture", "dtype", "headdim", "kernel", "rows"))


@pytest.mark.parametrize(
    ("architecture", "headdim"),
    [("80", 64), ("80", 128), ("86", 64), ("89", 64), ("90a", 64), ("100a", 64), ("120", 64)],
)
def test_it_compiles_within_the_budget(tools, architecture, headdim, tmp_path):
    budget = {key(row): row for row in committed()}
    rows = gpu_static.report(architecture, headdim, "f16", tmp_path)
    assert len(rows) == 7
    for row in rows:
        allowed = budget[key(row)]
        assert row["spill_bytes"] == 0, row
        assert row["tensor"] == "HMMA", row
        assert row["resident_warps"] >= allowed["resident_warps"], (row, allowed)
        # Another ptxas schedules a little differently.
        assert row["instructions_per_tensor"] <= 1.05 * allowed["instructions_per_tensor"], (row, allowed)
        if architecture == "80" and row["kernel"] == "forward plain" and row["rows"] == 128:
            assert row["instructions_per_tensor"] <= MAX_INSTRUCTIONS_PER_HMMA


@pytest.mark.parametrize("headdim", gpu_static.HOPPER_HEADDIMS)
def test_hopper_compiles_to_wgmma_within_the_budget(tools, headdim, tmp_path):
    budget = {key(row): row for row in committed()}
    rows = gpu_static.report("90a", headdim, "f16", tmp_path, "hopper")
    assert len(rows) == 5
    for row in rows:
        allowed = budget[key(row)]
        assert row["spill_bytes"] == 0, row
        assert row["tensor"] == "HGMMA", row
        assert row["instructions_per_tensor"] <= 1.05 * allowed["instructions_per_tensor"], (row, allowed)
    plain = next(row for row in rows if row["kernel"] == "wgmma forward plain")
    assert plain["tensor_in_loop"] == headdim // 16 + 8


@pytest.mark.parametrize(
    ("architecture", "headdim", "unit"),
    [
        *((a, d, "backward") for a in ("80", "90a", "120") for d in (128, 256)),
        *((a, 256, "forward") for a in ("80", "90a", "120")),
    ],
)
def test_floats_compile_within_the_budget(tools, architecture, headdim, unit, tmp_path):
    others = json.loads(gpu_static.RESULTS.read_text())["others"]
    budget = {key(row): row["registers"] for row in others if "headdim" in row}
    rows = gpu_static.float_report(architecture, headdim, tmp_path, unit)
    assert len(rows) == (7 if unit == "forward" else 6)
    for row in rows:
        assert row["spill_bytes"] == 0, row
        assert row["registers"] <= budget[key(row)] + 8, row


@pytest.mark.parametrize("architecture", ["80", "90a"])
def test_sampling_compiles_within_the_budget(tools, architecture, tmp_path):
    others = json.loads(gpu_static.RESULTS.read_text())["others"]
    budget = {
        (row["architecture"], row["kernel"], row["dtype"]): row["registers"]
        for row in others
        if row["kernel"] in SAMPLING_KERNELS
    }
    rows = gpu_static.sampling_report(architecture, tmp_path)
    assert {row["dtype"] for row in rows} == {"float", "f16", "bf16"}
    assert {row["kernel"] for row in rows} == SAMPLING_KERNELS
    assert len(rows) == 9
    for row in rows:
        assert row["spill_bytes"] == 0, row
        assert row["registers"] <= budget[row["architecture"], row["kernel"], row["dtype"]] + 8, row


def test_the_budget_is_what_it_claims():
    others = json.loads(gpu_static.RESULTS.read_text())["others"]
    rows = committed()
    assert all(row["spill_bytes"] == 0 for row in (*rows, *others))
    floats = [row for row in others if "headdim" in row]
    for architecture, unit in itertools.product(gpu_static.FLOAT_ARCHITECTURES, gpu_static.UNITS):
        ours = [
            row
            for row in floats
            if row["architecture"] == f"sm_{architecture}"
            and row["kernel"].startswith("forward") == (unit == "forward")
        ]
        assert {row["headdim"] for row in ours} == set(gpu_static.HEADDIMS)
    # Compute capability 8.6 has the least: 99 KiB.
    assert all(row["shared_bytes"] <= 99 << 10 for row in floats)
    plain = [row for row in rows if row["kernel"] == "forward plain" and row["rows"] == 128]
    ours = [row for row in plain if row["architecture"] == "sm_80" and row["headdim"] in (64, 128)]
    assert len(ours) == 4  # two dtypes
    assert all(row["instructions_per_tensor"] <= MAX_INSTRUCTIONS_PER_HMMA for row in ours)
    assert {row["architecture"] for row in rows} == {f"sm_{a}" for a in gpu_static.ARCHITECTURES}
    assert {row["headdim"] for row in rows if row["architecture"] == "sm_80"} == set(gpu_static.HEADDIMS)


def test_it_says_why_it_is_off():
    """The module imports without a driver, and a launch without one is an error, not a crash."""
    reason = available_backends()["cuda"]
    if reason is None:
        return  # there is a GPU
    if cuda._cuda is None:
        assert "fastattn._cuda cannot be imported" in reason
        assert "FASTATTN_CUDA=on" in reason
        return
    assert "CUDA" in reason
    view, sizes = (0, 0, 0, 0), (1, 1, 1, 1, 1, 64, 64)
    call = (view, view, view, sizes, 1.0, -1, -1, calls.DTYPES[torch.float16], 2, 1, 0, None, None)
    with pytest.raises(RuntimeError, match=r"attention_forward: .*(driver|device)"):
        cuda._cuda.attention_forward(call, view, (0, 0, 0), 0, 0, 0)


def test_the_switch_of_the_build():
    done = subprocess.run([sys.executable, "setup.py", "--name"], env={**os.environ, "FASTATTN_CUDA": "maybe"}, cwd=ROOT,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode != 0
    assert "FASTATTN_CUDA: expected auto, on or off, got 'maybe'" in done.stderr
