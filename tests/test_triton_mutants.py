"""The tests of the Triton kernels tested: planted bugs, each of which they must see.

A mutant is a copy of the package with one line of a kernel changed. A compiler's error would be no merit of the tests:
only a failed assertion or a fault that ttsem names counts.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tree import ROOT


class Mutant(NamedTuple):
    file: str
    old: str
    new: str
    tests: str  # file and -k of those that must see it
    seen_by: str = "values"  # or what ttsem says


MUTANTS = {
    "no mask on the tail's store": Mutant(
        "attention.py", "stored = rows.inside[:, None] & (d < headdim_v)[None, :]",
        "stored = (rows.i >= 0)[:, None] & (d < headdim_v)[None, :]",
        "test_triton_forward.py::test_blocks[32-16]", "past the end of the tensor|race",
    ),
    "no mask on the tail's keys": Mutant(
        "primitives.py", "    if MASKED and EVEN_D:\n        return tl.load(at, mask=inside[:, None], other=0.0)",
        "    if MASKED and EVEN_D:\n        return tl.load(at)",
        "test_triton_forward.py::test_blocks[32-16]", "past the end of the tensor",
    ),
    "accumulator not rescaled": Mutant(
        "primitives.py", "acc = state.acc * shrink[:, None]\n    acc = tl.dot", "acc = state.acc\n    acc = tl.dot",
        "test_triton_forward.py::test_blocks[32-16]",
    ),
    "stale maximum": Mutant(
        "primitives.py", "    return State(top, total, acc)", "    return State(state.top, total, acc)",
        "test_triton_forward.py::test_blocks[32-16]",
    ),
    "causal edge one key too far": Mutant(
        "primitives.py", "distance >= -modifiers.right", "distance > -modifiers.right - 2",
        "test_triton_forward.py::test_blocks[32-16]",
    ),
    "causal edge's last key not visited": Mutant(
        "primitives.py", "end = tl.minimum(end, rows.last + offset + right + 1)",
        "end = tl.minimum(end, rows.last + offset + right)", "test_triton_forward.py::test_features",
    ),
    "unmasked blocks reach into the window's edge": Mutant(
        "primitives.py", "(tl.maximum(rows.last + offset - left, 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N",
        "tl.maximum(rows.last + offset - left, 0) // BLOCK_N * BLOCK_N", "test_triton_forward.py::test_blocks",
    ),
    "page of the place before the padding": Mutant(
        "primitives.py", "table + place // page_size", "table + j // page_size",
        "test_triton_decode.py::test_cache",
    ),
    "split one key too long": Mutant(
        "decode.py", "last_key = tl.minimum(first_key + SPLIT * split_factor, seq.seqlen_k)",
        "last_key = tl.minimum(first_key + SPLIT * split_factor + 1, seq.seqlen_k)",
        "test_triton_decode.py::test_cache",
    ),
    "parts that nobody wrote are read": Mutant(
        "combine.py", "used = (weight > 0)[:, None]", "used = (weight >= 0)[:, None]",
        "test_triton_decode.py::test_combine",
    ),
    "dropout not in dP": Mutant(
        "attention_backward.py", "dp = tl.where(keep, dp * dropout_scale, 0.0)", "dp = dp * dropout_scale",
        "test_triton_backward.py::test_gradients_of_out_and_lse",
    ),
    "gradient of lse forgotten": Mutant(
        "attention_backward.py", "total -= tl.load(dlse", "total -= 0 * tl.load(dlse",
        "test_triton_backward.py::test_gradients_of_out_and_lse",
    ),
    "a query block too few for dK": Mutant(
        "primitives.py", "end = tl.minimum(end, first_key + BLOCK_N - offset + left)",
        "end = tl.minimum(end, first_key - offset + left)", "test_triton_backward.py::test_packed_sequences",
    ),
    "ties all kept": Mutant(
        "sampling.py", "found = tl.min(tl.where((running >= target)", "found = tl.max(tl.where((running >= target)",
        "test_triton_sampling.py::test_top_k_keeps_the_lower_ids_of_ties",
    ),
    "nucleus too small": Mutant(
        "sampling.py", "target = tl.ceil(top_p * total.to(tl.float64))", "target = tl.ceil(0.9 * top_p * total.to(tl.float64))",
        "test_triton_sampling.py::test_the_kept_sets[top_p]",
    ),
}  # fmt: skip


def run_mutant(mutant: Mutant, folder: Path) -> subprocess.CompletedProcess[str]:
    package = folder / "fastattn"
    shutil.copytree(ROOT / "fastattn", package, ignore=shutil.ignore_patterns("__pycache__", "kernels"))
    shutil.copytree(ROOT / "kernels", package / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    source = package / "kernels" / mutant.file
    text = source.read_text()
    assert text.count(mutant.old) == 1, f"{mutant.file} has {text.count(mutant.old)} of: {mutant.old}"
    source.write_text(text.replace(mutant.old, mutant.new))
    command, environment = ["ttsem.sanitize", "pytest"], {}
    if mutant.seen_by == "values":
        command, environment = ["pytest"], {"TRITON_INTERPRET": "1"}
    tests = f"{ROOT}/tests/triton_kernels/{mutant.tests}"
    return subprocess.run(
        [sys.executable, "-m", *command, "-x", "-q", "-p", "no:cacheprovider", tests],
        cwd=folder, env={**os.environ, **environment, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory):
    """Every mutant that is asked for, two at a time."""
    wanted = [
        item.callspec.params["name"] for item in request.session.items if item.function is test_mutant_is_seen
    ]
    with ThreadPoolExecutor(2) as pool:
        yield {
            name: pool.submit(run_mutant, MUTANTS[name], tmp_path_factory.mktemp("mutant")) for name in wanted
        }


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(find_spec("ttsem") is None, reason="ttsem is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the kernels' own tests run on it")
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_seen(name, outcomes):
    done = outcomes[name].result()
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-2000:]
    assert "CompilationError" not in done.stdout, done.stdout[-3000:]
    assert "InterpreterError" not in done.stdout, done.stdout[-3000:]
    expected = "AssertionError" if MUTANTS[name].seen_by == "values" else MUTANTS[name].seen_by
    assert re.search(expected, done.stdout), done.stdout[-3000:]
