"""Every feature crossed with every other, forward and backward, against float64 and by the accuracy rule.

The yardstick is what a user would write by hand in PyTorch, all of it in the inputs' dtype. Allowed are twice its error
in the output and three times in gradients (plus 1e-6, gradients 3e-6, in float32: PyTorch's own sums may be exact by
luck where ours round).
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracles import attention64, keep_oracle
from pairs import SEED, all_pairs

import fastattn
from fastattn import _C, attention

AXES = {
    "dtype": [torch.float32, torch.bfloat16, torch.float16, torch.float64],
    "heads": [(4, 4), (4, 2), (4, 1), (8, 1)],
    "lengths": [(1, 1), (1, 97), (97, 97), (97, 257), (257, 97), (7, 1025), (1025, 40), (5, 0)],
    "headdim": [1, 40, 59, 64, 111, 128, 256, 512],
    "headdim_v": ["same", 33],
    "causal": [False, True],
    "window": [(-1, -1), (3, -1), (-1, 2), (16, 8), (0, 0)],
    "softcap": [0.0, 15.0],
    "alibi": [None, "head", "batch"],
    "bias": [None, "11qk", "b11k", "1hqk", "bhq1", "qk", "inf", "turned"],
    "mask": [None, "left", "right", "random", "true", "rows"],
    "sinks": [False, True],
    "dropout": [0.0, 0.2],
    "strides": ["plain", "head-major", "slices"],
}
BATCH = 2


def legal(case):
    slow = case["lengths"][0] > 500 and case["headdim"] > 128
    # Of one key softmax has no gradient. PyTorch finds exactly that; with dropout we find what rounding out to 16 bits
    # leaves of it, as FlashAttention-2 does.
    one_key = case["lengths"][1] == 1 or case["window"] == (0, 0)
    return not slow and not (case["dropout"] and (case["softcap"] or one_key))


CASES = all_pairs(AXES, legal, SEED)


def build(case):
    """q, k, v and the keywords of one case."""
    nheads, nheads_k = case["heads"]
    seqlen_q, seqlen_k = case["lengths"]
    headdim_v = case["headdim"] if case["headdim_v"] == "same" else case["headdim_v"]
    dtype = case["dtype"]

    def tensor(seqlen, heads, dim):
        if case["strides"] == "head-major":
            return torch.randn(BATCH, heads, seqlen, dim).to(dtype).transpose(1, 2)
        if case["strides"] == "slices":
            return torch.randn(BATCH, seqlen, 2, heads, dim + 3).to(dtype)[:, :, 1, :, :dim]
        return torch.randn(BATCH, seqlen, heads, dim).to(dtype)

    q, k, v = tensor(seqlen_q, nheads, case["headdim"]), tensor(seqlen_k, nheads_k, case["headdim"]), None
    v = tensor(seqlen_k, nheads_k, headdim_v)
    call = {"causal": case["causal"], "window_size": case["window"], "softcap": case["softcap"]}
    if case["alibi"]:
        call["alibi_slopes"] = torch.rand(*((BATCH,) if case["alibi"] == "batch" else ()), nheads)
    if case["bias"]:
        call["attn_bias"] = make_bias(case["bias"], nheads, seqlen_q, seqlen_k, dtype)
    if case["mask"]:
        call["attn_mask"] = make_mask(case["mask"], nheads, seqlen_q, seqlen_k)
    if case["sinks"]:
        call["sinks"] = torch.randn(nheads).to(dtype)
    if case.get("dropout"):
        call |= {"dropout_p": case["dropout"], "rng_state": torch.tensor([-3, 2**33])}
    return q, k, v, call


def make_bias(kind, nheads, seqlen_q, seqlen_k, dtype):
    shapes = {"11qk": (1, 1, seqlen_q, seqlen_k), "b11k": (BATCH, 1, 1, seqlen_k), "1hqk": (1, nheads, seqlen_q, seqlen_k),
              "bhq1": (BATCH, nheads, seqlen_q, 1), "qk": (seqlen_q, seqlen_k), "inf": (1, nheads, seqlen_q, seqlen_k)}  # fmt: skip
    if kind == "turned":
        return torch.randn(BATCH, nheads, seqlen_k, seqlen_q).transpose(2, 3)
    bias = torch.randn(*shapes[kind])
    if kind == "inf":
        bias = bias.masked_fill(torch.rand_like(bias) < 0.3, -math.inf)
        bias[..., : seqlen_q // 2, :] = -math.inf
    return bias if kind in ("11qk", "inf") else bias.to(dtype)


def make_mask(kind, nheads, seqlen_q, seqlen_k):
    j = torch.arange(seqlen_k)
    lengths = torch.tensor([seqlen_k // 2, seqlen_k]).view(BATCH, 1, 1, 1)
    if kind == "left":
        return j >= lengths // 2
    if kind == "right":
        return j < lengths
    if kind == "true":
        return torch.ones(1, 1, seqlen_q, seqlen_k, dtype=torch.bool)
    mask = torch.rand(*((1, 1) if kind == "random" else (BATCH, nheads)), seqlen_q, seqlen_k) > 0.3
    if kind == "rows":
        mask[:, :, ::3] = False
    return mask


def by_hand(
    q, k, v, *, causal, window_size, softcap, alibi_slopes=None, attn_bias=None, attn_mask=None, sinks=None,
    dropout_p=0.0, rng_state=None,
):  # fmt: skip
    """The same in plain PyTorch, in the dtype of q throughout."""
    group, (seqlen_q, seqlen_k) = q.shape[2] // k.shape[2], (q.shape[1], k.shape[1])
    qt, kt, vt = q.transpose(1, 2), *(x.transpose(1, 2).repeat_interleave(group, 1) for x in (k, v))
    scores = (qt @ kt.transpose(-1, -2)) * q.shape[3] ** -0.5
    distance = torch.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q - torch.arange(seqlen_k)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if attn_bias is not None:
        scores = scores + attn_bias.to(q.dtype)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.view(-1, q.shape[2], 1, 1).to(q.dtype) * distance.abs().to(q.dtype)
    hidden = torch.zeros_like(scores, dtype=torch.bool)
    left, right = window_size[0], 0 if causal else window_size[1]
    if left >= 0:
        hidden = hidden | (distance > left)
    if right >= 0:
        hidden = hidden | (distance < -right)
    if attn_mask is not None:
        hidden = hidden | ~attn_mask
    scores = scores.masked_fill(hidden, -math.inf)
    if sinks is not None:
        column = sinks.view(1, -1, 1, 1).to(q.dtype).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    empty = (scores == -math.inf).all(-1, keepdim=True)
    probs = torch.softmax(scores.masked_fill(empty, 0.0), -1).masked_fill(empty | (scores == -math.inf), 0.0)
    probs = probs[..., :seqlen_k]
    if dropout_p:
        probs = probs * keep_oracle(rng_state, *probs.shape, dropout_p) / (1 - dropout_p)
    return (probs @ vt).transpose(1, 2)


def widened(call):
    return {
        n: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for n, x in call.items()
    }


def truth_of(q, k, v, call):
    """out and lse, which dropout leaves alone, in float64."""
    out, lse = attention64(q, k, v, **{n: x for n, x in call.items() if n not in ("dropout_p", "rng_state")})
    if "dropout_p" in call:
        out = by_hand(q.double(), k.double(), v.double(), **widened(call))
    return out, lse


def close_enough(found, yardstick, truth, factor, floor, label, eps, roundings=1):
    if not found.numel():
        return
    error = (found.double() - truth).abs().max().item()
    allowed = factor * (yardstick.double() - truth).abs().max().item()
    scale = max(1.0, truth.abs().max().item())
    allowed += (
        floor * scale
        if found.dtype == torch.float32
        else 1e-13 * scale
        if found.dtype == torch.float64
        else 0.0
    )
    # A yardstick may be right by luck, with a sum of one term or none. A few roundings of the inputs' dtype are always
    # fair: the backward pass starts from the output as it was rounded, as FlashAttention-2's does.
    allowed = max(allowed, roundings * eps * truth.abs().max().item())
    assert error <= allowed, f"{label}: error {error:.3e}, allowed {allowed:.3e}"


@pytest.mark.parametrize("number", range(len(CASES)))
def test_forward(number):
    case = CASES[number]
    q, k, v, call = build(case)
    truth, lse64 = truth_of(q, k, v, call)
    yardstick = by_hand(q, k, v, **call)
    before = _C.isa()
    try:
        for isa in [*fastattn.cpu_isas(), "reference"]:
            if isa != "reference":
                _C.select_isa(isa)
            backend = "reference" if isa == "reference" else "cpu"
            out, lse = attention(q, k, v, return_lse=True, backend=backend, **call)
            assert torch.isfinite(out).all(), f"{isa} {case}"
            close_enough(out, yardstick, truth, 2.0, 1e-6, f"{isa} {case}", torch.finfo(q.dtype).eps)
            torch.testing.assert_close(
                lse.double(), lse64, rtol=1e-5, atol=1e-4 if q.dtype.itemsize == 2 else 1e-5
            )
    finally:
        _C.select_isa(before)


def gradients(function, q, k, v, call, dout):
    """dq, dk, dv and, where given, those of attn_bias and sinks."""
    leaves = {"q": q, "k": k, "v": v} | {n: call[n] for n in ("attn_bias", "sinks") if n in call}
    leaves = {n: x.detach().clone().requires_grad_() for n, x in leaves.items()}
    rest = {n: x for n, x in call.items() if n not in leaves}
    out = function(**leaves, **rest)
    grads = torch.autograd.grad(out, list(leaves.values()), dout.to(out.dtype), allow_unused=True)
    return {n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(leaves.items(), grads)}


@pytest.mark.parametrize("number", range(len(CASES)))
def test_backward(number):
    case = CASES[number]
    q, k, v, call = build(case)
    dout = torch.randn(*q.shape[:3], v.shape[3]).to(q.dtype)
    truth = gradients(by_hand, q.double(), k.double(), v.double(), widened(call), dout)
    yardstick = gradients(by_hand, q, k, v, call, dout)
    before = _C.isa()
    try:
        for isa in fastattn.cpu_isas():
            _C.select_isa(isa)
            found = gradients(lambda **x: attention(**x, backend="cpu"), q, k, v, call, dout)
            for name, grad in found.items():
                assert torch.isfinite(grad).all(), f"{isa} d{name} {case}"
                label = f"{isa} d{name} {case}"
                close_enough(
                    grad, yardstick[name], truth[name], 3.0, 3e-6, label, torch.finfo(q.dtype).eps, 8
                )
    finally:
        _C.select_isa(before)


SMALL = {
    **AXES,
    "lengths": [(a, b) for a in (0, 1, 5, 33, 70) for b in (0, 1, 6, 64, 130)],
    "headdim": [1, 7, 16, 40, 65],
}


@st.composite
def small_cases(draw):
    case = {name: draw(st.sampled_from(values)) for name, values in SMALL.items()}
    assume(legal(case))
    return case


@settings(max_examples=700, deadline=None, derandomize=True)
@given(case=small_cases(), isa=st.sampled_from(fastattn.cpu_isas()))
def test_random_forward(case, isa):
    q, k, v, call = build(case)
    truth, lse64 = truth_of(q, k, v, call)
    before = _C.isa()
    try:
        _C.select_isa(isa)
        out, lse = attention(q, k, v, return_lse=True, backend="cpu", **call)
    finally:
        _C.select_isa(before)
    atol = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float64: 1e-12}[q.dtype]
    torch.testing.assert_close(out.double(), truth, rtol=atol, atol=atol)
    torch.testing.assert_close(lse.double(), lse64, rtol=1e-4, atol=1e-4)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(case=small_cases(), isa=st.sampled_from(fastattn.cpu_isas()))
def test_random_backward(case, isa):
    q, k, v, call = build(case | {"dtype": torch.float32})
    dout = torch.randn(*q.shape[:3], v.shape[3])
    truth = gradients(by_hand, q.double(), k.double(), v.double(), widened(call), dout)
    before = _C.isa()
    try:
        _C.select_isa(isa)
        found = gradients(lambda **x: attention(**x, backend="cpu"), q, k, v, call, dout)
    finally:
        _C.select_isa(before)
    for name, grad in found.items():
        torch.testing.assert_close(
            grad.double(), truth[name], rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"d{n}: {m}"
        )
