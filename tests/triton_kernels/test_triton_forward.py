"""Triton's attention forward: the CPU attention's feature table on ragged shapes of several tiles, against float64."""

from __future__ import annotations

import pytest
import torch
from device import DTYPES, there
from oracles import attention64
from pairs import all_pairs
from test_features import build, by_hand, close_enough

from fastattn import attention, attention_varlen
from fastattn.kernels.launch import fixed_blocks

AXES = {
    "dtype": DTYPES,
    "heads": [(2, 2), (4, 2), (2, 1)],
    "lengths": [(1, 1), (1, 40), (35, 50), (50, 35), (40, 0)],
    "headdim": [16, 24, 7],
    "headdim_v": ["same", 20],
    "causal": [False, True],
    "window": [(-1, -1), (3, -1), (-1, 2), (17, 8), (0, 0)],
    "softcap": [0.0, 15.0],
    "alibi": [None, "head", "batch"],
    "bias": [None, "b11k", "1hqk", "inf", "turned"],
    "mask": [None, "left", "random", "rows"],
    "sinks": [False, True],
    "strides": ["plain", "head-major", "slices"],
}
CASES = all_pairs(AXES, lambda case: True, 5)


@pytest.fixture(autouse=True)
def small_blocks():
    with fixed_blocks(BLOCK_M=16, BLOCK_N=16, SPLIT=32):
        yield


def check(q, k, v, call, label):
    truth, lse64 = attention64(q, k, v, **call)
    out, lse = attention(there(q), there(k), there(v), return_lse=True, backend="triton", **there(call))
    out, lse = out.cpu(), lse.cpu()
    assert torch.isfinite(out).all(), label
    close_enough(out, by_hand(q, k, v, **call), truth, 2.0, 1e-6, label, torch.finfo(q.dtype).eps)
    torch.testing.assert_close(lse.double(), lse64, rtol=1e-5, atol=1e-4 if q.dtype.itemsize == 2 else 1e-5)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_features(number):
    check(*build(CASES[number]), str(CASES[number]))


@pytest.mark.parametrize("headdim", [64, 128, 512])
@pytest.mark.parametrize("dtype", DTYPES)
def test_head_dimensions(headdim, dtype):
    q, k, v = (torch.randn(1, n, 1, headdim).to(dtype) for n in (19, 37, 37))
    call = {"causal": True, "window_size": (-1, -1), "softcap": 0.0}
    check(q, k, v, call, f"{headdim} {dtype}")


@pytest.mark.parametrize(("block_m", "block_n"), [(32, 16), (16, 32), (64, 64)])
def test_blocks(block_m, block_n):
    q, k, v = (torch.randn(1, n, 2, 16) for n in (70, 90, 90))
    call = {"causal": True, "window_size": (40, 0), "softcap": 0.0}
    with fixed_blocks(BLOCK_M=block_m, BLOCK_N=block_n):
        check(q, k, v, call, f"{block_m} {block_n}")


@pytest.mark.parametrize("seqlen_q", [21, 3])  # the second is a decode step
@pytest.mark.parametrize("dropout_p", [0.17, 0.8, 1.0])
def test_dropout_drops_what_the_definition_drops(dropout_p, seqlen_q):
    q, k, v = (torch.randn(2, n, heads, 16) for n, heads in ((seqlen_q, 4), (39, 2), (39, 2)))
    call = {"dropout_p": dropout_p, "rng_state": torch.tensor([2**62 + 12345, 2**40 + 7]), "causal": True}
    truth = attention(q.double(), k.double(), v.double(), backend="reference", **call)
    out = attention(there(q), there(k), there(v), backend="triton", **there(call)).cpu()
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("paged", [False, True])
def test_packed_sequences(dtype, paged):
    lengths_q, lengths_k = [17, 0, 1, 33], [20, 5, 0, 40]
    cu_q, cu_k = (
        torch.tensor([0, *torch.tensor(x).cumsum(0)], dtype=torch.int32) for x in (lengths_q, lengths_k)
    )
    q, k, v = (torch.randn(n, heads, 24).to(dtype) for n, heads in ((51, 4), (65, 2), (65, 2)))
    call = {"causal": True, "window_size": (19, -1), "alibi_slopes": torch.rand(4, 4)}
    if paged:
        page_size, table = 6, torch.randperm(28).view(4, 7).int()
        k, v = (torch.randn(28, page_size, 2, 24).to(dtype) for _ in range(2))
        call["block_table"] = table
    wide = [x.double() for x in (q, k, v)]
    truth, lse64 = attention_varlen(*wide, cu_q, cu_k, 33, 40, return_lse=True, backend="reference", **call)
    out, lse = attention_varlen(
        *(there(x) for x in (q, k, v, cu_q, cu_k)), 33, 40, return_lse=True, backend="triton", **there(call)
    )
    atol = 1e-5 if dtype == torch.float32 else 2e-3 if dtype == torch.float16 else 2e-2
    torch.testing.assert_close(out.cpu().double(), truth, rtol=atol, atol=atol)
    torch.testing.assert_close(lse.cpu().double(), lse64, rtol=1e-5, atol=1e-4)


def test_same_bits_every_time():
    q, k, v = (there(torch.randn(2, 40, 2, 16, dtype=torch.float16)) for _ in range(3))
    first = attention(q, k, v, causal=True, backend="triton")
    repeats = 250 if torch.version.cuda or torch.version.hip else 2
    assert all(torch.equal(first, attention(q, k, v, causal=True, backend="triton")) for _ in range(repeats))
