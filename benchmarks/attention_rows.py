"""How every figure of ``bench.py attention`` is taken: one function per kind, one row per figure.

In each row ours, torch SDPA and the limit that bounds them take turns in one loop. The share of the read bandwidth is
that of the bandwidth in that loop: it drifts by the minute on a machine with neighbours. The FMA peak does not; where
FMAs in the loop fall short of it someone else had the cores, and the row is measured again. Both sides get their own
layout, contiguous: (batch, seqlen, heads, dim) and torch's (batch, heads, seqlen, dim).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import shapes
import torch
import torch.nn.functional as F
from measure import ROOT, Calls, Limit, Times, alternate, fma_limit, rate_of, read_limit
from memory import memory_row
from shapes import Shape, required
from torch import Tensor

import fastattn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WIDE = ("float32", "bfloat16")  # the dtypes of everything but the plain forward pass
MAX_BYTES = 3.2e9  # of the tensors of one row: what a small machine has
COLD_BYTES = 256 << 20  # a decode step finds its layer's cache cold: calls rotate over copies, beyond any L3
Row = dict[str, Any]


class SkipRow(Exception):
    """This row cannot be measured here; the message says why."""


@dataclass(frozen=True)
class Options:
    """What the command line chose."""

    backend: str = "cpu"
    quick: bool = False  # few shapes, few rounds: for development, never published

    def alternate(self, calls: Calls, before: Calls | None = None) -> Times:
        """``measure.alternate`` at the length that this run can afford."""
        return alternate(calls, 0.05, 2, before) if self.quick else alternate(calls, before=before)


class Job(NamedTuple):
    """One row to be measured."""

    kind: str
    label: str
    run: Callable[[], list[Row]]


class Peak:
    """The highest FMA rate that this run has seen, FLOP/s."""

    best = 0.0

    def saw(self, rate: float) -> None:
        """Another measurement."""
        self.best = max(self.best, rate)


PEAK = Peak()


@cache
def read_limit_once() -> Limit:
    """Its buffer takes a while to fill."""
    return read_limit()


def disturbed(row: Row) -> bool:
    """Whether somebody else had the cores while this row was measured."""
    return row.get("free_cores", 1.0) < 0.9


def wait_for_quiet(seconds: float = 60.0) -> None:
    """Until nobody else has the cores, or for so long."""
    limit, end = fma_limit(), time.perf_counter() + seconds
    while time.perf_counter() < end:
        PEAK.saw(rate_of(limit, 0.2))
        if rate_of(limit, 0.2, "median") > 0.95 * PEAK.best:
            return
        time.sleep(1.0)


def judge(row: Row, need: dict[str, float]) -> Row:
    """Adds what is required, and whether the row meets it."""
    got = {"share": row.get("share_of_limit"), "speedup": row.get("speedup")}
    met = all(got[name] is not None and got[name] >= least for name, least in need.items())
    return {**row, "required": need, "met": met}


def race(
    kind: str, shape: Shape, dtype: str, calls: Calls, work: float, limit: Limit, options: Options,
    before: Calls | None = None,
) -> Row:  # fmt: skip
    """Ours, SDPA (if it is among the calls) and the limit, taking turns."""
    fma = fma_limit()
    times = options.alternate({"limit": limit.call, "fma": fma.call, **calls}, before)
    bound, cores = (times.pop(name) for name in ("limit", "fma"))
    PEAK.saw(fma.work / cores["min"])
    row = {
        "kind": kind, **shape.record(), "dtype": dtype, "threads": torch.get_num_threads(), "unit": limit.unit,
        "isa": fastattn.cpu_isa(), "seconds": times, "rate": {peer: work / t["min"] for peer, t in times.items()},
        "rate_median": {peer: work / t["median"] for peer, t in times.items()},
        "limit": limit.work / bound["min"], "fma_rate": fma.work / cores["median"],
    }  # fmt: skip
    if "sdpa" in times:
        for name, which in (("speedup", "min"), ("speedup_median", "median")):
            row[name] = times["sdpa"][which] / times["fastattn"][which]
    return settle({**row, "required": required(kind, shape, dtype)})


def settle(row: Row) -> Row:
    """Fills in what depends on the FMA peak: rows measured while the cores were taken learn a higher one later."""
    if row.get("isa") != fastattn.cpu_isa():  # of another process, or not bound by a limit
        return row
    limit = PEAK.best if row["unit"] == "GFLOP/s" else row["limit"]
    row = {
        **row, "limit": limit, "free_cores": row["fma_rate"] / PEAK.best,
        "share_of_limit": row["rate"]["fastattn"] / limit, "share_median": row["rate_median"]["fastattn"] / limit,
    }  # fmt: skip
    return judge(row, row["required"])


def tensors(shape: Shape, dtype: str) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v in our layout."""
    q = torch.randn(shape.batch, shape.seqlen_q, shape.nheads, shape.headdim).to(DTYPES[dtype])
    k, v = (
        torch.randn(shape.batch, shape.seqlen_k, shape.nheads_k, shape.headdim).to(DTYPES[dtype])
        for _ in range(2)
    )
    return q, k, v  # (batch, seqlen, heads, headdim)


def torch_layout(*xs: Tensor) -> list[Tensor]:
    """(batch, heads, seqlen, headdim), contiguous."""
    return [x.transpose(1, 2).contiguous() for x in xs]


def forward_row(kind: str, shape: Shape, dtype: str, options: Options, alone: bool = False) -> Row:
    """Prompts: GFLOP/s against the FMA peak; short batches too, with their padding mask or position bias."""
    q, k, v = tensors(shape, dtype)
    qt, kt, vt = torch_layout(q, k, v)
    ours: dict[str, Any] = {"causal": shape.causal, "backend": options.backend}
    theirs: dict[str, Any] = {"is_causal": shape.causal, "enable_gqa": shape.nheads != shape.nheads_k}
    work = shape.flops
    if shape.extra == "padding mask":  # BERT: the keys of each sequence end somewhere
        ends = torch.linspace(shape.seqlen_k / 2, shape.seqlen_k, shape.batch).long()
        mask = (torch.arange(shape.seqlen_k) < ends[:, None])[:, None, None]  # (batch, 1, 1, seqlen_k)
        ours["attn_mask"] = theirs["attn_mask"] = mask
        work *= mask.float().mean().item()
    elif shape.extra == "position bias":  # T5: learned, the same for the whole batch, and no scale
        bias = torch.randn(1, shape.nheads, shape.seqlen_q, shape.seqlen_k).to(DTYPES[dtype])
        ours |= {"attn_bias": bias, "softmax_scale": 1.0}
        theirs |= {"attn_mask": bias, "scale": 1.0}
    calls: Calls = {"fastattn": lambda: fastattn.attention(q, k, v, **ours)}
    if not alone:
        calls["sdpa"] = lambda: F.scaled_dot_product_attention(qt, kt, vt, **theirs)
    with torch.no_grad():
        return race(kind, shape, dtype, calls, work, fma_limit(), options)


def training_row(shape: Shape, dtype: str, options: Options) -> Row:
    """Forward and backward: GFLOP/s against the FMA peak."""
    ours = [x.requires_grad_() for x in tensors(shape, dtype)]
    theirs = [x.detach().requires_grad_() for x in torch_layout(*ours)]
    gqa = shape.nheads != shape.nheads_k
    dout = torch.randn_like(ours[0])  # headdim_v == headdim
    (dout_t,) = torch_layout(dout)

    def fastattn_step() -> None:
        out = fastattn.attention(*ours, causal=shape.causal, backend=options.backend)
        torch.autograd.grad(out, ours, dout)

    def sdpa_step() -> None:
        out = F.scaled_dot_product_attention(*theirs, is_causal=shape.causal, enable_gqa=gqa)
        torch.autograd.grad(out, theirs, dout_t)

    calls: Calls = {"fastattn": fastattn_step, "sdpa": sdpa_step}
    return race("training", shape, dtype, calls, shape.training_flops, fma_limit(), options)


def decode_row(shape: Shape, dtype: str, options: Options) -> Row:
    """One query on a cold cache: GB/s of K and V against the read bandwidth."""
    size = shape.kv_bytes(DTYPES[dtype].itemsize)
    copies = -(-COLD_BYTES // size)
    if 2 * copies * size > MAX_BYTES:
        raise SkipRow(f"K and V in both layouts take {2 * copies * size / 1e9:.1f} GB")
    q, k, v = tensors(shape, dtype)
    (qt,) = torch_layout(q)
    caches = [(k, v), *((k.clone(), v.clone()) for _ in range(copies - 1))]
    turn, turn_t = cycle(caches), cycle([torch_layout(*kv) for kv in caches])
    gqa = shape.nheads != shape.nheads_k
    lengths = torch.full((shape.batch,), shape.seqlen_k, dtype=torch.int32)

    def fastattn_step(k: Tensor, v: Tensor, lengths: Tensor) -> None:
        fastattn.attention_with_kvcache(q, k, v, cache_seqlens=lengths, backend=options.backend)

    def sdpa_step(k: Tensor, v: Tensor) -> None:
        F.scaled_dot_product_attention(qt, k, v, enable_gqa=gqa)

    calls: Calls = {
        "fastattn": lambda: fastattn_step(*next(turn), lengths),
        "sdpa": lambda: sdpa_step(*next(turn_t)),
    }
    # Reading the limit's buffer also pushes Python's own code out of the caches, which in a model stays: 0.1 ms a call.
    one, first = [x[:, :1].clone() for x in (k, v)], torch.ones_like(lengths)
    one_t = torch_layout(*one)
    warm: Calls = {"fastattn": lambda: fastattn_step(*one, first), "sdpa": lambda: sdpa_step(*one_t)}
    with torch.no_grad():
        return race("decode", shape, dtype, calls, size, read_limit_once(), options, warm)


def overhead_row(options: Options) -> Row:
    """One token, one key: what a call costs before it computes anything; seconds of one call."""
    repeat = 1000
    q, k, v = tensors(shapes.SMALLEST, "float32")
    qt, kt, vt = torch_layout(q, k, v)

    def fastattn_calls() -> None:
        for _ in range(repeat):
            fastattn.attention(q, k, v, backend=options.backend)

    def sdpa_calls() -> None:
        for _ in range(repeat):
            F.scaled_dot_product_attention(qt, kt, vt)

    with torch.no_grad():
        times = options.alternate({"fastattn": fastattn_calls, "sdpa": sdpa_calls})
    seconds = {peer: {name: t / repeat for name, t in both.items()} for peer, both in times.items()}
    row = {
        "kind": "overhead", **shapes.SMALLEST.record(), "dtype": "float32", "threads": torch.get_num_threads(),
        "seconds": seconds, "speedup": seconds["sdpa"]["min"] / seconds["fastattn"]["min"],
        "speedup_median": seconds["sdpa"]["median"] / seconds["fastattn"]["median"],
    }  # fmt: skip
    return judge(row, {"speedup": 1.0})


def feature_calls(shape: Shape) -> dict[str, dict[str, Any]]:
    """Keywords of ``attention`` by the feature's name."""
    scores = (1, shape.nheads, shape.seqlen_q, shape.seqlen_k)
    return {
        "window 256": {"window_size": shapes.WINDOWED.window},
        "softcap": {"softcap": 30.0},
        "ALiBi": {"alibi_slopes": 2.0 ** -torch.linspace(0.5, 8, shape.nheads)},
        "bias per head": {"attn_bias": torch.randn(scores)},
        "mask, all True": {"attn_mask": torch.ones(scores[2:], dtype=torch.bool)},
        "dropout 0.1": {"dropout_p": 0.1},
        "sinks": {"sinks": torch.randn(shape.nheads)},
    }


def feature_row(feature: str, options: Options) -> Row:
    """The forward pass with a feature, beside the same without: relative time."""
    shape = shapes.FEATURES
    q, k, v = tensors(shape, "float32")
    attend = partial(fastattn.attention, q, k, v, causal=shape.causal, backend=options.backend)
    keywords = feature_calls(shape)[feature]
    with torch.no_grad():
        times = options.alternate({"plain": attend, "feature": lambda: attend(**keywords)})
    relative = {which: times["feature"][which] / times["plain"][which] for which in ("min", "median")}
    row = {
        "kind": "feature", "feature": feature, **shape.record(), "dtype": "float32",
        "threads": torch.get_num_threads(), "seconds": times, "relative": relative,
    }  # fmt: skip
    return {**row, "required": {}, "met": True}


def avx2_rows(options: Options) -> Iterator[Job]:
    """The forward shapes under the AVX2 kernels, beside their own FMA peak: run by ``forced_avx2``."""
    for shape in shapes.AVX2:
        for dtype in WIDE:
            yield Job(
                "avx2",
                label(shape, dtype),
                lambda s=shape, d=dtype: [forward_row("avx2", s, d, options, alone=True)],
            )


def forced_avx2(options: Options) -> list[Row]:
    """The ISA is chosen at import: the AVX2 rows come from a process of their own."""
    if "avx2" not in fastattn.cpu_isas():
        raise SkipRow(f"this machine's instruction sets: {', '.join(fastattn.cpu_isas())}")
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "avx2.json"
        command = [sys.executable, __file__.replace("attention_rows", "bench"), "attention", "--only", "avx2"]
        command += ["--threads", str(torch.get_num_threads()), "--output", str(result)]
        environ = {**os.environ, "FASTATTN_CPU_ISA": "avx2", "PYTHONPATH": str(ROOT)}
        subprocess.run(command + ["--quick"] * options.quick, env=environ, check=True)
        return json.loads(result.read_text())["rows"]


def label(shape: Shape, dtype: str = "") -> str:
    """How a row is called on the terminal."""
    return f"{shape.model}: {shape.work} ({shape.heads}) {dtype}".strip()


def jobs(options: Options) -> Iterator[Job]:
    """Every row, in the order of the tables."""
    for shape in shapes.FORWARD:
        for dtype in DTYPES:
            yield Job(
                "forward",
                label(shape, dtype),
                lambda s=shape, d=dtype: [forward_row("forward", s, d, options)],
            )
    for shape in shapes.TRAINING:
        for dtype in WIDE:
            yield Job("training", label(shape, dtype), lambda s=shape, d=dtype: [training_row(s, d, options)])
    for shape in shapes.DECODE:
        for dtype in WIDE:
            yield Job("decode", label(shape, dtype), lambda s=shape, d=dtype: [decode_row(s, d, options)])
    for shape in shapes.SHORT:
        for dtype in WIDE:
            yield Job(
                "short", label(shape, dtype), lambda s=shape, d=dtype: [forward_row("short", s, d, options)]
            )
    yield Job("overhead", label(shapes.SMALLEST), lambda: [overhead_row(options)])
    for shape in shapes.MEMORY:
        for dtype in WIDE:
            for work in ("forward", "training"):
                yield Job(
                    "memory", f"{label(shape, dtype)} {work}",
                    lambda s=shape, d=dtype, w=work: [memory_row(s, d, w, options.backend)],
                )  # fmt: skip
    for feature in feature_calls(shapes.SMALLEST):
        yield Job("feature", feature, lambda f=feature: [feature_row(f, options)])
    if os.environ.get("FASTATTN_CPU_ISA") == "avx2":
        yield from avx2_rows(options)
    else:
        yield Job("avx2", "AVX2 forced", lambda: forced_avx2(options))
