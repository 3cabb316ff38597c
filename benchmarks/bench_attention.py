"""pytest-benchmark cases of attention: ``pytest benchmarks/bench_attention.py --benchmark-autosave``."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from shapes import DECODE, FORWARD, Shape

import fastattn


@pytest.mark.parametrize("implementation", ["fastattn", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "shape", FORWARD + DECODE, ids=lambda s: f"{s.model}-{s.seqlen_q}x{s.seqlen_k}-causal{s.causal}"
)
def test_attention(benchmark, shape: Shape, dtype: torch.dtype, implementation: str) -> None:
    """One group per shape and dtype; compare within a group only."""
    benchmark.group = f"{shape.model} {shape.seqlen_q}x{shape.seqlen_k} causal={shape.causal} {dtype}"
    benchmark.extra_info.update(flops=shape.flops, threads=torch.get_num_threads(), isa=fastattn.cpu_isa())
    q = torch.randn(shape.batch, shape.seqlen_q, shape.nheads, shape.headdim).to(dtype)
    k, v = (
        torch.randn(shape.batch, shape.seqlen_k, shape.nheads_k, shape.headdim).to(dtype) for _ in range(2)
    )
    if implementation == "fastattn":
        benchmark(fastattn.attention, q, k, v, causal=shape.causal, backend="cpu")
    else:
        qt, kt, vt = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        gqa = shape.nheads != shape.nheads_k
        benchmark(F.scaled_dot_product_attention, qt, kt, vt, is_causal=shape.causal, enable_gqa=gqa)
