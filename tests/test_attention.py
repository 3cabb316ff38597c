"""fastattn.attention on the CPU against float64, by the rule of tolerance.py, and its invariances, to the bit."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import attention64, attention_same_dtype
from tolerance import assert_accurate

import fastattn
from fastattn import _C, attention
from fastattn.backends import cpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEADDIMS = [1, 40, 59, 64, 111, 128, 512]
HEADS = [(8, 8), (8, 2), (8, 1)]
LENGTHS = [1, 97, 257, 1025]
UNEQUAL = [(97, 257), (1, 1025), (1025, 7)]


def make(seqlen_q, seqlen_k, nheads, nheads_k, headdim, dtype, batch=1, headdim_v=None):
    q = torch.randn(batch, seqlen_q, nheads, headdim)
    k = torch.randn(batch, seqlen_k, nheads_k, headdim)
    v = torch.randn(batch, seqlen_k, nheads_k, headdim_v or headdim)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def check_every_isa(q, k, v, causal, label):
    truth, lse64 = attention64(q, k, v, causal=causal)
    yardstick = attention_same_dtype(q, k, v, causal=causal)
    before = _C.isa()
    try:
        for isa in fastattn.cpu_isas():
            _C.select_isa(isa)
            out, lse = attention(q, k, v, causal=causal, return_lse=True, backend="cpu")
            assert_accurate(out, yardstick, truth, label=f"{isa} {label}")
            assert lse.dtype == torch.float32
            torch.testing.assert_close(lse.double(), lse64, rtol=1e-5, atol=1e-5)
    finally:
        _C.select_isa(before)


@pytest.mark.parametrize("headdim", HEADDIMS, ids=lambda d: f"d{d}")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_against_float64(dtype, headdim):
    """Every length with every dtype and headdim; heads and mask take turns: test_features.py crosses them all."""
    for turn, (seqlen_q, seqlen_k) in enumerate([*zip(LENGTHS, LENGTHS), *UNEQUAL]):
        heads, causal = HEADS[(turn + headdim) % 3], (turn + headdim) % 2 == 0
        q, k, v = make(seqlen_q, seqlen_k, *heads, headdim, dtype)
        check_every_isa(q, k, v, causal, f"{seqlen_q}x{seqlen_k} {heads} causal={causal}")


@pytest.mark.parametrize("seqlen_q", [1, 30])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_many_chunks(isa, seqlen_q, dtype):
    q, k, v = make(seqlen_q, 5000, 4, 1, 64, dtype)
    out = attention(q, k, v, causal=True, backend="cpu")
    assert_accurate(out, attention_same_dtype(q, k, v, causal=True), attention64(q, k, v, causal=True)[0])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_calls(data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    batch, nheads_k, group = draw(0, 3), draw(1, 3), draw(1, 5)
    seqlen_q, seqlen_k, headdim, headdim_v = draw(0, 90), draw(0, 140), draw(1, 140), draw(1, 140)
    dtype = data.draw(st.sampled_from(DTYPES))
    causal = data.draw(st.booleans())
    backend = data.draw(st.sampled_from(["cpu", "reference"]))
    scale = data.draw(st.floats(-0.5, 0.5))
    q, k, v = make(seqlen_q, seqlen_k, nheads_k * group, nheads_k, headdim, dtype, batch, headdim_v)
    out, lse = attention(q, k, v, causal=causal, softmax_scale=scale, return_lse=True, backend=backend)
    truth, lse64 = attention64(q, k, v, causal=causal, softmax_scale=scale)
    assert out.shape == (batch, seqlen_q, nheads_k * group, headdim_v)
    assert out.dtype == dtype
    assert lse.shape == (batch, nheads_k * group, seqlen_q)
    rtol, atol = {torch.float32: (1e-4, 1e-5), torch.bfloat16: (1e-2, 1e-2), torch.float16: (2e-3, 2e-3)}[
        dtype
    ]
    torch.testing.assert_close(out.double(), truth, rtol=rtol, atol=atol)
    torch.testing.assert_close(lse.double(), lse64, rtol=1e-4, atol=1e-4)


def test_strides(isa):
    """Heads before tokens, a slice of a fused qkv, an expanded KV head, a reversed last dimension that needs a copy."""
    qkv = torch.randn(2, 70, 3, 4, 40)  # (batch, seqlen, 3, nheads, headdim)
    q, k, v = qkv.unbind(2)
    expected = attention(*(x.contiguous() for x in (q, k, v)), causal=True, backend="cpu")
    assert torch.equal(attention(q, k, v, causal=True, backend="cpu"), expected)
    head_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(attention(*head_first, causal=True, backend="cpu"), expected)
    dim_strided = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, v)]
    assert dim_strided[0].stride(-1) != 1
    assert torch.equal(attention(*dim_strided, causal=True, backend="cpu"), expected)
    shared = k[:, :, :1].expand(-1, -1, 4, -1)
    assert shared.stride(2) == 0
    assert torch.equal(
        attention(q, shared, v, backend="cpu"), attention(q, shared.contiguous(), v, backend="cpu")
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(1, 4500), (3, 2100), (40, 3000), (700, 700)])
def test_bits_do_not_depend_on_threads_or_batch(isa, threads, dtype, seqlen_q, seqlen_k):
    q, k, v = make(seqlen_q, seqlen_k, 6, 2, 48, dtype, batch=3)
    torch.set_num_threads(1)
    expected = attention(q, k, v, causal=True, backend="cpu")
    for count in (2, 3, 4):
        torch.set_num_threads(count)
        assert torch.equal(attention(q, k, v, causal=True, backend="cpu"), expected), f"{count} threads"
    alone = torch.cat(
        [attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], causal=True, backend="cpu") for b in range(3)]
    )
    assert torch.equal(alone, expected)
    order = [2, 0, 1]
    assert torch.equal(attention(q[order], k[order], v[order], causal=True, backend="cpu"), expected[order])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("group", [1, 3, 8])
def test_bits_do_not_depend_on_the_other_queries(isa, dtype, group):
    """The decode kernel, the tile kernel and every split of a prompt give a query the same bits."""
    seqlen = 2500
    q, k, v = make(seqlen, seqlen, 2 * group, 2, 72, dtype)
    whole = attention(q, k, v, causal=True, backend="cpu")
    for first, last in ((2499, 2500), (2493, 2500), (2300, 2500)):
        part = attention(q[:, first:last], k[:, :last], v[:, :last], causal=True, backend="cpu")
        assert torch.equal(part, whole[:, first:last]), f"queries {first} to {last}"
    one = attention(q[:, 1029:1030], k[:, :1030], v[:, :1030], causal=True, backend="cpu")
    assert torch.equal(one, whole[:, 1029:1030])


def test_a_bias_that_is_a_negative_view():
    q, k, v = make(5, 9, 4, 2, 24, torch.float32)
    bias = torch.randn(5, 9, dtype=torch.complex64).conj().imag  # the sign is a flag, not in memory
    assert bias.is_neg()
    assert torch.equal(attention(q, k, v, attn_bias=bias), attention(q, k, v, attn_bias=bias.clone()))


def test_rows_without_keys(isa):
    q, k, v = make(9, 4, 4, 2, 33, torch.float32)
    out, lse = attention(q, k, v, causal=True, return_lse=True, backend="cpu")
    assert (out[:, :5] == 0).all()
    assert (lse[:, :, :5] == -math.inf).all()
    assert torch.isfinite(lse[:, :, 5:]).all()
    out, lse = attention(q, k[:, :0], v[:, :0], return_lse=True, backend="cpu")
    assert (out == 0).all()
    assert (lse == -math.inf).all()


def test_large_scores_stay_finite_and_nan_passes(isa):
    q, k, v = make(20, 80, 2, 2, 64, torch.float32)
    out = attention(q * 1e4, k * 1e4, v, backend="cpu")
    best = torch.einsum("bihd,bjhd->bhij", q, k).argmax(-1)  # (batch, nheads, seqlen_q)
    expected = torch.stack([v[0, best[0, h], h] for h in range(2)], dim=1)[None]
    torch.testing.assert_close(out, expected)
    k[0, 3, 1, 5] = math.nan
    for rows in (q, q[:, :1]):
        out = attention(rows, k, v, backend="cpu")
        assert out[:, :, 1].isnan().all()
        assert out[:, :, 0].isfinite().all()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=lambda d: str(d)[6:])
def test_the_quick_way_is_the_same_way(dtype, monkeypatch):
    """Plain calls skip the tour through Python: the same bits, whatever the layout."""
    q, k, v = make(5, 9, 4, 2, 24, dtype, batch=2)
    turned = q.transpose(1, 2).contiguous().transpose(1, 2)
    for call in (
        (q, k, v),
        (turned, k, v),
        (q, k, v[..., :8]),
        (q, k[:, :0], v[:, :0]),
        (q[:0], k[:0], v[:0]),
        (torch.nn.Parameter(q, requires_grad=False), k, v),
        (q, k, v.transpose(1, 3).contiguous().transpose(1, 3)),
    ):
        for causal in (False, True):
            for scale in (None, 0.3, 1):
                quick = attention(*call, causal=causal, softmax_scale=scale)
                with monkeypatch.context() as patch:
                    patch.setattr(cpu, "plain_attention", None)
                    slow = attention(*call, causal=causal, softmax_scale=scale)
                assert torch.equal(quick, slow)
                assert quick.stride() == slow.stride()
    assert attention(q.clone().requires_grad_(), k, v).requires_grad
    with pytest.raises(ValueError, match="softmax_scale"):
        attention(q, k, v, softmax_scale=math.nan)
    with pytest.raises(TypeError, match="causal"):
        attention(q, k, v, causal=1)
    monkeypatch.setenv("FASTATTN_BACKEND", "tpu")
    with pytest.raises(ValueError, match="backend"):
        attention(q, k, v)


def score_modifiers(dtype):
    """Everything that the quick way reads, one at a time, and together; q (2, 5, 4, 24), k (2, 9, 2, 24)."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    bias = torch.randn(2, 4, 5, 9).to(dtype)
    calls = [
        *({"attn_bias": x} for x in (bias, bias[:1, :1], bias[0, 0], bias[0, 0, 0], bias[..., :1], bias.to(compute))),
        *({"attn_mask": x > 0} for x in (bias, bias[:, :1, :, :1], bias[0, 0], bias.transpose(2, 3).contiguous().transpose(2, 3))),
        {"alibi_slopes": torch.rand(4, dtype=compute)},
        {"alibi_slopes": torch.rand(2, 4, dtype=compute)},
        {"sinks": torch.randn(4, dtype=compute)},
        {"softcap": 2.0},
        {"softcap": 3},
        {"window_size": (2, 1)},
        {"window_size": [2, 1]},
        {"window_size": (2**70, 0)},
        {"attn_bias": torch._neg_view(bias)},
    ]  # fmt: skip
    return [*calls, {k: v for call in calls[:-1] for k, v in call.items()}]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=lambda d: str(d)[6:])
def test_the_quick_way_reads_modifiers(dtype, causal, monkeypatch):
    """With gradients and without, the bits of the long way."""
    qkv = make(5, 9, 4, 2, 24, dtype, batch=2)
    taken = []

    def both(inputs, **call):
        outs = [attention(*inputs, causal=causal, **call)]
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "plain_attention", None)
            outs.append(attention(*inputs, causal=causal, **call))
        return outs

    real = cpu.plain_attention

    def counted(*call):
        taken.append(answer := real(*call))
        return answer

    monkeypatch.setattr(cpu, "plain_attention", counted)
    for call in score_modifiers(dtype):
        assert torch.equal(*both(qkv, **call)), call
        for quick, long in zip(*both(qkv, return_lse=True, **call)):
            assert torch.equal(quick, long), call
        leaves = [x.clone().requires_grad_() for x in qkv]
        for name in ("attn_bias", "sinks"):
            if name in call:
                leaves.append(call[name].clone().requires_grad_())
                call = {**call, name: leaves[-1]}
        outs = both(leaves[:3], **call)
        grads = [torch.autograd.grad(out.square().sum(), leaves) for out in outs]
        assert all(torch.equal(a, b) for a, b in zip(*grads)), call
    assert sum(x is not None for x in taken) > 0.7 * len(taken)  # it was the quick way


def test_the_limit_of_headdim_is_one():
    from fastattn.args import MAX_HEADDIM

    assert MAX_HEADDIM == _C.MAX_HEADDIM


def test_forward_mode_is_refused_and_no_tangent_lost():
    q, k, v = make(5, 9, 4, 2, 24, torch.float32)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(NotImplementedError):
            attention(dual, k, v)


@pytest.mark.parametrize("widest", [2**31 - 1, 2**63 - 1, 2**70])
def test_a_window_wider_than_everything(widest):
    for seqlen_q, seqlen_k in ((1, 90), (70, 90), (90, 70)):
        q, k, v = (torch.randn(1, n, 2, 32, requires_grad=True) for n in (seqlen_q, seqlen_k, seqlen_k))
        outs = [attention(q, k, v, window_size=(w, w)) for w in (widest, -1)]
        assert torch.equal(*outs)
        grads = [torch.autograd.grad(out.sum(), (q, k, v)) for out in outs]
        assert all(torch.equal(a, b) for a, b in zip(*grads))
