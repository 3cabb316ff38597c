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
from typing import Any

import torch

import fastattn
from fastattn import _C
from fastattn.doctor import examine

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def alternate(
    calls: dict[str, Callable[[], Any]], seconds: float = 1.0, rounds: int = 5
) -> dict[str, dict[str, float]]:
    """Seconds per call as ``{"min", "median"}`` by name: the calls take turns, so that drift hits all alike.

    At least ``rounds`` rounds, and as many as fit in ``seconds``.
    """
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[next(iter(calls))]) < rounds:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: {"min": min(t), "median": statistics.median(t)} for name, t in times.items()}


def fma_peak() -> float:
    """FLOP/s of a loop of FMAs that never leaves the registers, all threads, the active ISA."""
    threads = torch.get_num_threads()
    best = 0.0
    for _ in range(20):
        start = time.perf_counter()
        flops = _C.fma_loop(300_000, threads)
        best = max(best, flops / (time.perf_counter() - start))
    return best


def read_bandwidth(megabytes: int = 1024) -> float:
    """Bytes/s of reading a buffer that no cache holds, all threads."""
    data = torch.ones(megabytes << 18)  # float32
    best = 0.0
    for _ in range(6):
        start = time.perf_counter()
        _C.read_loop(data.data_ptr(), data.numel(), torch.get_num_threads())
        best = max(best, data.numel() * 4 / (time.perf_counter() - start))
    return best


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


def save(name: str, record: dict[str, Any]) -> Path:
    """Write ``benchmarks/results/<name>.json``."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path
