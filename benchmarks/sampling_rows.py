"""How every figure of ``bench.py sampling`` is taken, and what issue 4 requires of it.

The unit is a read: one vectorised max over the row, from whatever cache holds it, in turn with the calls. A call from
Python costs the same however long the row is; that is a row of its own, and in reads it is not counted again: what
the same call, and the same read, takes on a row of one token is taken off.

How long a draw takes depends on its noise. Each of ``DRAWS`` draws is timed by itself, many times, and is as fast as it
ever was; the reads of a row are then the median draw's, with the mean and the slowest hundredth beside them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from typing import Any

import torch
from attention_rows import Job, Options, Row
from measure import Calls, Times
from sampling_peers import partial_sort, torch_topk, transformers_chain
from torch import Tensor

import fastattn
from fastattn import _C

VOCABULARIES = (32000, 128256, 262144)
FIRST = "temperature, top-k 50, top-p 0.9"
ALONE = "temperature alone"
WORK: dict[str, dict[str, Any]] = {
    FIRST: {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
    "top-p 0.9 alone": {"top_p": 0.9},
    "min-p 0.05 alone": {"min_p": 0.05},
    ALONE: {"temperature": 0.8},
}
READS = dict(zip(WORK, (3.0, 7.0, 4.0, 10.0)))
TRANSFORMERS_SPEEDUP = 200.0  # of the first work
PENALTIES = {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.2}
SEEN, PENALTY_READS = 1000, 1.0
ADVERSARIAL = ("ascending", "all equal", "two values")
ADVERSARIAL_TIMES = 4.0
BATCH, THREAD_SPEEDUP = 64, 1.8
FIXED_SECONDS = 10e-6
DRAWS = 200
KINDS = ("work", "penalties", "dense", "adversarial", "batch", "fixed")


@contextmanager
def threads(n: int) -> Iterator[None]:
    """torch's thread count, for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def logits_of(kind: str, vocab: int, batch: int = 1) -> Tensor:
    """(batch, vocab) float32: normal with a deviation of 3, as a model's are, or a row that is meant to hurt."""
    x = 3 * torch.randn(batch, vocab, generator=torch.Generator().manual_seed(vocab))
    if kind == "ascending":
        return x.sort(1).values
    if kind == "all equal":
        return torch.zeros_like(x)
    if kind == "two values":
        return (x > 0).float()
    return x


def sampler(logits: Tensor, options: Options, **keywords: Any) -> Callable[[], Any]:
    """``fastattn.sample``, at another position with every call."""
    positions = count()
    call = partial(fastattn.sample, logits, **{"seeds": 1, "backend": options.backend, **keywords})
    return lambda: call(positions=next(positions))


def draw_times(row: Tensor, options: Options, **keywords: Any) -> dict[str, float]:
    """The fastest time of each of ``DRAWS`` draws: their median, mean and 99th percentile, in seconds."""
    read, best = reader(row), [float("inf")] * DRAWS
    call = partial(fastattn.sample, row, seeds=1, backend=options.backend, **keywords)
    for _ in range(2 if options.quick else 20):
        for position in range(DRAWS):
            read()
            start = time.perf_counter()
            call(positions=position)
            best[position] = min(best[position], time.perf_counter() - start)
    best.sort()
    return {"median": statistics.median(best), "mean": statistics.fmean(best), "p99": best[DRAWS * 99 // 100]}


def reader(row: Tensor) -> Callable[[], float]:
    """One read of a row (1, vocab)."""
    address, size = row.data_ptr(), row.numel()
    return lambda: _C.max_loop(address, size)


def measured(row: Tensor, calls: Calls, options: Options) -> tuple[Times, Callable[[str, str], float]]:
    """Calls on a row, in turn with a read of it, which also brings it back into the cache before each.

    Returns:
        The times, and reads that a call takes beyond its fixed cost: ``reads(name, "min" or "median")``.
    """
    one = torch.zeros(1, 1)
    every = {"read": reader(row), "read, fixed": reader(one), **calls}
    times = options.alternate(every, dict.fromkeys(every, reader(row)))

    def reads(name: str, which: str) -> float:
        fixed = f"{name}, fixed"
        spent = times[name][which] - (times[fixed][which] if fixed in times else 0.0)
        return spent / (times["read"][which] - times["read, fixed"][which])

    return times, reads


def free_cores(times: Times) -> float:
    """How near the usual read is to the fastest: where somebody else has the core, it is not."""
    return times["read"]["min"] / times["read"]["median"]


def record(kind: str, work: str, vocab: int, seconds: Times, **more: Any) -> Row:
    """What every row has."""
    required = more.pop("required")
    at_most = {name: limit for name, limit in required.items() if name in ("reads", "times", "call_seconds")}
    at_least = {name: limit for name, limit in required.items() if name not in at_most}
    met = all(more[name] <= limit for name, limit in at_most.items())
    met = met and all(more[name] >= limit for name, limit in at_least.items())
    return {
        "kind": kind, "work": work, "vocab": vocab, "isa": fastattn.cpu_isa(), "seconds": seconds, **more,
        "required": required, "met": met,
    }  # fmt: skip


def work_row(work: str, vocab: int, options: Options) -> Row:
    """A random row, batch 1, one thread: reads, and how many times faster than the peers."""
    row, keywords = logits_of("random", vocab), WORK[work]
    ours = sampler(row, options, **keywords)
    calls: Calls = {"fastattn": ours, "fastattn, fixed": sampler(torch.zeros(1, 1), options, **keywords)}
    chain, seeds = transformers_chain(**keywords), count()
    peers: Calls = {"transformers": lambda: chain(row)}
    if work == FIRST:
        topk, sort = torch_topk(**keywords), partial_sort(**keywords)
        peers |= {"torch.topk": lambda: topk(row), "partial_sort": lambda: sort(row, next(seeds))}
    with threads(1):
        times, reads = measured(row, calls, options)
        beside = options.alternate(
            {"fastattn": ours, **peers}, {"fastattn": ours}
        )  # its code stays warm in a model
        draws = draw_times(row, options, **keywords)
    speedups = {
        which: {peer: beside[peer][which] / beside["fastattn"][which] for peer in peers}
        for which in ("min", "median")
    }
    read = times["read"]["min"] - times["read, fixed"]["min"]
    reads_of = {name: (t - times["fastattn, fixed"]["min"]) / read for name, t in draws.items()}
    required = {"reads": READS[work]} | ({"speedup": TRANSFORMERS_SPEEDUP} if work == FIRST else {})
    return record(
        "work", work, vocab, times, beside=beside, draws=draws, reads=reads_of["median"],
        reads_mean=reads_of["mean"], reads_p99=reads_of["p99"], reads_min=reads("fastattn", "min"),
        speedup=speedups["min"]["transformers"], speedups=speedups, free_cores=free_cores(times),
        required=required,
    )  # fmt: skip


def penalties_row(vocab: int, options: Options, dense: bool = False) -> Row:
    """What all penalties add to the first work, in reads."""
    row, keywords = logits_of("random", vocab), WORK[FIRST]
    ids = torch.randperm(vocab, generator=torch.Generator().manual_seed(0))[:SEEN].tolist()
    counts = fastattn.TokenCounts([ids[: SEEN // 2]], vocab)
    for token in ids[SEEN // 2 :]:
        counts.add(torch.tensor([token]))
    one, few = torch.zeros(1, 1), fastattn.TokenCounts([[0]], 1)
    seen = {
        name: dict(zip(("token_counts", "prompt_mask"), lists.dense())) if dense else {"token_counts": lists}
        for name, lists in (("with", counts), ("with, fixed", few))
    }
    calls: Calls = {
        "without": sampler(row, options, **keywords),
        "without, fixed": sampler(one, options, **keywords),
        "with": sampler(row, options, **seen["with"], **PENALTIES, **keywords),
        "with, fixed": sampler(one, options, **seen["with, fixed"], **PENALTIES, **keywords),
    }
    with threads(1):
        times, reads = measured(row, calls, options)
    more = {
        name: reads("with", which) - reads("without", which)
        for name, which in (("reads", "min"), ("reads_median", "median"))
    }
    kind, work = ("dense", ", dense counts") if dense else ("penalties", "")
    return record(
        kind, f"all penalties, {SEEN} tokens seen{work}", vocab, times, **more, free_cores=free_cores(times),
        required={} if dense else {"reads": PENALTY_READS},
    )  # fmt: skip


def adversarial_row(kind: str, work: str, vocab: int, options: Options) -> Row:
    """A row that is meant to hurt, beside a random one: relative time."""
    keywords = WORK[work]
    random, hurt = (logits_of(name, vocab) for name in ("random", kind))
    calls: Calls = {
        "random": sampler(random, options, **keywords), kind: sampler(hurt, options, **keywords),
        "fixed": sampler(torch.zeros(1, 1), options, **keywords), "read": reader(random),
    }  # fmt: skip
    warm = {name: reader(hurt if name == kind else random) for name in calls}
    with threads(1):
        times = options.alternate(calls, warm)
    relative = {
        which: (times[kind][which] - times["fixed"][which]) / (times["random"][which] - times["fixed"][which])
        for which in ("min", "median")
    }
    return record(
        "adversarial", work, vocab, times, row=kind, times=relative["min"], times_median=relative["median"],
        free_cores=free_cores(times), required={"times": ADVERSARIAL_TIMES},
    )  # fmt: skip


def batch_row(work: str, vocab: int, options: Options) -> Row:
    """A batch on one thread and on two, and the same of reading it and doing nothing else."""
    logits = logits_of("random", vocab, BATCH)
    call = sampler(logits, options, **WORK[work])
    calls: Calls = {}
    before: Calls = {}

    def ready(n: int) -> None:
        """As after a model's last layer: the threads are awake. Asleep the second one costs 50 us."""
        torch.set_num_threads(n)
        _C.read_loop(logits.data_ptr(), 1024 * n, n)

    for n in (1, 2):
        name = f"{n} thread{'s' * (n > 1)}"
        read = f"read, {name}"
        calls |= {name: call, read: partial(_C.read_loop, logits.data_ptr(), logits.numel(), n)}
        before |= dict.fromkeys((name, read), partial(ready, n))
    with threads(1):
        times = options.alternate(calls, before)
    more = {
        name: times[f"{prefix}1 thread"][which] / times[f"{prefix}2 threads"][which]
        for prefix, key in (("", "speedup"), ("read, ", "read_speedup"))
        for name, which in ((key, "min"), (f"{key}_median", "median"))
    }
    return record(
        "batch", work, vocab, times, batch=BATCH, **more, free_cores=more["read_speedup"] / 2,
        required={"speedup": THREAD_SPEEDUP},
    )  # fmt: skip


def fixed_calls() -> dict[str, dict[str, Any]]:
    """What a call may be given: keywords beside those of the first work."""
    tensors = {name: torch.tensor([value]) for name, value in {"seeds": 1, **WORK[FIRST]}.items()}
    return {
        "numbers": {},
        "fresh seeds": {"seeds": None},
        "a tensor for each parameter": tensors,
        "all penalties": {**PENALTIES, "token_counts": fastattn.TokenCounts([[0]], 1)},
        "log-probabilities": {"return_logprobs": 1},
    }


def fixed_row(given: str, options: Options) -> Row:
    """One token to choose from: what a call costs before it computes anything."""
    repeat = 200
    call = sampler(torch.zeros(1, 1), options, **{**WORK[FIRST], **fixed_calls()[given]})

    def calls() -> None:
        for _ in range(repeat):
            call()

    with threads(1):
        (times,) = options.alternate({"fastattn": calls}).values()
    seconds = {name: t / repeat for name, t in times.items()}
    return record(
        "fixed", given, 1, {"fastattn": seconds}, call_seconds=seconds["min"],
        required={"call_seconds": FIXED_SECONDS},
    )  # fmt: skip


def line(row: Row) -> str:
    """A row on the terminal."""
    met = "" if row["met"] else "  below what is required"
    if row["kind"] == "fixed":
        return f"{row['call_seconds'] * 1e6:.1f} us{met}"
    if row["kind"] == "batch":
        return (
            f"{row['speedup']:.2f} times one thread (median {row['speedup_median']:.2f}), "
            f"a read {row['read_speedup']:.2f}{met}"
        )
    if row["kind"] == "adversarial":
        return f"{row['times']:.2f} times the random row (median {row['times_median']:.2f}){met}"
    read = row["seconds"]["read"]["min"] * 1e6
    if row["kind"] in ("penalties", "dense"):
        return f"{row['reads']:.2f} reads (median {row['reads_median']:.2f}) of {read:.1f} us more{met}"
    peers = ", ".join(f"{peer} x {times:.1f}" for peer, times in row["speedups"]["min"].items())
    return (
        f"{row['draws']['median'] * 1e6:.1f} us, {row['reads']:.2f} reads (mean {row['reads_mean']:.2f}, slowest 1 % "
        f"{row['reads_p99']:.2f}) of {read:.1f} us, {peers}{met}"
    )


def jobs(options: Options) -> Iterator[Job]:
    """Every row, in the order of the tables."""
    for vocab in VOCABULARIES:
        for work in WORK:
            yield Job("work", f"{work}, {vocab}", lambda w=work, v=vocab: [work_row(w, v, options)])
    for vocab in VOCABULARIES:
        yield Job("penalties", str(vocab), lambda v=vocab: [penalties_row(v, options)])
        yield Job("dense", str(vocab), lambda v=vocab: [penalties_row(v, options, dense=True)])
    for vocab in VOCABULARIES:
        for work in WORK:
            for kind in ADVERSARIAL:
                yield Job(
                    "adversarial", f"{kind}, {work}, {vocab}",
                    lambda k=kind, w=work, v=vocab: [adversarial_row(k, w, v, options)],
                )  # fmt: skip
    for vocab in VOCABULARIES:
        for work in WORK:
            yield Job("batch", f"{work}, {vocab}", lambda w=work, v=vocab: [batch_row(w, v, options)])
    for given in fixed_calls():
        yield Job("fixed", given, lambda g=given: [fixed_row(g, options)])
