"""How every figure is taken: alternating calls in one run, and the limits of the machine beside them."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch

import fastattn
from fastattn import _C
from fastattn.doctor import examine

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


Times = dict[str, dict[str, float]]  # {"min", "median"} seconds by name


Calls = dict[str, Callable[[], Any]]


def alternate(calls: Calls, seconds: float = 1.0, rounds: int = 5, before: Calls | None = None) -> Times:
    """Seconds per call as ``{"min", "median"}`` by name: the calls take turns, so that drift hits all alike.

    At least ``rounds`` rounds, and as many as fit in ``seconds``; ``before`` each call its own preparation, untimed.
    """
    before = before or {}
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[next(iter(calls))]) < rounds:
        for name, call in calls.items():
            if name in before:
                before[name]()
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: {"min": min(t), "median": statistics.median(t)} for name, t in times.items()}


class Limit(NamedTuple):
    """What the machine can do at most: ``call`` does ``work`` FLOPs or bytes, as fast as they can be done.

    It takes its turn among the calls that it bounds, since neighbours on a shared machine make it drift by the minute.
    """

    unit: str
    work: float
    call: Callable[[], Any]


def fma_limit() -> Limit:
    """FMAs that never leave the registers, all threads, the active ISA."""
    threads, iterations = torch.get_num_threads(), 1_000_000
    return Limit("GFLOP/s", iterations * _C.fma_loop(1, threads), lambda: _C.fma_loop(iterations, threads))


def read_limit(megabytes: int = 512) -> Limit:
    """Reading a buffer that no cache holds, all threads."""
    data = torch.ones(megabytes << 18)  # float32
    threads = torch.get_num_threads()
    return Limit("GB/s", data.numel() * 4.0, lambda: _C.read_loop(data.data_ptr(), data.numel(), threads))


def rate_of(limit: Limit, seconds: float = 0.5, which: str = "min") -> float:
    """The limit by itself, FLOP/s or bytes/s; its usual rate with "median"."""
    return limit.work / alternate({"limit": limit.call}, seconds)["limit"][which]


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    changed = subprocess.run(
        ["git", "status", "--porcelain", "csrc", "fastattn"], cwd=ROOT, capture_output=True, text=True
    )
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M"),
        "commit": commit.strip() + ("+changes" if changed.stdout.strip() else ""),
        "cpu": examine()["cpu"]["name"],
        "isa": fastattn.cpu_isa(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastattn": fastattn.__version__,
    }


def save(path: Path, record: dict[str, Any]) -> Path:
    """Write the JSON that ``report.py`` reads."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path
