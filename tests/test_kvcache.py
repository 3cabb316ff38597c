"""attention_with_kvcache: append in place, rotary, ragged lengths; against float64 and to the bit."""

from __future__ import annotations

import math
import sys
from itertools import pairwise

import pytest
import torch
from oracles import attention64

from fastattn import attention, attention_with_kvcache

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def rotate64(x, cos, sin, positions, interleaved):
    """Rotary by complex multiplication: x (seqlen, heads, headdim), positions (seqlen,)."""
    half = cos.shape[1]
    x = x.double()
    pairs = (
        x[..., : 2 * half].reshape(*x.shape[:-1], half, 2)
        if interleaved
        else torch.stack((x[..., :half], x[..., half : 2 * half]), dim=-1)
    )
    angle = torch.complex(cos.double(), sin.double())[positions][:, None]
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * angle)
    turned = turned.flatten(-2) if interleaved else torch.cat((turned[..., 0], turned[..., 1]), dim=-1)
    return torch.cat((turned, x[..., 2 * half :]), dim=-1)


def rotary_table(positions, rotary_dim):
    inv_freq = 10000.0 ** (-torch.arange(0, rotary_dim, 2) / rotary_dim)
    angles = torch.arange(positions)[:, None] * inv_freq
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("rotary_dim", [0, 16, 40])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("seqlen_new", [1, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_append_rotate_attend(dtype, seqlen_new, causal, rotary_dim, interleaved, backend):
    batch, nheads, nheads_k, headdim, capacity = 3, 6, 2, 40, 90
    seqlens = [0, 80, 33]
    q = torch.randn(batch, seqlen_new, nheads, headdim).to(dtype)
    k, v = (torch.randn(batch, seqlen_new, nheads_k, headdim).to(dtype) for _ in range(2))
    k_cache, v_cache = (
        torch.full((batch, capacity, nheads_k, headdim), math.nan).to(dtype) for _ in range(2)
    )
    for row, length in enumerate(seqlens):
        k_cache[row, :length] = torch.randn(length, nheads_k, headdim).to(dtype)
        v_cache[row, :length] = torch.randn(length, nheads_k, headdim).to(dtype)
    before_k, before_v = k_cache.clone(), v_cache.clone()
    cos, sin = rotary_table(capacity, rotary_dim) if rotary_dim else (None, None)
    lengths = torch.tensor(seqlens, dtype=torch.int32)

    out, lse = attention_with_kvcache(
        q,
        k_cache,
        v_cache,
        k,
        v,
        cache_seqlens=lengths,
        rotary_cos=cos,
        rotary_sin=sin,
        rotary_interleaved=interleaved,
        causal=causal,
        return_lse=True,
        backend=backend,
    )

    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    for row, length in enumerate(seqlens):
        end = length + seqlen_new
        assert torch.equal(v_cache[row, length:end], v[row])
        for cache, before in ((k_cache, before_k), (v_cache, before_v)):
            assert torch.equal(cache[row, :length], before[row, :length])
            assert cache[row, end:].isnan().all()
        queries, keys = q[row].double(), k[row].double()
        if rotary_dim:
            positions = torch.arange(length, end)
            keys = rotate64(k[row], cos, sin, positions, interleaved)
            queries = rotate64(q[row], cos, sin, positions if causal else positions * 0 + length, interleaved)
        torch.testing.assert_close(k_cache[row, length:end].double(), keys, rtol=tolerance, atol=tolerance)
        truth, lse64 = attention64(
            queries[None].to(dtype), k_cache[row : row + 1, :end], v_cache[row : row + 1, :end], causal=causal
        )
        torch.testing.assert_close(out[row : row + 1].double(), truth, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(lse[row : row + 1].double(), lse64, rtol=tolerance, atol=tolerance)


def test_steps_equal_one_prefill_to_the_bit(isa):
    """A prompt fed whole, in chunks, or token by token leaves the same cache and the same outputs."""
    seqlen, nheads, nheads_k, headdim = 1100, 6, 2, 64
    q = torch.randn(1, seqlen, nheads, headdim)
    k, v = (torch.randn(1, seqlen, nheads_k, headdim) for _ in range(2))
    cos, sin = rotary_table(seqlen, headdim)

    def run(cuts):
        k_cache, v_cache = (torch.zeros(1, seqlen, nheads_k, headdim) for _ in range(2))
        outs = []
        for begin, end in pairwise(cuts):
            part = slice(begin, end)
            outs.append(
                attention_with_kvcache(
                    q[:, part],
                    k_cache,
                    v_cache,
                    k[:, part],
                    v[:, part],
                    cache_seqlens=begin,
                    rotary_cos=cos,
                    rotary_sin=sin,
                    rotary_interleaved=False,
                    causal=True,
                    backend="cpu",
                )
            )
        return torch.cat(outs, dim=1), k_cache, v_cache

    whole = run([0, seqlen])
    for cuts in ([0, 1000, seqlen], [0, 7, 300, 1024, seqlen], [0, 1020, *range(1021, seqlen + 1)]):
        for ours, expected in zip(run(cuts), whole):
            assert torch.equal(ours, expected), cuts[:4]


def test_ragged_rows_equal_rows_alone(isa, threads):
    torch.set_num_threads(2)
    q = torch.randn(4, 1, 8, 64)
    k_cache, v_cache = (torch.randn(4, 3000, 2, 64) for _ in range(2))
    lengths = torch.tensor([1, 2999, 1024, 0], dtype=torch.int32)
    together = attention_with_kvcache(q, k_cache, v_cache, cache_seqlens=lengths, backend="cpu")
    for row, length in enumerate(lengths.tolist()):
        alone = attention(
            q[row : row + 1], k_cache[row : row + 1, :length], v_cache[row : row + 1, :length], backend="cpu"
        )
        assert torch.equal(together[row : row + 1], alone)


def test_cache_in_any_layout(isa):
    """A cache kept as (batch, heads, tokens, dim), seen through a transposed view, is written in place."""
    q, k, v = torch.randn(2, 1, 4, 32), torch.randn(2, 1, 2, 32), torch.randn(2, 1, 2, 32)
    stored_k, stored_v = torch.randn(2, 2, 50, 32), torch.randn(2, 2, 50, 32)
    plain_k, plain_v = stored_k.transpose(1, 2).contiguous(), stored_v.transpose(1, 2).contiguous()
    lengths = torch.tensor([3, 49], dtype=torch.int64)
    out = attention_with_kvcache(
        q, stored_k.transpose(1, 2), stored_v.transpose(1, 2), k, v, cache_seqlens=lengths
    )
    expected = attention_with_kvcache(q, plain_k, plain_v, k, v, cache_seqlens=lengths)
    assert torch.equal(out, expected)
    assert torch.equal(stored_k.transpose(1, 2), plain_k)
    assert torch.equal(stored_v.transpose(1, 2), plain_v)


def test_cache_seqlens_forms():
    q, cache = torch.randn(2, 1, 4, 32), torch.randn(2, 20, 2, 32)
    whole = attention_with_kvcache(q, cache, cache)
    assert torch.equal(whole, attention(q, cache, cache))
    assert torch.equal(whole, attention_with_kvcache(q, cache, cache, cache_seqlens=20))
    fresh = torch.zeros(2, 20, 2, 32)
    new = torch.randn(2, 4, 2, 32)
    attention_with_kvcache(q.expand(-1, 4, -1, -1), fresh, fresh.clone(), new, new, causal=True)
    assert torch.equal(fresh[:, :4], new)


def test_a_refused_call_leaves_the_cache_alone():
    cache, new = torch.zeros(1, 4, 2, 8), torch.randn(1, 1, 2, 8)
    with pytest.raises(ValueError, match="alibi_slopes"):
        attention_with_kvcache(new, cache, cache, new, new, cache_seqlens=0, alibi_slopes=torch.ones(3))
    with pytest.raises(ValueError, match="softmax_scale"):
        attention_with_kvcache(new, cache, cache, new, new, cache_seqlens=0, softmax_scale=math.inf)
    assert (cache == 0).all()


@pytest.mark.parametrize("wanted", ["q", "k", "v"])
def test_gradients_are_kept_or_refused(wanted):
    """The kernels have no backward: the reference serves, and a forced kernel says no."""
    given = {name: torch.randn(1, 2, 2, 8, dtype=torch.float32) for name in "qkv"}
    given[wanted].requires_grad_()
    cos, sin = rotary_table(6, 8)

    def call(backend):
        k_cache, v_cache = torch.zeros(1, 6, 2, 8), torch.zeros(1, 6, 2, 8)
        return attention_with_kvcache(
            given["q"],
            k_cache,
            v_cache,
            given["k"],
            given["v"],
            cache_seqlens=0,
            rotary_cos=cos,
            rotary_sin=sin,
            causal=True,
            backend=backend,
        )

    with pytest.raises(NotImplementedError, match="backend 'cpu' lacks 'append_gradients'"):
        call("cpu")
    call("auto").square().sum().backward()
    assert given[wanted].grad.abs().sum() > 0
    with torch.no_grad():
        assert not call("cpu").requires_grad


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("batch", [2, 70])
def test_the_quick_way_is_the_same_way(dtype, batch, monkeypatch):
    """Plain decode steps skip the tour through Python: the same bits, in the output and in the cache."""
    nheads, nheads_k, headdim, capacity = 4, 2, 24, 40
    heads = torch.randn(batch, 3, nheads + 2 * nheads_k, headdim).to(dtype)
    q, k, v = heads.split([nheads, nheads_k, nheads_k], dim=2)  # strided, as a model's projections are
    caches = [torch.randn(batch, capacity, nheads_k, headdim).to(dtype) for _ in range(2)]
    lengths = torch.arange(batch) % (capacity - 3)
    cos, sin = rotary_table(capacity, 16)
    steps = []  # the answers of plain_kvcache
    inner = sys.modules["fastattn.kvcache"].plain_kvcache
    for new in ((k, v), (None, None)):
        for seqlens in (lengths, lengths.int(), 7, None):
            for rotary in ({}, {"rotary_cos": cos, "rotary_sin": sin}):
                if rotary and seqlens is None and new[0] is None:
                    continue  # no table reaches beyond a full cache
                for causal in (False, True):
                    call = {"cache_seqlens": seqlens, "causal": causal, **rotary}
                    results = []
                    for way in (lambda *a: steps.append(inner(*a)) or steps[-1], None):
                        monkeypatch.setattr(sys.modules["fastattn.kvcache"], "plain_kvcache", way)
                        k_cache, v_cache = (x.clone() for x in caches)
                        out = attention_with_kvcache(q, k_cache, v_cache, *new, **call)
                        results.append((out, k_cache, v_cache))
                    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), call
    assert all(step is not None for step in steps)  # each of them was plain
    assert len(steps) == 30


def test_what_is_not_plain_leaves_the_cache_alone():
    """The quick way refuses before it writes; the long way then says what is wrong."""
    plain_kvcache = sys.modules["fastattn.kvcache"].plain_kvcache
    q, new = torch.randn(2, 1, 4, 8), torch.randn(2, 1, 2, 8)
    cos, sin = rotary_table(10, 8)
    good = [q, None, None, new, new, 3, cos, sin, True, True, None, 1]
    wrong = [
        (0, q.half()), (0, q[:1]), (0, q[..., :4]), (3, None), (3, new.half()), (4, new[:, :, :1]), (5, 11), (5, -1),
        (5, 10), (5, torch.tensor([3])), (5, torch.tensor([3.0, 3.0])), (5, torch.tensor([3, 10])), (6, None),
        (6, cos.double()), (6, cos[:3]), (6, torch.ones(10, 5)), (6, cos.t()), (9, 1), (10, math.nan),
    ]  # fmt: skip
    for place, value in [(None, None), *wrong]:
        caches = torch.zeros(2, 2, 10, 2, 8)
        call = list(good)
        call[1], call[2] = caches
        if place is not None:
            call[place] = value
        out = plain_kvcache(*call)
        assert (out is None) == (place is not None), (place, value)
        assert (caches != 0).any() == (place is None)
