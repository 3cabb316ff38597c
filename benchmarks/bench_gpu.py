"""Attention and sampling on a GPU: ours beside PyTorch SDPA and, where installed, flash-attn and flashinfer.

    python benchmarks/bench_gpu.py [--save] [--quick]

TFLOP/s as a share of a matrix product's, and GB/s as a share of a copy's, both measured in the same run; ``--save``
writes ``benchmarks/results/gpu.json``. Without a GPU it says so and measures nothing.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from measure import RESULTS, Calls, environment, save
from shapes import Shape
from torch.nn.functional import scaled_dot_product_attention as sdpa

import fastattn

MATMUL, COPIED = 8192, 1 << 30  # rows and columns; bytes
FORWARD = [
    Shape("LLaMA 8B", 1, seqlen, seqlen, 32, 8, 128, causal=causal)
    for seqlen in (1024, 4096, 16384)
    for causal in (True, False)
] + [Shape("GPT-2", 8, 1024, 1024, 12, 12, 64, causal=True)]
DECODE = [
    Shape("LLaMA 8B", batch, 1, keys, 32, 8, 128) for batch, keys in ((1, 8192), (32, 2048), (64, 8192))
]
SAMPLING = [(1, 32000), (1, 128256), (64, 128256)]  # batch, vocab
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def refusal() -> str | None:
    """Why nothing can be measured here."""
    reason = fastattn.available_backends()["cuda"]
    return None if reason is None else f"bench_gpu needs a GPU and the CUDA kernels: {reason}"


def tflops(shape: Shape, seconds: float) -> float:
    """Useful TFLOP/s of a forward pass."""
    return shape.flops / seconds / 1e12


def gbytes(shape: Shape, itemsize: int, seconds: float) -> float:
    """GB/s of a decode step, which reads K and V once."""
    return shape.kv_bytes(itemsize) / seconds / 1e9


def matmul_flops() -> float:
    """Of the square product that stands for the GPU's peak."""
    return 2.0 * MATMUL**3


def seconds_per_call(calls: Calls, rounds: int, repeats: int = 10) -> dict[str, float]:
    """The median by name; the calls take turns, and events on the GPU take the time."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(repeats):
                call()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) / 1e3 / repeats)
    return {name: statistics.median(each) for name, each in times.items()}


def peers(shape: Shape, q: Any, k: Any, v: Any) -> Calls:
    """Ours and whoever is installed, on q, k, v (batch, seqlen, heads, headdim)."""
    turned = [x.transpose(1, 2) for x in (q, k, v)]  # (batch, heads, seqlen, headdim)
    calls: dict[str, Callable[[], Any]] = {
        "fastattn": lambda: fastattn.attention(q, k, v, causal=shape.causal, backend="cuda"),
        "torch SDPA": lambda: sdpa(*turned, is_causal=shape.causal, enable_gqa=True),
    }
    if q.dtype == torch.float32:
        return calls
    if find_spec("flash_attn"):
        from flash_attn import flash_attn_func

        calls["flash-attn"] = lambda: flash_attn_func(q, k, v, causal=shape.causal)
    if find_spec("flashinfer") and shape.batch == 1:
        import flashinfer

        calls["flashinfer"] = lambda: flashinfer.single_prefill_with_kv_cache(
            q[0], k[0], v[0], causal=shape.causal
        )
    return calls


def attention_row(shape: Shape, name: str, rounds: int) -> dict[str, Any]:
    """One shape in one dtype, with the limit that bounds it."""
    dtype, decode = DTYPES[name], shape.seqlen_q == 1
    sizes = ((shape.seqlen_q, shape.nheads), *2 * ((shape.seqlen_k, shape.nheads_k),))
    q, k, v = (
        torch.randn(shape.batch, n, heads, shape.headdim, device="cuda", dtype=dtype) for n, heads in sizes
    )
    calls = peers(shape, q, k, v)
    if decode:
        source = torch.zeros(COPIED, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        seconds = seconds_per_call(calls | {"limit": lambda: target.copy_(source)}, rounds)
        rate = {who: gbytes(shape, dtype.itemsize, t) for who, t in seconds.items()}
        rate["limit"] = 2 * COPIED / seconds["limit"] / 1e9  # read and written
    else:
        a, b = (torch.randn(MATMUL, MATMUL, device="cuda", dtype=dtype) for _ in range(2))
        seconds = seconds_per_call(calls | {"limit": lambda: a @ b}, rounds)
        rate = {who: tflops(shape, t) for who, t in seconds.items()}
        rate["limit"] = matmul_flops() / seconds["limit"] / 1e12
    return {
        "kind": "decode" if decode else "forward",
        "model": shape.model,
        "sizes": (shape.batch, shape.seqlen_q, shape.seqlen_k, shape.nheads, shape.nheads_k, shape.headdim),
        "causal": shape.causal,
        "dtype": name,
        "unit": "GB/s" if decode else "TFLOP/s",
        "seconds": seconds,
        "rate": rate,
        "share": {who: r / rate["limit"] for who, r in rate.items() if who != "limit"},
    }


def sampling_row(batch: int, vocab: int, rounds: int) -> dict[str, Any]:
    """A token per row: temperature, top_k 50 and top_p 0.9."""
    logits = 3 * torch.randn(batch, vocab, device="cuda")
    seeds = torch.arange(batch, device="cuda")

    def composed() -> Any:
        best, ids = logits.topk(50)
        probs = best.softmax(1)
        probs = torch.where(probs.cumsum(1) - probs < 0.9, probs, 0.0)
        return ids.gather(1, probs.multinomial(1))

    calls: Calls = {
        "fastattn": lambda: fastattn.sample(logits, top_k=50, top_p=0.9, seeds=seeds, backend="cuda"),
        "torch topk + multinomial": composed,
    }
    return {"kind": "sampling", "sizes": (batch, vocab), "seconds": seconds_per_call(calls, rounds)}


def main() -> None:
    """The whole table, printed and saved if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--quick", action="store_true", help="3 rounds instead of 20")
    options = parser.parse_args()
    if reason := refusal():
        raise SystemExit(reason)
    rounds, rows = 3 if options.quick else 20, []
    for name in DTYPES:
        for shape in (*FORWARD, *DECODE):
            row = attention_row(shape, name, rounds)
            print(
                row["kind"],
                row["sizes"],
                name,
                {who: f"{r:.1f} {row['unit']}" for who, r in row["rate"].items()},
            )
            rows.append(row)
    for batch, vocab in SAMPLING:
        row = sampling_row(batch, vocab, rounds)
        print(row["kind"], row["sizes"], {who: f"{t * 1e6:.1f} us" for who, t in row["seconds"].items()})
        rows.append(row)
    if options.save:
        save(
            RESULTS / "gpu.json",
            {"gpu": torch.cuda.get_device_name(), "environment": environment(), "rows": rows},
        )


if __name__ == "__main__":
    main()
