"""The benchmark driver: ours, the peers and the machine's limits, alternating in one run.

    python benchmarks/bench.py attention [--save] [--threads N] [--only KIND,...] [--attempts N] [--quick]
    python benchmarks/bench.py sampling  [--save] [--only KIND,...] [--attempts N] [--quick]
    python benchmarks/bench.py generate  [--save] [--threads N]
    python benchmarks/bench.py models    [--save] [--only ROW,...] [--threads N] [--quick]

``--save`` writes ``benchmarks/results/<what>.json``, from which ``report.py`` makes the tables and the plot.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sampling_rows
import torch
from attention_rows import Job, Options, Row, SkipRow, disturbed, jobs, settle, wait_for_quiet
from generate_rows import bench_generate
from measure import RESULTS, environment, save
from rich.console import Console
from rich.progress import Progress

KINDS = ("forward", "training", "decode", "short", "overhead", "memory", "feature", "avx2")


def line(row: Row) -> str:
    """A row on the terminal."""
    seconds, met = row.get("seconds", {}), "" if row["met"] else "  below what is required"
    if row["kind"] == "memory":
        above = ", ".join(f"{who} {b / 2**20:.1f}" for who, b in row["bytes_above"].items())
        return f"{above} MiB above inputs and outputs{met}"
    if row["kind"] == "feature":
        return f"{row['relative']['min']:.2f} times plain (median {row['relative']['median']:.2f})"
    if row["kind"] == "overhead":
        return ", ".join(f"{who} {t['min'] * 1e6:.2f} us" for who, t in seconds.items()) + met
    rate = f"{row['rate']['fastattn'] / 1e9:.1f} of {row['limit'] / 1e9:.1f} {row['unit']}"
    parts = [f"{rate} = {row['share_of_limit']:.0%} (median {row['share_median']:.0%})"]
    if "speedup" in row:
        parts.append(f"SDPA x {row['speedup']:.2f} (median {row['speedup_median']:.2f})")
    return ", ".join(parts) + met


def chosen(found: list[Job], only: list[str], quick: bool) -> list[Job]:
    """The rows to measure; a quick run takes the first two of each kind."""
    return [job for kind in only for job in [j for j in found if j.kind == kind][: 2 if quick else None]]


def take(
    jobs: list[Job], line: Callable[[Row], str], attempts: int
) -> tuple[list[Row], list[dict[str, str]]]:
    """Every row, and the rows that could not be measured, with the reason."""
    skipped = []
    wait_for_quiet()
    done: dict[str, list[Row]] = {}
    todo = [(job, 1) for job in jobs]
    order = [f"{job.kind} {job.label}" for job, _ in todo]
    with Progress(console=Console(width=160), transient=True) as progress:
        task = progress.add_task("", total=len(todo))
        for job, attempt in todo:  # grows while it is walked
            name = f"{job.kind} {job.label}"
            progress.update(task, description=name)
            if attempt > 1:
                wait_for_quiet()
            try:
                done[name] = job.run()
            except (SkipRow, NotImplementedError) as reason:
                skipped.append({"kind": job.kind, "row": job.label, "reason": str(reason)})
                progress.console.print(f"{name}: skipped, {reason}", highlight=False, soft_wrap=True)
                done[name] = []
            again = attempt < attempts and any(disturbed(row) for row in done[name])
            if again:
                todo.append((job, attempt + 1))
            for row in done[name] if len(done[name]) == 1 else []:
                text = f"{name}: {line(row)}{'  (cores were taken: again later)' if again else ''}"
                progress.console.print(text, highlight=False, soft_wrap=True)
            progress.update(task, advance=1, total=len(todo))
    return [row for name in order for row in done[name]], skipped


def bench_attention(options: Options, only: list[str], attempts: int) -> dict[str, Any]:
    """Attention, beside torch SDPA and the machine's limits."""
    start = environment()
    taken, skipped = take(chosen(list(jobs(options)), only, options.quick), line, attempts)
    rows = [settle(row) for row in taken]
    return {
        "environment": {**start, "load_average_after": os.getloadavg()[0]},
        **limits(rows),
        "rows": rows,
        "skipped": skipped,
    }


def bench_sampling(options: Options, only: list[str], attempts: int) -> dict[str, Any]:
    """From logits to tokens, beside transformers, torch.topk and a partial sort."""
    start = environment()
    found = chosen(list(sampling_rows.jobs(options)), only, options.quick)
    rows, skipped = take(found, sampling_rows.line, attempts)
    return {
        "environment": {**start, "load_average_after": os.getloadavg()[0]},
        "rows": rows,
        "skipped": skipped,
    }


def limits(rows: list[Row]) -> dict[str, Any]:
    """The FMA peak; the lowest and highest read bandwidth that any row saw. None where no row needed it."""
    flops = [row["limit"] for row in rows if row.get("unit") == "GFLOP/s" and row["kind"] != "avx2"]
    bandwidth = [row["limit"] for row in rows if row.get("unit") == "GB/s"]
    return {
        "fma_peak": max(flops, default=None),
        "read_bandwidth": [min(bandwidth), max(bandwidth)] if bandwidth else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["attention", "sampling", "generate", "models"])
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/<what>.json")
    parser.add_argument("--output", type=Path, help="write the JSON there instead")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument(
        "--only",
        help=f"of {', '.join(KINDS)}; sampling: of {', '.join(sampling_rows.KINDS)}; not with --save; models: rows",
    )
    parser.add_argument(
        "--attempts", type=int, default=3, help="for a row that others disturbed: attention, sampling"
    )
    parser.add_argument("--quick", action="store_true", help="two rows per kind, two rounds; not with --save")
    parser.add_argument("--backend", default="cpu", help="another than cpu is not saved")
    args = parser.parse_args()
    kinds = sampling_rows.KINDS if args.what == "sampling" else KINDS
    only = args.only.split(",") if args.only else [] if args.what == "models" else list(kinds)
    if args.what != "models" and (unknown := set(only) - set(kinds)):
        parser.error(f"--only: expected kinds of {', '.join(kinds)}, got {', '.join(sorted(unknown))}")
    partly = args.what != "models" and set(only) != set(kinds)
    if args.save and (args.quick or args.backend != "cpu" or partly):
        parser.error("--save: expected a whole run of the cpu backend, without --quick, --only and --backend")
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    options = Options(args.backend, args.quick)
    if args.what == "models":
        from model_rows import bench_models  # transformers: only who compares models needs it

        path = args.output or RESULTS / "models.json"
        saved = json.loads(path.read_text()) if only and path.exists() else None
        record = bench_models(args.quick, only, saved)
    elif args.what == "generate":
        record = bench_generate()
    else:
        record = (bench_attention if args.what == "attention" else bench_sampling)(
            options, only, args.attempts
        )
    if args.output or args.save:
        print("saved", save(args.output or RESULTS / f"{args.what}.json", record))


if __name__ == "__main__":
    main()
