"""Triton's decode: caches of every layout, several splits and their combination, the in-place append; against float64."""

from __future__ import annotations

import math

import pytest
import torch
from device import DTYPES, there
from pairs import all_pairs

from fastattn import attention_with_kvcache, merge_states
from fastattn.kernels.combine import combine
from fastattn.kernels.launch import fixed_blocks

AXES = {
    "dtype": DTYPES,
    "heads": [(4, 2), (8, 1), (2, 2)],
    "seqlen_q": [1, 3],
    "layout": ["plain", "rows", "leftpad", "paged", "paged leftpad"],
    "new": [False, True],
    "rotary": [None, "interleaved", "halves"],
    "window": [(-1, -1), (37, -1)],
    "causal": [True, False],
    "modifier": [None, "alibi", "softcap", "sinks"],
    "headdim": [16, 24],
}
CASES = all_pairs(AXES, lambda case: True, 11)
BATCH, CAPACITY, PAGE = 3, 84, 7


@pytest.fixture(autouse=True)
def small_blocks():
    with fixed_blocks(BLOCK_M=16, BLOCK_N=16, SPLIT=32, BLOCK_S=2):
        yield


def build(case):
    """The arguments of ``attention_with_kvcache``, by name."""
    (nheads, nheads_k), dim, dtype = case["heads"], case["headdim"], case["dtype"]
    paged, padded = "paged" in case["layout"], "leftpad" in case["layout"]
    pages = BATCH * CAPACITY // PAGE
    rows = (
        (pages + 3, PAGE)
        if paged
        else (BATCH + 2, CAPACITY)
        if case["layout"] == "rows"
        else (BATCH, CAPACITY)
    )
    seqlens = torch.tensor([0, 41, 80] if case["new"] else [1, 32, 84], dtype=torch.int32)
    call = {
        "q": torch.randn(BATCH, case["seqlen_q"], nheads, dim).to(dtype),
        "k_cache": torch.randn(*rows, nheads_k, dim).to(dtype),
        "v_cache": torch.randn(*rows, nheads_k, dim - 3).to(dtype),
        "cache_seqlens": seqlens,
        "causal": case["causal"],
        "window_size": case["window"],
    }
    if case["new"]:
        call["k"] = torch.randn(BATCH, 4, nheads_k, dim).to(dtype)
        call["v"] = torch.randn(BATCH, 4, nheads_k, dim - 3).to(dtype)
    if paged:
        call["block_table"] = torch.randperm(pages + 3)[:pages].view(BATCH, -1).int()
    if padded:
        call["cache_leftpad"] = torch.tensor([0, 20, 3], dtype=torch.int32)
    if case["layout"] == "rows":
        call["cache_batch_idx"] = torch.tensor([4, 0, 2], dtype=torch.int32)
    if case["rotary"]:
        angle = torch.rand(CAPACITY + 4, 6) * math.pi
        call |= {"rotary_cos": angle.cos(), "rotary_sin": angle.sin()}
        call["rotary_interleaved"] = case["rotary"] == "interleaved"
    return (
        call
        | {
            None: {},
            "alibi": {"alibi_slopes": torch.rand(nheads)},
            "softcap": {"softcap": 5.0},
            "sinks": {"sinks": torch.randn(nheads)},
        }[case["modifier"]]
    )


def widened(call):
    """In float64; the cache holds what its own dtype holds of the new rows."""
    wide = ("q", "k", "v", "k_cache", "v_cache")
    return {n: x.double() if n in wide else x for n, x in call.items()}


@pytest.mark.parametrize("number", range(len(CASES)))
def test_cache(number):
    case = CASES[number]
    call = build(case)
    if case["seqlen_q"] == 3:
        call["cache_seqlens"] = (
            call["cache_seqlens"].clamp(min=3) if not case["new"] else call["cache_seqlens"]
        )
    if "cache_leftpad" in call:
        call["cache_leftpad"] = call["cache_leftpad"].minimum(call["cache_seqlens"])
    wide, device = (
        widened(call),
        there({n: x.clone() if isinstance(x, torch.Tensor) else x for n, x in call.items()}),
    )
    truth, lse64 = attention_with_kvcache(**wide, return_lse=True, backend="reference")
    out, lse = attention_with_kvcache(**device, return_lse=True, backend="triton")
    atol = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[case["dtype"]]
    for name in ("k_cache", "v_cache"):
        torch.testing.assert_close(device[name].cpu().double(), wide[name], rtol=atol, atol=atol)
    torch.testing.assert_close(out.cpu().double(), truth, rtol=atol, atol=atol)
    torch.testing.assert_close(lse.cpu().double(), lse64, rtol=atol, atol=2 * atol)


def test_a_row_does_not_depend_on_its_batch():
    call = build(dict.fromkeys(AXES) | {n: v[0] for n, v in AXES.items()})
    first = attention_with_kvcache(**there(call), backend="triton")
    alone = {n: x[1:2] if isinstance(x, torch.Tensor) else x for n, x in there(call).items()}
    assert torch.equal(first[1:2], attention_with_kvcache(**alone, backend="triton"))


@pytest.mark.parametrize("sinks", [None, torch.tensor([0.3, -1.0])])
def test_combine(sinks):
    parts, lses = (
        torch.randn(5, 2, 2, 3, 20),
        torch.randn(5, 2, 2, 3),
    )  # (splits, batch, nheads, seqlen_q, headdim_v)
    lses[:, 0, 0, 0] = -math.inf  # nothing at all
    lses[1, :, :, 1] = -math.inf
    lses[:4, 1, 1, 2] = -math.inf  # only the last part
    truth, lse64 = merge_states(parts.double().transpose(2, 3), lses.double())
    if sinks is not None:
        column = sinks.double().view(1, 2, 1).expand_as(lse64)
        both = torch.logaddexp(lse64, column)
        truth, lse64 = truth * (lse64 - both).exp().transpose(1, 2)[..., None], both
    out, lse = torch.empty(2, 3, 2, 20), torch.empty(2, 2, 3)
    parts[lses == -math.inf] = math.nan  # an empty part was never written
    out, lse = there(out), there(lse)
    combine(there(parts), there(lses), None if sinks is None else there(sinks), out, lse)
    torch.testing.assert_close(out.cpu().double(), truth, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse.cpu().double(), lse64, rtol=1e-5, atol=1e-6)
