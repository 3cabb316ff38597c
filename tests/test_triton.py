"""The Triton kernels proved without a GPU: ``tests/triton_kernels`` in processes of its own.

ttsem compiles every launch with Triton's own front end and executes it on the CPU: values in all dtypes, accesses out
of bounds, races between programs, reads of memory that nobody wrote. Triton's interpreter is the second opinion.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from tree import ROOT

FILES = sorted(path.name for path in (ROOT / "tests" / "triton_kernels").glob("test_*.py"))


def outcome(*command: str, **environment: str) -> str:
    """What pytest says of a file's tests, which must all pass and none of which may be skipped."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("FASTATTN_", "TRITON_", "PYTEST_"))}
    done = subprocess.run(
        [sys.executable, "-m", *command, "-q", "-p", "no:cacheprovider"],
        cwd=ROOT, env=env | environment, capture_output=True, text=True,
    )  # fmt: skip
    text = done.stdout[-6000:] + done.stderr[-2000:]
    assert done.returncode == 0, text
    assert re.search(r"\d+ passed", text), text
    assert not re.search(r"\d+ (skipped|failed|error)", text), text
    return text


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: they run on it")
@pytest.mark.parametrize("file", FILES)
def test_in_the_interpreter(file):
    outcome("pytest", f"tests/triton_kernels/{file}", TRITON_INTERPRET="1")


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(find_spec("ttsem") is None, reason="ttsem is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: they run on it")
@pytest.mark.parametrize("file", FILES)
def test_under_ttsem(file):
    text = outcome("ttsem.sanitize", "pytest", f"tests/triton_kernels/{file}")
    assert "too large to be checked" not in text, text
