"""The emulated CUDA kernels under ThreadSanitizer: a second opinion on what their barriers order.

It knows nothing of the emulator's own race check, and judges by happens-before alone. What it is told, and by what fibers:
``tests/simt/happens_before.h``. Each planted bug shows that a race of its kind is reported.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import thread_sanitizer
from simt.emulator import compile_units, link
from simt.mutants import MUTANTS, UNITS_OF
from simt.races import CALLS, FLAGS, OPTIONS
from tree import ROOT

PLANTED = {
    "no barrier after the wait": "block barrier",
    "values given back while they are multiplied": "mbarrier after a product",
    "waits for a group too few": "wait for asynchronous copies",
    "no warp barrier before out is read back": "warp barrier",
    "multiplies keys before they landed": "mbarrier after asynchronous copies",
    "out takes the place of q that is read": "named barrier",
    "blocks collect into the same slots": "blocks",
    "crossing read before it is written": "block barrier",
    "statistics land after the barrier": "wait for asynchronous copies",
}
CORE = list(PLANTED)[:2]


@pytest.fixture(scope="module")
def runtime() -> str:
    return thread_sanitizer.runtime()


@pytest.fixture(scope="module")
def healthy(runtime: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The object files of headdim 64, without a bug."""
    return compile_units(tmp_path_factory.mktemp("races"), headdims=(64,), flags=FLAGS)


def run(runtime: str, module: Path, *families: str) -> subprocess.CompletedProcess[str]:
    """The families' calls, ended at the first race."""
    call = [sys.executable, "tests/simt/sanitized.py", "call", str(module), *families]
    environment = {"LD_PRELOAD": runtime, "TSAN_OPTIONS": OPTIONS, "OMP_NUM_THREADS": "1"}
    return thread_sanitizer.run(call, os.environ | environment, str(ROOT), 600)


def test_no_races(runtime, healthy, cuda_bindings, tmp_path):
    done = run(runtime, link(tmp_path, cuda_bindings, healthy), *CALLS)
    assert done.returncode == 0, done.stderr
    assert f"no races: {' '.join(CALLS)}" in done.stdout


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in CORE else pytest.mark.slow) for name in PLANTED]
)
def test_a_planted_race_is_reported(name, runtime, healthy, cuda_bindings, tmp_path):
    bug = next(mutant for mutant in MUTANTS if mutant.name == name)
    units = [unit for unit in UNITS_OF[bug.family] if unit != "launch"]
    objects = healthy | compile_units(tmp_path, bug.plant(tmp_path), (64,), FLAGS, tuple(units))
    done = run(runtime, link(tmp_path, cuda_bindings, objects), bug.family)
    assert done.returncode != 0
    assert "WARNING: ThreadSanitizer: data race" in done.stderr, done.stderr
    assert re.search(r"'block \d+ thread \d+", done.stderr), done.stderr
