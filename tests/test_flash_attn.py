"""fastattn.flash_attn: the dialect of flash_attn 2.8."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from oracles import attention64

from fastattn import flash_attn

TAIL = [
    ("dropout_p", 0.0), ("softmax_scale", None), ("causal", False), ("window_size", (-1, -1)), ("softcap", 0.0),
    ("alibi_slopes", None), ("deterministic", False), ("return_attn_probs", False),
]  # fmt: skip
LENGTHS = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
SIGNATURES = {
    "flash_attn_func": ["q", "k", "v", *TAIL],
    "flash_attn_kvpacked_func": ["q", "kv", *TAIL],
    "flash_attn_qkvpacked_func": ["qkv", *TAIL],
    "flash_attn_varlen_func": ["q", "k", "v", *LENGTHS, *TAIL, ("block_table", None)],
    "flash_attn_varlen_kvpacked_func": ["q", "kv", *LENGTHS, *TAIL],
    "flash_attn_varlen_qkvpacked_func": ["qkv", "cu_seqlens", "max_seqlen", *TAIL],
    "flash_attn_with_kvcache": [
        "q", "k_cache", "v_cache", ("k", None), ("v", None), ("rotary_cos", None), ("rotary_sin", None),
        ("cache_seqlens", None), ("cache_batch_idx", None), ("cache_leftpad", None), ("block_table", None),
        ("softmax_scale", None), ("causal", False), ("window_size", (-1, -1)), ("softcap", 0.0),
        ("rotary_interleaved", True), ("alibi_slopes", None), ("num_splits", 0), ("return_softmax_lse", False),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    expected = [x if isinstance(x, tuple) else (x, inspect.Parameter.empty) for x in SIGNATURES[name]]
    found = inspect.signature(getattr(flash_attn, name)).parameters.values()
    assert [(p.name, p.default) for p in found] == expected
    assert all(p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for p in found)
    assert set(flash_attn.__all__) == set(SIGNATURES)


def make(dtype=torch.float32, seqlen_q=70, seqlen_k=90):
    q = torch.randn(2, seqlen_q, 4, 32).to(dtype)
    return q, *(torch.randn(2, seqlen_k, 2, 32).to(dtype) for _ in range(2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_values_and_packed_forms(dtype):
    q, k, v = make(dtype)
    atol = 3e-6 if dtype == torch.float32 else 1e-2
    for call in (
        {},
        {"causal": True},
        {"window_size": (20, 3)},
        {"softcap": 4.0},
        {"alibi_slopes": torch.rand(2, 4)},
    ):
        out = flash_attn.flash_attn_func(q, k, v, 0.0, **call)
        torch.testing.assert_close(out.double(), attention64(q, k, v, **call)[0], rtol=0, atol=atol)
        kv = torch.stack([k, v], dim=2)
        assert torch.equal(flash_attn.flash_attn_kvpacked_func(q, kv, **call), out)
    x = torch.randn(2, 50, 3, 4, 32).to(dtype)
    assert torch.equal(
        flash_attn.flash_attn_qkvpacked_func(x, causal=True),
        flash_attn.flash_attn_func(*x.unbind(2), causal=True),
    )


def test_varlen_forms():
    q, k, v = make()
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 30, 30, 140], [0, 100, 120, 180]))
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    out = flash_attn.flash_attn_varlen_func(*flat, cu_q, cu_k, 110, 100, causal=True)
    for b in range(3):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        truth, _ = attention64(flat[0][None, rows], flat[1][None, keys], flat[2][None, keys], causal=True)
        torch.testing.assert_close(out[None, rows].double(), truth, rtol=0, atol=3e-6)
    kv = torch.stack(flat[1:], dim=1)
    assert torch.equal(
        flash_attn.flash_attn_varlen_kvpacked_func(flat[0], kv, cu_q, cu_k, 110, 100, causal=True), out
    )
    qkv = torch.randn(140, 3, 2, 16)
    assert torch.equal(
        flash_attn.flash_attn_varlen_qkvpacked_func(qkv, cu_q, 110),
        flash_attn.flash_attn_varlen_func(*qkv.unbind(1), cu_q, cu_q, 110, 110),
    )


@pytest.mark.parametrize("causal", [False, True])
def test_attn_probs_tell_what_was_dropped(causal):
    q, k, v = make()
    torch.manual_seed(1)
    out, lse, dropped = flash_attn.flash_attn_func(q, k, v, 0.3, causal=causal, return_attn_probs=True)
    torch.manual_seed(1)
    assert torch.equal(flash_attn.flash_attn_func(q, k, v, 0.3, causal=causal), out)
    assert dropped.shape == (2, 4, 128, 128)
    assert (dropped[:, :, 70:] == 0).all()
    assert (dropped[..., 90:] == 0).all()
    probs = dropped[:, :, :70, :90]
    torch.testing.assert_close(probs.abs().sum(-1), torch.ones(2, 4, 70))
    kept = probs.clamp(min=0) / 0.7
    wide = v.repeat_interleave(2, dim=2)
    torch.testing.assert_close(torch.einsum("bhij,bjhd->bihd", kept, wide), out, rtol=0, atol=1e-5)
    share = (probs < 0).sum() / (probs != 0).sum()
    assert abs(float(share) - 0.3) < 0.01
    plain = flash_attn.flash_attn_func(q, k, v, causal=causal, return_attn_probs=True)
    assert plain[2].shape == (0,)
    assert plain[2].dtype == q.dtype
    torch.testing.assert_close(plain[1], lse)


def test_attn_probs_of_packed_sequences():
    q, k, v = (x.flatten(0, 1) for x in make())
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 40, 140], [0, 100, 180]))
    torch.manual_seed(2)
    out, lse, dropped = flash_attn.flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, 100, 100, 0.5, return_attn_probs=True
    )
    assert lse.shape == (4, 140)
    assert dropped.shape == (2, 4, 128, 128)
    for b in range(2):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        kept = dropped[b, :, : rows.stop - rows.start, : keys.stop - keys.start].clamp(min=0) * 2
        wide = v[keys].repeat_interleave(2, dim=1)
        torch.testing.assert_close(torch.einsum("hij,jhd->ihd", kept, wide), out[rows], rtol=0, atol=1e-5)


def test_attn_probs_of_pages():
    q, k, v = (x.flatten(0, 1) for x in make())
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 40, 140], [0, 100, 180]))
    table = torch.tensor([[0, 1, 2, 3, 4], [5, 6, 7, 8, -1]], dtype=torch.int32)
    pages = [x.view(9, 20, 2, 32) for x in (k, v)]
    results = []
    for keys, extra in (((k, v), {}), (pages, {"block_table": table})):
        torch.manual_seed(2)
        results.append(
            flash_attn.flash_attn_varlen_func(
                q, *keys, cu_q, cu_k, 100, 100, 0.5, causal=True, return_attn_probs=True, **extra
            )
        )
    for packed, paged in zip(*results):
        assert torch.equal(packed, paged)


def test_any_negative_number_switches_off():
    q, k, v = make()
    out = flash_attn.flash_attn_func(q, k, v)
    assert torch.equal(flash_attn.flash_attn_func(q, k, v, window_size=(-7, -2), softcap=-1.0), out)
    assert torch.equal(flash_attn.flash_attn_with_kvcache(q, k, v, window_size=(-7, -2), softcap=-1.0), out)


def test_rows_without_keys_have_their_lse():
    q, k, v = make(seqlen_q=5, seqlen_k=3)
    out, lse, _ = flash_attn.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert (out[:, :2] == 0).all()
    assert (lse[:, :, :2] == math.inf).all()
    assert lse[:, :, 2:].isfinite().all()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse, _ = flash_attn.flash_attn_func(*leaves, causal=True, return_attn_probs=True)
    grads = torch.autograd.grad(out.sum() + lse[:, :, 2:].sum(), leaves)
    assert all(x.isfinite().all() for x in grads)
    assert (grads[0][:, :2] == 0).all()


def test_kvcache_and_gradients():
    q, k, v = make(seqlen_q=2, seqlen_k=2)
    caches = [torch.randn(2, 20, 2, 32) for _ in range(2)]
    out, lse = flash_attn.flash_attn_with_kvcache(
        q, *caches, k, v, cache_seqlens=7, causal=True, return_softmax_lse=True, num_splits=3
    )
    truth, lse64 = attention64(q, caches[0][:, :9], caches[1][:, :9], causal=True)
    torch.testing.assert_close(out.double(), truth, rtol=0, atol=3e-6)
    torch.testing.assert_close(lse.double(), lse64, rtol=0, atol=1e-5)
    assert torch.equal(caches[0][:, 7:9], k)
    qkv = torch.randn(1, 9, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: flash_attn.flash_attn_qkvpacked_func(x, causal=True), qkv)


def test_errors():
    q, k, v = make()
    with pytest.raises(
        ValueError, match=r"qkv: expected \(batch, seqlen, 3, nheads, headdim\), got \(2, 70, 4, 32\)"
    ):
        flash_attn.flash_attn_qkvpacked_func(q)
    with pytest.raises(ValueError, match=r"kv: expected \(total, 2, nheads, headdim\)"):
        flash_attn.flash_attn_varlen_kvpacked_func(q[0], torch.zeros(5, 3, 2, 8), None, None, 1, 1)
    with pytest.raises(ValueError, match="softcap: expected 0 together with dropout_p"):
        flash_attn.flash_attn_func(q, k, v, 0.1, softcap=3.0)
