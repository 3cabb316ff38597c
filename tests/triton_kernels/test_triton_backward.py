"""Triton's gradients: every modifier, ragged shapes of several tiles, packed sequences; against float64 autograd."""

from __future__ import annotations

import math

import pytest
import torch
from device import DTYPES, there
from pairs import all_pairs
from test_features import build, by_hand, close_enough, gradients

from fastattn import attention, attention_varlen
from fastattn.args import AttentionArgs
from fastattn.backends import triton
from fastattn.backends.reference import bias_by_score
from fastattn.kernels.launch import fixed_blocks

AXES = {
    "dtype": DTYPES,
    "heads": [(2, 2), (4, 2), (2, 1)],
    "lengths": [(1, 20), (19, 34), (34, 19), (5, 0)],
    "headdim": [16, 7],
    "headdim_v": ["same", 20],
    "causal": [False, True],
    "window": [(-1, -1), (3, -1), (-1, 2)],
    "softcap": [0.0, 15.0],
    "alibi": [None, "batch"],
    "bias": [None, "11qk", "bhq1", "turned"],
    "mask": [None, "left", "rows"],
    "sinks": [False, True],
    "strides": ["plain", "head-major", "slices"],
}
CASES = all_pairs(AXES, lambda case: True, 7)


@pytest.fixture(autouse=True)
def small_blocks():
    with fixed_blocks(BLOCK_M=16, BLOCK_N=16):
        yield


def triton_gradients(q, k, v, call, dout, dlse=None):
    """dq, dk, dv and, where given, those of attn_bias and sinks, by the backend itself.

    Not through autograd: inside an operator ttsem's tensors forget that they play a GPU's.
    """
    call = {"softmax_scale": q.shape[-1] ** -0.5} | call
    args = AttentionArgs(q=there(q), k=there(k), v=there(v), return_lse=True, **there(call))
    out, lse = triton.attention(args)
    names = ["q", "k", "v", "attn_bias", "sinks"]
    found = triton.attention_backward(
        args, out, lse, there(dout), there(dlse), needs_dbias="attn_bias" in call
    )
    return {n: x.cpu() for n, x in zip(names, found) if x is not None}


@pytest.mark.parametrize("number", range(len(CASES)))
def test_gradients(number):
    case = CASES[number]
    q, k, v, call = build(case)
    dout = torch.randn(*q.shape[:3], v.shape[3]).to(q.dtype)
    wide = {
        n: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for n, x in call.items()
    }
    truth = gradients(by_hand, q.double(), k.double(), v.double(), wide, dout)
    yardstick = gradients(by_hand, q, k, v, call, dout)
    found = triton_gradients(q, k, v, call, dout)
    assert set(found) == set(truth)
    for name, grad in found.items():
        assert torch.isfinite(grad).all(), f"d{name} {case}"
        label = f"d{name} {case}"
        close_enough(grad, yardstick[name], truth[name], 3.0, 3e-6, label, torch.finfo(q.dtype).eps, 8)


def test_relative_bias():
    """The values of the matrix that it stands for; and the sums of that one's gradient by diagonals."""
    q, k, v, dout = (torch.randn(2, n, 2, 16) for n in (19, 34, 34, 19))
    line = torch.randn(1, 2, 1, 52, requires_grad=True)
    whole = bias_by_score(line, 19, 34)
    expected = triton_gradients(q, k, v, {"attn_bias": whole.detach()}, dout)
    found = triton_gradients(q, k, v, {"attn_bias": line.detach(), "bias_is_relative": True}, dout)
    (expected["attn_bias"],) = torch.autograd.grad(whole, line, expected["attn_bias"])
    for name, x in found.items():
        torch.testing.assert_close(x, expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("block_m", "block_n"), [(32, 16), (16, 32)])
def test_blocks(block_m, block_n):
    q, k, v = (torch.randn(1, n, 2, 16, requires_grad=True) for n in (70, 90, 90))
    call, dout = {"causal": True, "window_size": (40, -1)}, torch.randn(1, 70, 2, 16)
    out = attention(q.double(), k.double(), v.double(), backend="reference", **call)
    truth = torch.autograd.grad(out, (q, k, v), dout.double())
    with fixed_blocks(BLOCK_M=block_m, BLOCK_N=block_n):
        found = triton_gradients(q.detach(), k.detach(), v.detach(), call, dout)
    for name, expected in zip("qkv", truth):
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("call", [
    {"softcap": 7.0},
    {"dropout_p": 0.3, "rng_state": torch.tensor([2**62 + 5, 9])},
    {"dropout_p": 1.0, "rng_state": torch.tensor([1, 2])},
])  # fmt: skip
def test_gradients_of_out_and_lse(call):
    call = call | {"causal": True}
    inputs = [torch.randn(2, n, heads, 16, requires_grad=True) for n, heads in ((21, 4), (35, 2), (35, 2))]
    dout, dlse = torch.randn(2, 21, 4, 16), torch.randn(2, 4, 21)
    outputs = attention(*(x.double() for x in inputs), return_lse=True, backend="reference", **call)
    truth = torch.autograd.grad(outputs, inputs, (dout.double(), dlse.double()))
    found = triton_gradients(*(x.detach() for x in inputs), call, dout, dlse)
    for name, expected in zip("qkv", truth):
        torch.testing.assert_close(found[name], expected, rtol=2e-4, atol=2e-5)


def test_packed_sequences():
    lengths_q, lengths_k = [17, 0, 1, 33], [20, 5, 0, 40]
    cu_q, cu_k = (
        torch.tensor([0, *torch.tensor(x).cumsum(0)], dtype=torch.int32) for x in (lengths_q, lengths_k)
    )
    leaves = [torch.randn(n, heads, 24, requires_grad=True) for n, heads in ((51, 4), (65, 2), (65, 2))]
    leaves += [torch.randn(4, requires_grad=True), torch.randn(4, 1, 1, 40, requires_grad=True)]
    call = {"causal": True, "window_size": (19, -1)}
    q, k, v, sinks, bias = (x.double() for x in leaves)
    out = attention_varlen(
        q, k, v, cu_q, cu_k, 33, 40, sinks=sinks, attn_bias=bias, backend="reference", **call
    )
    dout = torch.randn(51, 4, 24)
    truth = torch.autograd.grad(out, leaves, dout.double())
    q, k, v, sinks, bias = (x.detach() for x in leaves)
    call |= {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": 33, "max_seqlen_k": 40}
    found = triton_gradients(
        q[None], k[None], v[None], call | {"sinks": sinks, "attn_bias": bias}, dout[None]
    )
    for name, expected in zip(("q", "k", "v", "sinks", "attn_bias"), truth):
        torch.testing.assert_close(found[name].view_as(expected), expected, rtol=1e-4, atol=1e-5)


def test_same_bits_every_time():
    q, k, v = (torch.randn(2, 40, heads, 16, dtype=torch.float16) for heads in (4, 2, 2))
    first = triton_gradients(q, k, v, {"causal": True}, torch.ones_like(q))
    for _ in range(250 if torch.version.cuda or torch.version.hip else 1):
        again = triton_gradients(q, k, v, {"causal": True}, torch.ones_like(q))
        assert all(torch.equal(first[n], again[n]) for n in first)


def test_rows_without_keys_have_no_gradient():
    q, k, v = (torch.randn(1, n, 2, 16) for n in (40, 20, 20))
    dq = triton_gradients(q, k, v, {"causal": True, "softmax_scale": math.pi}, torch.ones_like(q))["q"]
    assert not dq[:, :20].any()
    assert dq[:, 20:].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_key_takes_all_whatever_q_says(dtype):
    q, k, v = (torch.randn(2, 1, 2, 16).to(dtype) for _ in range(3))
    dout = torch.randn(2, 1, 2, 16).to(dtype)
    found = triton_gradients(q, k, v, {}, dout)
    assert found["q"].abs().max() < 1e-5  # dout.v - dout.out, added up in two orders
    torch.testing.assert_close(found["v"], dout)
