"""pytest-benchmark cases, one per operation: ``pytest benchmarks/bench_attention.py --benchmark-autosave``."""

from __future__ import annotations

import pytest
import torch
from shapes import DECODE, FORWARD, TRAINING, Shape
from torch import Tensor

import fastattn

pytestmark = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
CAUSAL = [shape for shape in FORWARD if shape.causal and shape.seqlen_q <= 4096]
ALONE = [shape for shape in DECODE if shape.batch == 1 and shape.seqlen_k <= 8192]


def case(shape: Shape) -> str:
    """A test's id."""
    return f"{shape.model}-{shape.work}".replace(" ", "").replace(",", "-")


def tensors(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v."""
    q = torch.randn(shape.batch, shape.seqlen_q, shape.nheads, shape.headdim).to(dtype)
    k, v = (
        torch.randn(shape.batch, shape.seqlen_k, shape.nheads_k, shape.headdim).to(dtype) for _ in range(2)
    )
    return q, k, v


@pytest.mark.parametrize("shape", CAUSAL, ids=case)
def test_forward(benchmark, shape: Shape, dtype: torch.dtype) -> None:
    """A prompt."""
    benchmark.extra_info.update(flops=shape.flops, threads=torch.get_num_threads(), isa=fastattn.cpu_isa())
    benchmark(fastattn.attention, *tensors(shape, dtype), causal=True, backend="cpu")


@pytest.mark.parametrize("shape", TRAINING, ids=case)
def test_backward(benchmark, shape: Shape, dtype: torch.dtype) -> None:
    """The backward pass alone."""
    benchmark.extra_info.update(flops=shape.training_flops - shape.flops, threads=torch.get_num_threads())
    inputs = [x.requires_grad_() for x in tensors(shape, dtype)]
    out = fastattn.attention(*inputs, causal=True, backend="cpu")
    benchmark(torch.autograd.grad, out, inputs, torch.ones_like(out), retain_graph=True)


@pytest.mark.parametrize("shape", ALONE, ids=case)
def test_decode(benchmark, shape: Shape, dtype: torch.dtype) -> None:
    """One query; the cache stays warm here, ``bench.py`` measures it cold."""
    benchmark.extra_info.update(bytes=shape.kv_bytes(dtype.itemsize), threads=torch.get_num_threads())
    benchmark(fastattn.attention_with_kvcache, *tensors(shape, dtype), backend="cpu")


def test_varlen(benchmark, dtype: torch.dtype) -> None:
    """A packed batch of unequal sequences."""
    lengths = torch.tensor([17, 1024, 300, 2048, 64, 643])
    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)  # (batch + 1,)
    total, longest = int(ends[-1]), int(lengths.max())
    q, k, v = (torch.randn(total, heads, 64).to(dtype) for heads in (12, 4, 4))

    benchmark(
        fastattn.attention_varlen, q, k, v, ends, ends, longest, longest, causal=True, backend="cpu"
    )  # fmt: skip


def test_append(benchmark, dtype: torch.dtype) -> None:
    """A decode step as a model takes it: rotate, append, attend to ragged lengths."""
    batch, seqlen, heads, heads_k, headdim = 8, 2048, 32, 8, 128
    q, k, v = (torch.randn(batch, 1, n, headdim).to(dtype) for n in (heads, heads_k, heads_k))
    k_cache, v_cache = (torch.randn(batch, seqlen, heads_k, headdim).to(dtype) for _ in range(2))
    angles = torch.outer(torch.arange(seqlen), 1e4 ** -torch.linspace(0, 1, headdim // 2))
    lengths = torch.linspace(1, seqlen - 1, batch).to(torch.int32)
    benchmark(
        fastattn.attention_with_kvcache, q, k_cache, v_cache, k, v, cache_seqlens=lengths,
        rotary_cos=angles.cos(), rotary_sin=angles.sin(), causal=True, backend="cpu",
    )  # fmt: skip
