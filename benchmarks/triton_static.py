"""What Triton's compiler makes of our kernels, without a GPU: registers, spills, shared memory, tensor instructions.

``python benchmarks/triton_static.py`` compiles every case ahead of time for every target and prints the table; with
``--save`` it writes ``benchmarks/results/triton_static.json``, the budget that ``tests/test_triton_static.py`` holds.
These are static figures: they say nothing about time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RESULTS = Path(__file__).parent / "results" / "triton_static.json"
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "sm_120": ("cuda", 120, 32),
    "gfx942": ("hip", "gfx942", 64),
}
FLOAT = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
TYPES = FLOAT | {torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8", torch.bool: "i1"}
TENSOR_INSTRUCTIONS = {
    "HMMA": r"mma\.sync",
    "HGMMA": r"wgmma\.mma_async",
    "UTCMMA": r"tcgen05\.mma",
    "MFMA": "v_mfma",
}


def cases() -> dict[str, Callable[[], Any]]:
    """Calls by name; each runs host functions of ``fastattn.kernels``."""
    from fastattn import TokenCounts
    from fastattn.args import AttentionArgs, KVAppendArgs, LogitEdits, SamplingArgs
    from fastattn.kernels import (
        attention,
        attention_backward,
        decode,
        sampling,
        sampling_edits,
        sampling_logprobs,
    )

    def call(headdim: int, dtype: torch.dtype, seqlen_q: int = 1024, **more: Any) -> AttentionArgs:
        q, k = (torch.empty(2, n, heads, headdim, dtype=dtype) for n, heads in ((seqlen_q, 8), (1024, 2)))
        return AttentionArgs(q=q, k=k, v=k, softmax_scale=0.125, **more)

    def backward(args: AttentionArgs) -> None:
        lse = torch.empty(2, 8, 1024)
        attention_backward.backward(args, args.q, lse, args.q, None, needs_dbias=False)

    def paged(args: AttentionArgs) -> AttentionArgs:
        table = torch.zeros(2, 64, dtype=torch.int32)
        pages = torch.empty(128, 16, 2, args.q.shape[3], dtype=args.q.dtype)
        return replace(args, k=pages, v=pages, block_table=table, seqlens_k=table[:, 0])

    def append() -> None:
        q, cache, new = (
            torch.empty(2, n, heads, 128, dtype=half) for n, heads in ((1, 8), (1024, 2), (1, 2))
        )
        turns, seqlens = torch.empty(1024, 64), torch.zeros(2, dtype=torch.int32)
        decode.append(KVAppendArgs(q, cache, cache, seqlens, new, new, turns, turns))

    half, bf16, f32 = torch.float16, torch.bfloat16, torch.float32
    every = {
        "window_size": (256, 0), "alibi_slopes": torch.ones(8), "sinks": torch.ones(8),
        "attn_bias": torch.empty(1, 8, 1024, 1024), "attn_mask": torch.ones(1, 1, 1024, 1024, dtype=torch.bool),
        "dropout_p": 0.1, "rng_state": torch.zeros(2, dtype=torch.int64),
    }  # fmt: skip
    logits = torch.empty(2, 128256)

    bias = (torch.zeros(2, 300, dtype=torch.int64), torch.empty(2, 300))
    edits = LogitEdits(
        bias, torch.ones(2, 128256 // 32, dtype=torch.int32), 1.1, 0.5, 0.5, TokenCounts(2, 128256)
    )
    sampled = SamplingArgs(logits, 1.0, 50, 0.9, 0.0, 1, 2, edits, logprobs=20)
    return {
        "forward fp16 D=64": lambda: attention.forward(call(64, half)),
        "forward bf16 D=128 causal": lambda: attention.forward(call(128, bf16, causal=True)),
        "forward bf16 D=128 every feature": lambda: attention.forward(call(128, bf16, **every)),
        "forward bf16 D=256 causal": lambda: attention.forward(call(256, bf16, causal=True)),
        "forward fp32 D=64 causal": lambda: attention.forward(call(64, f32, causal=True)),
        "decode fp16 D=128": lambda: decode.decode(call(128, half, 1)),
        "decode bf16 D=128 paged": lambda: decode.decode(paged(call(128, bf16, 1, causal=True))),
        "append fp16 D=128 rotary": append,
        "backward fp16 D=64": lambda: backward(call(64, half)),
        "backward bf16 D=128 causal": lambda: backward(call(128, bf16, causal=True)),
        "sampling fp32": lambda: sampling.sample(SamplingArgs(logits, 1.0, 50, 0.9, 0.0, 1, 2)),
        "sampling fp32 edits": lambda: sampling_edits.edited(sampled),
        "sampling fp32 log-probabilities": lambda: sampling_logprobs.rank(
            sampled, torch.zeros(2, dtype=torch.int64)
        ),
    }


def launches(case: Callable[[], Any], target: str) -> list[tuple[Any, dict[str, Any]]]:
    """The kernels that a call would launch on that target, with their arguments; nothing runs."""
    from fastattn.kernels import launch

    found = []

    def record(kernel: Any, grid: Any, config: dict[str, int], **call: Any) -> None:
        found.append((kernel.function, call | config | kernel.options))

    launch_kernel, hip = launch.Kernel.launch, torch.version.hip
    launch.Kernel.launch = record  # type: ignore[method-assign]
    torch.version.hip = "6" if target.startswith("gfx") else None
    try:
        case()
    finally:
        launch.Kernel.launch = launch_kernel  # type: ignore[method-assign]
        torch.version.hip = hip
    return found


def compiled(function: Any, call: dict[str, Any], target: str) -> Any:
    """What ``triton.compile`` gives for this launch, specialised as a launch would be."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    options = {n: call.pop(n) for n in ("num_warps", "num_stages", "enable_fp_fusion") if n in call}
    for index, param in enumerate(function.params):
        value = call[param.name]
        signature[param.name] = "constexpr"
        if isinstance(value, Tensor):
            signature[param.name] = "*" + TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif (
            param.is_constexpr
            or value is None
            or (value == 1 and not param.do_not_specialize and type(value) is int)
        ):
            constants[param.name] = value
        elif isinstance(value, float):
            signature[param.name] = "fp32"
        else:
            signature[param.name] = "i32"
            if value % 16 == 0 and not param.do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)


def figures(kernel: Any) -> dict[str, Any]:
    """Registers, spilled bytes or registers, shared memory and tensor instructions of a compiled kernel."""
    text = kernel.asm.get("ptx") or kernel.asm["amdgcn"]
    found = {name: len(re.findall(pattern, text)) for name, pattern in TENSOR_INSTRUCTIONS.items()}
    tensor = {name: n for name, n in found.items() if n}
    row: dict[str, Any] = {
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "tensor": tensor,
    }
    if "cubin" not in kernel.asm:
        counts = {
            n: int(re.findall(rf"\.{n}:\s+(\d+)", text)[-1]) for n in ("vgpr_count", "vgpr_spill_count")
        }
        return row | {"registers": counts["vgpr_count"], "spills": counts["vgpr_spill_count"]}
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", usage)[-1]
    return row | {"registers": int(registers), "spills": int(stack)}


def measure(job: tuple[str, str]) -> dict[str, dict[str, Any]]:
    """One case on one target: a row for each kernel that it launches."""
    name, target = job
    rows = {}
    for function, call in launches(cases()[name], target):
        rows[f"{target} | {name} | {function.__name__}"] = figures(compiled(function, call, target))
    return rows


def measure_all(processes: int = 2) -> dict[str, dict[str, Any]]:
    """Every case on every target."""
    jobs = [(name, target) for target in TARGETS for name in cases()]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        return {row: found for rows in pool.map(measure, jobs, chunksize=2) for row, found in rows.items()}


def main() -> None:
    import triton

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--only", default="", help="substring of the case's name")
    given = parser.parse_args()
    if given.only:
        rows = {}
        for target in TARGETS:
            for name in cases():
                if given.only in name:
                    rows |= measure((name, target))
    else:
        rows = measure_all()
    for name, row in rows.items():
        print(f"{name:80} {row}")
    if given.save:
        RESULTS.write_text(json.dumps({"triton": triton.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
