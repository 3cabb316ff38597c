"""Programs under GCC's ThreadSanitizer."""

from __future__ import annotations

import subprocess

import pytest


def runtime() -> str:
    """Its library; the test is skipped where the compiler has none."""
    path = subprocess.run(["g++", "-print-file-name=libtsan.so"], capture_output=True, text=True).stdout
    if "/" not in path:
        pytest.skip("the compiler has no ThreadSanitizer runtime (libtsan.so)")
    return path.strip()


def run(
    call: list[str], environment: dict[str, str], cwd: str | None = None, timeout: int = 120
) -> subprocess.CompletedProcess[str]:
    """The program's outcome, without random addresses where they are more random than its map allows."""
    for prefix in ([], ["setarch", "--addr-no-randomize"]):
        done = subprocess.run(
            [*prefix, *call], env=environment, cwd=cwd, capture_output=True, text=True, timeout=timeout
        )
        if "unexpected memory mapping" not in done.stderr:
            break
    return done
