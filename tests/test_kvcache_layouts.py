"""Caches of every layout and dtype, against a plain contiguous one in the queries' dtype."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import attention64

from fastattn import attention_with_kvcache

BATCH, NHEADS, NHEADS_K, HEADDIM, CAPACITY = 3, 6, 2, 40, 300
LENGTHS = torch.tensor([200, 7, 64], dtype=torch.int32)


def plain_cache(dtype=torch.float32):
    return [torch.randn(BATCH, CAPACITY, NHEADS_K, HEADDIM).to(dtype) for _ in range(2)]


def query(seqlen_q, dtype=torch.float32):
    new = [torch.randn(BATCH, seqlen_q, NHEADS_K, HEADDIM).to(dtype) for _ in range(2)]
    return torch.randn(BATCH, seqlen_q, NHEADS, HEADDIM).to(dtype), *new


def rotary():
    angle = torch.rand(CAPACITY, 8) * 6
    return {"rotary_cos": angle.cos(), "rotary_sin": angle.sin(), "rotary_interleaved": False}


def paged(cache, page_size):
    """The same tokens in shuffled pages; whatever is in no use is NaN."""
    blocks = -(-CAPACITY // page_size)
    table = torch.randperm(BATCH * blocks + 5)[: BATCH * blocks].view(BATCH, blocks).to(torch.int32)
    pages = torch.full((BATCH * blocks + 5, page_size, NHEADS_K, HEADDIM), math.nan, dtype=cache.dtype)
    for b in range(BATCH):
        for j in range(int(LENGTHS[b])):
            pages[table[b, j // page_size], j % page_size] = cache[b, j]
    return pages, table


def repaged(pages, table):
    return pages[table.long()].flatten(1, 2)  # (batch, blocks * page_size, nheads_k, headdim)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("seqlen_q", [1, 5])
@pytest.mark.parametrize("page_size", [1, 3, 16, 64, 256])
def test_pages_change_nothing(isa, page_size, seqlen_q, backend):
    k_cache, v_cache = plain_cache()
    q, k, v = query(seqlen_q)
    generator = torch.get_rng_state()
    k_pages, table = paged(k_cache, page_size)
    torch.set_rng_state(generator)
    v_pages, table_again = paged(v_cache, page_size)
    assert torch.equal(table, table_again)
    call = {"cache_seqlens": LENGTHS, "causal": True, "backend": backend, "return_lse": True, **rotary()}
    for features in ({}, {"window_size": (50, 0)}, {"softcap": 2.0}, {"alibi_slopes": torch.rand(NHEADS)}):
        caches = [x.clone() for x in (k_cache, v_cache)]
        pages = [x.clone() for x in (k_pages, v_pages)]
        expected = attention_with_kvcache(q, *caches, k, v, **call, **features)
        found = attention_with_kvcache(q, *pages, k, v, block_table=table, **call, **features)
        if backend == "cpu":
            assert torch.equal(found[0], expected[0])
            assert torch.equal(found[1], expected[1])
        torch.testing.assert_close(found, expected)  # PyTorch's own products depend on the shape
        for x, cache in zip(pages, caches):
            for b in range(BATCH):
                used = int(LENGTHS[b]) + seqlen_q
                assert torch.equal(repaged(x, table)[b, :used], cache[b, :used])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_rows_in_another_order(isa, backend):
    k_cache, v_cache = plain_cache()
    order = torch.tensor([2, 0, 1], dtype=torch.int32)
    wide = [
        torch.cat([x, torch.full_like(x, math.nan)]) for x in (k_cache, v_cache)
    ]  # rows that nobody reads
    q, k, v = query(3)
    expected_caches = [x[order.long()].clone() for x in (k_cache, v_cache)]
    call = {"cache_seqlens": LENGTHS, "causal": True, "backend": backend, **rotary()}
    expected = attention_with_kvcache(q, *expected_caches, k, v, **call)
    found = attention_with_kvcache(q, *wide, k, v, cache_batch_idx=order, **call)
    assert torch.equal(found, expected)
    assert torch.equal(wide[0][order.long()], expected_caches[0])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("seqlen_q", [1, 4])
def test_left_padding(isa, seqlen_q, backend):
    """Padding at the left is as if each row's tokens were moved to the front, rotary positions included."""
    k_cache, v_cache = plain_cache()
    pad = torch.tensor([0, 7, 20], dtype=torch.int32)
    q, k, v = query(seqlen_q)
    moved = [torch.stack([x[b].roll(-int(pad[b]), 0) for b in range(BATCH)]) for x in (k_cache, v_cache)]
    for x in (k_cache, v_cache):
        for b in range(BATCH):
            x[b, : pad[b]] = math.nan
    call = {"causal": True, "backend": backend, "return_lse": True, **rotary()}
    expected = attention_with_kvcache(q, *moved, k, v, cache_seqlens=LENGTHS - pad, **call)
    found = attention_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=LENGTHS, cache_leftpad=pad, **call
    )
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    empty = attention_with_kvcache(q, k_cache, v_cache, cache_seqlens=pad, cache_leftpad=pad, backend=backend)
    assert (empty == 0).all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("seqlen_q", [1, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_int8(isa, dtype, seqlen_q, backend):
    """What the cache holds is attended exactly; what it holds is within half a step of what was written."""
    k_cache, v_cache = (torch.zeros(BATCH, CAPACITY, NHEADS_K, HEADDIM, dtype=torch.int8) for _ in range(2))
    k_scale, v_scale = (torch.zeros(BATCH, CAPACITY, NHEADS_K) for _ in range(2))
    past = [torch.randn(BATCH, 200, NHEADS_K, HEADDIM).to(dtype) for _ in range(2)]
    past[0][:, 3] = 0  # a row of zeros has scale 0
    q, k, v = query(seqlen_q, dtype)
    scales = {"k_scale": k_scale, "v_scale": v_scale, "backend": backend}
    attention_with_kvcache(q[:, :1], k_cache, v_cache, *past, cache_seqlens=0, **scales)
    out = attention_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=LENGTHS, causal=True, **scales)
    wide = [c.double() * s[..., None].double() for c, s in ((k_cache, k_scale), (v_cache, v_scale))]
    torch.testing.assert_close(
        wide[0][0, :200], past[0][0].double(), rtol=0, atol=float(k_scale.max()) * 0.5001
    )
    lengths = (LENGTHS + seqlen_q).tolist()
    truth, _ = attention64(q, *wide, causal=True, seqlens_k=lengths)
    torch.testing.assert_close(out.double(), truth, rtol=0, atol=2e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("seqlen_q", [1, 12])
@pytest.mark.parametrize("cache", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_caches_under_float32_queries(isa, cache, seqlen_q, backend):
    k_cache, v_cache = plain_cache(cache)
    q, k, v = query(seqlen_q)
    out = attention_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=LENGTHS, causal=True, backend=backend
    )
    assert out.dtype == torch.float32
    assert torch.equal(k_cache[0, 200 : 200 + seqlen_q], k[0].to(cache))
    truth, _ = attention64(q, k_cache, v_cache, causal=True, seqlens_k=(LENGTHS + seqlen_q).tolist())
    torch.testing.assert_close(out.double(), truth, rtol=0, atol=2e-6)
