"""The attention kernels under ThreadSanitizer, in a harness of their own: tests/tsan.

GCC's OpenMP runtime is not instrumented: TSan does not see its barriers, and calls what is behind them a race.
The harness compiles the kernels of csrc/ as they are, with one header replaced: ``parallel_for`` on std::thread,
where drawing an item orders nothing, as in OpenMP's dynamic loop. TSan judges by what orders two accesses, not by
luck in their timing, but it sees only the calls that the harness makes.
The ISA is the baseline: its loads and stores are plain C++, all of them instrumented. Who runs what, and what waits
for whom, is the same code in every ISA. Each planted bug shows that its kind of race would be seen.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import thread_sanitizer

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ["-std=gnu++17", "-O1", "-g1", "-fsanitize=thread", "-ffp-contract=off", "-w", "-pthread"]


def compiled(source: str, target: Path, *flags: str) -> Path:
    """An object file; tests/tsan comes first, so that its parallel.h is the one found."""
    include = [f"-I{ROOT / 'tests/tsan'}", f"-I{ROOT / 'csrc'}"]
    subprocess.run(["g++", *FLAGS, *flags, *include, "-c", str(ROOT / source), "-o", str(target)], check=True)
    return target


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of ``kernels`` and of its variants with a planted bug: ``no_turns``, ``shared_scratch``."""
    thread_sanitizer.runtime()
    folder = tmp_path_factory.mktemp("tsan")
    races = compiled("tests/tsan/races.cpp", folder / "races.o")
    scratch = compiled("csrc/cpu/scratch.cpp", folder / "scratch.o")
    turns = compiled("csrc/cpu/turns.cpp", folder / "turns.o")
    no_turns = compiled("tests/tsan/no_turns.cpp", folder / "no_turns.o")
    shared = compiled("csrc/cpu/scratch.cpp", folder / "shared_scratch.o", "-Dthread_local=")
    parts = {"kernels": (scratch, turns), "no_turns": (scratch, no_turns), "shared_scratch": (shared, turns)}
    for name, objects in parts.items():
        subprocess.run(["g++", *FLAGS, str(races), *map(str, objects), "-o", str(folder / name)], check=True)
    return folder


def run(program: Path, part: str) -> subprocess.CompletedProcess[str]:
    """One part of the harness, ended at the first race."""
    environment = {"TSAN_OPTIONS": "halt_on_error=1", "PATH": "/usr/bin:/bin"}
    return thread_sanitizer.run([str(program), part], environment)


@pytest.mark.parametrize("part", ["forward", "decode", "backward"])
def test_no_races_and_the_bits_of_one_thread(programs, part):
    done = run(programs / "kernels", part)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("program", "part"),
    [
        ("kernels", "overlap"),
        ("no_turns", "backward"),
        ("shared_scratch", "forward"),
        ("shared_scratch", "decode"),
    ],
)
def test_planted_races_are_seen(programs, program, part):
    done = run(programs / program, part)
    assert done.returncode != 0
    assert "WARNING: ThreadSanitizer: " in done.stderr, done.stderr


def test_an_unknown_part_fails(programs):
    done = run(programs / "kernels", "nothing")
    assert done.returncode == 1
    assert "no such part" in done.stderr
