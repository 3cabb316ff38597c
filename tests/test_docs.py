"""Every Python snippet of the documents runs, each in a process of its own."""

from __future__ import annotations

import re
import sys

import pytest
from tree import ROOT, run

SNIPPETS = [
    pytest.param(code, id=f"{path.name}-{i}")
    for path in sorted((ROOT / "docs").glob("*.md"))
    for i, code in enumerate(re.findall(r"^```python\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE))
]


def test_there_are_some():
    assert len(SNIPPETS) >= 6


@pytest.mark.parametrize("code", SNIPPETS)
def test_snippet(code):
    if "transformers import" in code:
        pytest.importorskip("transformers")
    run(sys.executable, "-W", "ignore", "-c", code)
