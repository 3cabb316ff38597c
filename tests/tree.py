"""The source tree as git sees it, and commands run apart from this process."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(*command: object, cwd: Path = ROOT, **environment: str) -> str:
    """Standard output of a command that must succeed. What it builds is built without CUDA, unless told otherwise."""
    env = {
        k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "FASTATTN_CPU_ISA", "FASTATTN_BACKEND")
    }
    done = subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env={**env, "FASTATTN_CUDA": "off", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def copy_tree(target: Path) -> None:
    """Copy what git tracks or would track: nothing that was built, nothing that is ignored."""
    target.mkdir(parents=True)
    for name in run("git", "ls-files", "--cached", "--others", "--exclude-standard").splitlines():
        path = ROOT / name
        if not path.is_symlink() and not path.exists():
            continue  # deleted, not yet committed
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target / name, follow_symlinks=False)
