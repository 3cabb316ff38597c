"""Packed sequences, and partial attentions merged, against float64 sequence by sequence."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import attention64

from fastattn import attention, attention_varlen, merge_states

LENGTHS = [((5, 0, 97, 1, 30), (9, 4, 97, 260, 0)), ((1, 1, 1), (1, 1100, 64)), ((0, 0), (0, 0)), ((), ())]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float64: 1e-12}


def packed(lengths_q, lengths_k, dtype, nheads=4, nheads_k=2, headdim=24):
    cu_q, cu_k = (
        torch.tensor([0, *x], dtype=torch.int32).cumsum(0).to(torch.int32) for x in (lengths_q, lengths_k)
    )
    q = torch.randn(sum(lengths_q), nheads, headdim).to(dtype)
    k, v = (torch.randn(sum(lengths_k), nheads_k, headdim).to(dtype) for _ in range(2))
    longest = max(lengths_q, default=0), max(lengths_k, default=0)
    return q, k, v, cu_q, cu_k, *longest


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda x: str(len(x[0])))
def test_every_sequence_by_itself(isa, lengths, dtype, backend):
    q, k, v, cu_q, cu_k, max_q, max_k = packed(*lengths, dtype)
    n = len(cu_q) - 1
    features = {
        "alibi_slopes": torch.rand(n, 4),
        "attn_bias": torch.randn(n, 1, max_q, max_k),
        "attn_mask": torch.rand(1, 4, max_q, max_k) > 0.2,
        "sinks": torch.randn(4),
        "window_size": (40, 30),
        "softcap": 3.0,
    }
    for chosen in ({}, {"causal": True}, features):
        out, lse = attention_varlen(
            q, k, v, cu_q, cu_k, max_q, max_k, return_lse=True, backend=backend, **chosen
        )
        assert out.shape == q.shape
        assert lse.shape == (4, len(q))
        for b in range(n):
            rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
            own = dict(chosen)
            if chosen is features:
                used = (
                    slice(None),
                    slice(None),
                    slice(rows.stop - rows.start),
                    slice(keys.stop - keys.start),
                )
                own.update(alibi_slopes=features["alibi_slopes"][b], attn_bias=features["attn_bias"][b : b + 1][used],
                           attn_mask=features["attn_mask"][used])  # fmt: skip
            truth, lse64 = attention64(q[None, rows], k[None, keys], v[None, keys], **own)
            torch.testing.assert_close(out[None, rows].double(), truth, rtol=0, atol=TOLERANCE[dtype])
            torch.testing.assert_close(lse[None, :, rows].double(), lse64, rtol=1e-4, atol=1e-4)


def test_the_same_bits_as_alone(isa):
    q, k, v, cu_q, cu_k, max_q, max_k = packed((70, 1, 8, 200), (70, 1500, 90, 200), torch.float32)
    out = attention_varlen(q, k, v, cu_q, cu_k, max_q, max_k, causal=True)
    for b in range(4):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        assert torch.equal(out[rows], attention(q[None, rows], k[None, keys], v[None, keys], causal=True)[0])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_paged_keys(backend):
    q, k, v, cu_q, cu_k, max_q, max_k = packed((5, 1, 9), (20, 7, 13), torch.float32)
    pages = torch.randperm(20)
    k_pages, v_pages = (torch.full((20, 3, 2, 24), math.nan) for _ in range(2))
    table = torch.full((3, 7), -1, dtype=torch.int32)
    for b in range(3):
        for j in range(int(cu_k[b + 1] - cu_k[b])):
            page = int(pages[b * 7 + j // 3]) if b * 7 + j // 3 < 20 else 0
            table[b, j // 3] = page
            k_pages[page, j % 3], v_pages[page, j % 3] = k[cu_k[b] + j], v[cu_k[b] + j]
    found = attention_varlen(
        q, k_pages, v_pages, cu_q, cu_k, max_q, max_k, causal=True, block_table=table, backend=backend
    )
    expected = attention_varlen(q, k, v, cu_q, cu_k, max_q, max_k, causal=True, backend=backend)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("page_size", [3, 64])
def test_bias_and_mask_of_pages(backend, page_size):
    """They are as long as the longest sequence, whatever room the pages have."""
    q, k, v, cu_q, cu_k, max_q, max_k = packed((5, 1, 9), (20, 7, 13), torch.float32)
    k_pages, v_pages = (torch.zeros(30, page_size, 2, 24) for _ in range(2))
    table = torch.arange(30, dtype=torch.int32).view(3, 10)
    for b in range(3):
        rows = slice(cu_k[b], cu_k[b + 1])
        for pages, x in ((k_pages, k), (v_pages, v)):
            pages.view(3, -1, 2, 24)[b, : rows.stop - rows.start] = x[rows]
    call = {"attn_bias": torch.randn(3, 1, max_q, max_k), "attn_mask": torch.rand(max_q, max_k) < 0.8}
    found = attention_varlen(
        q, k_pages, v_pages, cu_q, cu_k, max_q, max_k, block_table=table, backend=backend, **call
    )
    expected = attention_varlen(q, k, v, cu_q, cu_k, max_q, max_k, backend=backend, **call)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_errors():
    q, k, v, cu_q, cu_k, max_q, max_k = packed((5, 3), (4, 4), torch.float32)
    int32 = lambda *x: torch.tensor(x, dtype=torch.int32)  # noqa: E731
    for change, message in (
        ({"cu_seqlens_q": int32(0, 8), "max_seqlen_q": 8}, r"cu_seqlens_k: expected \(2,\), got \(3,\)"),
        ({"cu_seqlens_q": int32(1, 5, 8)}, "cu_seqlens_q: expected values that begin with 0"),
        ({"cu_seqlens_q": int32(0, 9, 8)}, "cu_seqlens_q: expected values that begin with 0 and never fall"),
        ({"cu_seqlens_k": int32(0, 4, 7)}, "cu_seqlens_k: expected 8 tokens at its end, got 7"),
        ({"max_seqlen_q": 4}, "max_seqlen_q: expected at least 5, the longest, got 4"),
        (
            {"attn_bias": torch.zeros(2, 4, 5, 5)},
            r"attn_bias: expected a shape that broadcasts to \(2, 4, 5, 4\)",
        ),
        ({"q": q[None]}, r"q: expected \(total_q, nheads, headdim\)"),
    ):
        call = {"q": q, "k": k, "v": v, "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": max_q,
                "max_seqlen_k": max_k, **change}  # fmt: skip
        with pytest.raises(ValueError, match=message):
            attention_varlen(**call)
    with pytest.raises(
        ValueError, match="cu_seqlens_k: expected the device of the other tensors, cpu, got meta"
    ):
        attention_varlen(q, k, v, cu_q, cu_k.to("meta"), max_q, max_k)
    with pytest.raises(TypeError, match="max_seqlen_k: expected an int, got float"):
        attention_varlen(q, k, v, cu_q, cu_k, max_q, float(max_k))
    with pytest.raises(TypeError, match="cu_seqlens_q: expected dtype int32, got int64"):
        attention_varlen(q, k, v, cu_q.long(), cu_k, max_q, max_k)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_merged_parts_are_the_whole(dtype):
    q, k, v = (torch.randn(2, n, h, 16).to(dtype) for n, h in ((7, 4), (90, 2), (90, 2)))
    cuts = [(0, 0), (0, 30), (30, 31), (31, 90)]
    parts = [attention(q, k[:, a:b], v[:, a:b], return_lse=True) for a, b in cuts]
    out, lse = merge_states(*zip(*parts))
    whole, whole_lse = attention(q, k, v, return_lse=True)
    assert out.dtype == dtype
    torch.testing.assert_close(out, whole, rtol=0, atol=TOLERANCE[dtype])
    torch.testing.assert_close(lse, whole_lse, rtol=1e-5, atol=1e-5)
    stacked = merge_states(torch.stack([p[0] for p in parts]), torch.stack([p[1] for p in parts]))
    assert torch.equal(stacked[0], out)
    flat = merge_states(
        [p[0][0] for p in parts], [p[1][0] for p in parts]
    )  # packed: (total_q, nheads, headdim)
    assert torch.equal(flat[0], out[0])


def test_merging_nothing_and_gradients():
    out, lse = merge_states([torch.randn(1, 2, 3, 4)] * 2, [torch.full((1, 3, 2), -math.inf)] * 2)
    assert (out == 0).all()
    assert (lse == -math.inf).all()
    outs = [torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    lses = [torch.randn(1, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *x: merge_states(x[:3], x[3:]), (*outs, *lses))
    dead = torch.full((1, 3, 2), -math.inf, dtype=torch.float64, requires_grad=True)
    merge_states([outs[0], outs[1]], [lses[0], dead])[0].sum().backward()
    assert dead.grad.isfinite().all()
    for args, message in (
        (([], []), "outs: expected at least one part"),
        (
            ([outs[0], outs[0][:, :1]], lses[:2]),
            r"outs: expected parts of one shape, got \[\(1, 2, 3, 4\), \(1, 1, 3, 4\)\]",
        ),
        (([outs[0]], [lses[0].transpose(1, 2)]), r"lses: expected \(1, 1, 3, 2\)"),
        ((torch.zeros(2, 3), torch.zeros(2)), "outs: expected parts of 3"),
    ):
        with pytest.raises(ValueError, match=message):
            merge_states(*args)
