"""Peak memory above inputs and outputs, each figure in a fresh process: Linux's high-water mark of the resident set.

python benchmarks/memory.py '{"who": "fastattn", "work": "forward", ...}'    (started by ``memory_row``)
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measure import ROOT
from shapes import Shape
from torch import Tensor

import fastattn

BYTES_PER_THREAD = 8 << 20  # tiles, partial results, stacks: O(threads x tile), whatever the seqlen

# glibc hands freed memory back, or what was freed before the call would hide what the call takes.
RETURN_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def memory_row(shape: Shape, dtype: str, work: str, backend: str) -> dict[str, Any]:
    """Bytes above inputs and outputs of one call, ours and SDPA's; ``work`` is "forward" or "training"."""
    threads = torch.get_num_threads()
    spec = {"work": work, "shape": vars(shape), "dtype": dtype, "threads": threads, "backend": backend}
    above = {who: _in_a_process({"who": who, **spec}) for who in ("fastattn", "sdpa")}
    allowed = threads * BYTES_PER_THREAD
    if work == "training" and dtype != "float32":  # fp32 accumulators of the gradients of q, k and v
        allowed += 4 * shape.headdim * shape.batch * (
            shape.seqlen_q * shape.nheads + 2 * shape.seqlen_k * shape.nheads_k
        )  # fmt: skip
    return {
        "kind": "memory", **shape.record(), "pass": work, "dtype": dtype, "threads": threads, "bytes_above": above,
        "required": {"bytes_above": allowed}, "met": above["fastattn"] <= allowed,
    }  # fmt: skip


def _in_a_process(spec: dict[str, Any]) -> int:
    environ = {**os.environ, "PYTHONPATH": str(ROOT), **RETURN_AT_ONCE}
    run = subprocess.run(
        [sys.executable, __file__, json.dumps(spec)], env=environ, capture_output=True, text=True
    )
    if run.returncode:
        error, _, message = run.stderr.strip().splitlines()[-1].partition(": ")
        raise NotImplementedError(message) if error == "NotImplementedError" else RuntimeError(run.stderr)
    return int(run.stdout)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def main() -> None:
    spec = json.loads(sys.argv[1])
    torch.set_num_threads(spec["threads"])
    shape, dtype, training = Shape(**spec["shape"]), getattr(torch, spec["dtype"]), spec["work"] == "training"

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if spec["who"] == "fastattn":
            return fastattn.attention(q, k, v, causal=shape.causal, backend=spec["backend"])
        return F.scaled_dot_product_attention(q, k, v, is_causal=shape.causal)

    def tensors(seqlen: int) -> list[Tensor]:
        size = (shape.batch, seqlen, shape.nheads, shape.headdim)
        if spec["who"] == "sdpa":
            size = (shape.batch, shape.nheads, seqlen, shape.headdim)
        return [torch.randn(size, dtype=dtype) for _ in range(4)]

    def step(inputs: list[Tensor]) -> list[Tensor]:
        q, k, v, dout = inputs
        if not training:
            return [attend(q, k, v)]
        for x in (q, k, v):
            x.requires_grad_()
        out = attend(q, k, v)
        return [out, *torch.autograd.grad(out, (q, k, v), dout)]

    step(tensors(1))  # the code itself, and autograd's threads
    inputs = tensors(shape.seqlen_q)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _status("VmRSS")
    outputs = step(inputs)
    peak = _status("VmHWM")
    size = sum(x.numel() * x.element_size() for x in outputs)
    if training:
        size += shape.batch * shape.nheads * shape.seqlen_q * 4  # lse, which the backward pass needs
    print(max(0, peak - before - size))


if __name__ == "__main__":
    main()
