"""Dropout: the mask of csrc/rng.h, to the bit, whatever the tiling; its statistics; the same one backward."""

from __future__ import annotations

import pytest
import torch
from oracles import attention64, keep_oracle

import fastattn
from fastattn import attention, attention_varlen
from fastattn.backends.reference_dropout import dropout_keep


def kept_of(q, k, p, state, backend="cpu"):
    """The mask as the kernel applied it: with equal scores and the identity as v, every weight comes out by itself."""
    batch, seqlen_k, nheads_k, _ = k.shape
    v = torch.eye(seqlen_k, dtype=q.dtype).view(1, seqlen_k, 1, seqlen_k).expand(batch, -1, nheads_k, -1)
    out = [
        attention(q * 0, k, x.contiguous(), dropout_p=p, rng_state=state, backend=backend)
        for x in v.split(500, dim=-1)
    ]
    return torch.cat(out, -1).transpose(1, 2) != 0  # (batch, nheads, seqlen_q, seqlen_k)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 1), (2, 4, 2, 5, 130), (1, 8, 1, 3, 67), (1, 2, 2, 300, 300), (2, 4, 2, 33, 520)]
)
def test_the_mask_is_the_one_defined(isa, shape):
    batch, nheads, nheads_k, seqlen_q, seqlen_k = shape
    q, k = torch.randn(batch, seqlen_q, nheads, 8), torch.randn(batch, seqlen_k, nheads_k, 8)
    for p, state in ((0.1, [0, 0]), (0.6, [-5, 2**40 + 3])):
        state = torch.tensor(state)
        expected = keep_oracle(state, batch, nheads, seqlen_q, seqlen_k, p)
        assert torch.equal(kept_of(q, k, p, state), expected)
        assert torch.equal(dropout_keep(state, batch, nheads, seqlen_q, seqlen_k, p), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_the_mask_does_not_depend_on_the_dtype(isa, dtype):
    q, k, state = torch.randn(1, 50, 2, 8).to(dtype), torch.randn(1, 70, 2, 8).to(dtype), torch.tensor([3, 4])
    assert torch.equal(kept_of(q, k, 0.4, state), keep_oracle(state, 1, 2, 50, 70, 0.4))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_values_and_gradients_under_the_mask(isa, backend):
    """Out, dq, dk and dv are those of a softmax whose weights are masked by hand."""
    q, k, v = (
        torch.randn(2, n, h, 16, dtype=torch.float64, requires_grad=True)
        for n, h in ((40, 4), (90, 2), (90, 2))
    )
    state, p = torch.tensor([9, 1]), 0.35
    keep = keep_oracle(state, 2, 4, 40, 90, p)
    wide = [x.repeat_interleave(2, dim=2).transpose(1, 2) for x in (k, v)]
    hidden = torch.ones(40, 90, dtype=torch.bool).triu(90 - 40 + 1)
    probs = torch.softmax((q.transpose(1, 2) @ wide[0].mT * 0.25).masked_fill(hidden, -torch.inf), -1)
    expected = (probs * keep / (1 - p) @ wide[1]).transpose(1, 2)
    found = attention(q, k, v, causal=True, dropout_p=p, rng_state=state, backend=backend)
    torch.testing.assert_close(found, expected)
    dout = torch.randn_like(found)
    for a, b in zip(
        torch.autograd.grad(found, (q, k, v), dout), torch.autograd.grad(expected, (q, k, v), dout)
    ):
        torch.testing.assert_close(a, b)


def test_tilings_threads_and_packing_change_nothing(threads):
    q, k, v = torch.randn(1, 200, 4, 16), torch.randn(1, 700, 1, 16), torch.randn(1, 700, 1, 16)
    state = torch.tensor([1, 2])
    torch.set_num_threads(1)
    expected = attention(q, k, v, dropout_p=0.3, rng_state=state)
    for count in (2, 3):
        torch.set_num_threads(count)
        assert torch.equal(attention(q, k, v, dropout_p=0.3, rng_state=state), expected)
    cu_q, cu_k = (torch.tensor([0, n], dtype=torch.int32) for n in (200, 700))
    packed = attention_varlen(q[0], k[0], v[0], cu_q, cu_k, 200, 700, dropout_p=0.3, rng_state=state)
    assert torch.equal(packed, expected[0])


@pytest.mark.parametrize("p", [0.1, 0.17, 0.5, 0.9])
def test_statistics(p):
    keep = keep_oracle(torch.tensor([77, 5]), 2, 8, 256, 256, p).double()
    n = keep.numel()
    sigma = (p * (1 - p)) ** 0.5
    assert abs(keep.mean().item() - (1 - p)) < 5 * sigma / n**0.5
    for dims in ((0, 1, 2), (0, 1, 3), (2, 3)):  # per key, per query, per head: no direction stands out
        share = keep.mean(dims)
        score = ((share - (1 - p)) / (sigma / (n / share.numel()) ** 0.5)).square().sum().item()
        assert score < share.numel() + 5 * (2 * share.numel()) ** 0.5
    for state in ([77, 6], [78, 5]):  # the next offset and the next seed are other masks
        other = keep_oracle(torch.tensor(state), 2, 8, 256, 256, p).double()
        correlation = ((keep - (1 - p)) * (other - (1 - p))).mean().item() / sigma**2
        assert abs(correlation) < 5 / n**0.5


def test_the_output_is_right_on_average():
    q, k, v = torch.randn(1, 30, 2, 16), torch.randn(1, 60, 2, 16), torch.randn(1, 60, 2, 16)
    draws = torch.stack([attention(q, k, v, dropout_p=0.5) for _ in range(2000)])
    deviation = (draws.mean(0) - attention(q, k, v)) / (draws.std(0) / 2000**0.5)
    assert deviation.abs().max() < 5.5


def test_the_generator_decides():
    q = torch.randn(1, 20, 2, 8)
    torch.manual_seed(5)
    first, second = attention(q, q, q, dropout_p=0.5), attention(q, q, q, dropout_p=0.5)
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(attention(q, q, q, dropout_p=0.5), first)
    truth, lse64 = attention64(q, q, q)
    _, lse = attention(q, q, q, dropout_p=0.5, return_lse=True)
    torch.testing.assert_close(
        lse.double(), lse64, rtol=1e-5, atol=1e-5
    )  # the denominator does not see dropout
    torch.testing.assert_close(attention(q, q, q, dropout_p=0.0).double(), truth, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_dropping_everything(backend):
    q = torch.randn(1, 20, 2, 8, requires_grad=True)
    out = attention(q, q, q, dropout_p=1.0, backend=backend)
    assert (out == 0).all()
    out.sum().backward()
    assert (q.grad == 0).all()


def test_errors():
    q = torch.randn(1, 2, 2, 8)
    for p in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="dropout_p: expected a value in"):
            attention(q, q, q, dropout_p=p)
    with pytest.raises(ValueError, match=r"rng_state: expected \(2,\), got \(3,\)"):
        attention(q, q, q, dropout_p=0.1, rng_state=torch.zeros(3, dtype=torch.int64))
    assert "dropout" in fastattn.backends.cpu.FEATURES
