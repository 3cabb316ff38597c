"""The Triton kernels proved without a GPU: ``tests/triton_kernels`` in processes of its own.

ttsem compiles every launch with Triton's own front end and executes it on the CPU: values in all dtypes, accesses out
of bounds, races between programs, reads of memory that nobody wrote. Triton's interpreter is the second opinion.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import pytest
import torch
from tree import ROOT

FILES = sorted(path.name for path in (ROOT / "tests" / "triton_kernels").glob("test_*.py"))


MODES = {
    "interpreter": (["pytest"], {"TRITON_INTERPRET": "1"}),
    "ttsem": (["ttsem.sanitize", "pytest"], {}),
}


def run_file(mode: str, file: str) -> subprocess.CompletedProcess[str]:
    command, environment = MODES[mode]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("FASTATTN_", "TRITON_", "PYTEST_"))}
    return subprocess.run(
        [sys.executable, "-m", *command, f"tests/triton_kernels/{file}", "-q", "-p", "no:cacheprovider"],
        cwd=ROOT, env=env | environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(request):
    """Every file in every mode that is asked for, two at a time."""
    wanted = [item.callspec.params for item in request.session.items if item.function is test_kernels]
    with ThreadPoolExecutor(2) as pool:
        yield {(p["mode"], p["file"]): pool.submit(run_file, p["mode"], p["file"]) for p in wanted}


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: they run on it")
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("mode", MODES)
def test_kernels(mode, file, request):
    """All of them pass, and none is skipped or left unchecked."""
    if mode == "ttsem" and find_spec("ttsem") is None:
        pytest.skip("ttsem is not installed")
    done = request.getfixturevalue("outcomes")[mode, file].result()
    text = done.stdout[-6000:] + done.stderr[-2000:]
    assert done.returncode == 0, text
    assert re.search(r"\d+ passed", text), text
    assert not re.search(r"\d+ (skipped|failed|error)", text), text
    assert "too large to be checked" not in text, text
