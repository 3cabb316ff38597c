"""Append with rotary, in place, by the CUDA kernel; and whole decode steps: emulated, and on a GPU where there is one."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from test_cuda_attention import checked, paged_copy, plain_args

from fastattn.args import KVAppendArgs
from fastattn.backends import reference

BATCH, NHEADS, NHEADS_K, CAPACITY = 3, 4, 2, 90


def append_args(dtype, headdim, headdim_v, seqlen_new, rotary, layout, seqlen_q=3):
    """Arguments whose cache is NaN wherever no token is yet."""
    lengths = torch.tensor([80, 7, 33], dtype=torch.int32)
    caches = []
    for dim in (headdim, headdim_v):
        cache = torch.full((BATCH, CAPACITY, NHEADS_K, dim), math.nan).to(dtype)
        for b in range(BATCH):
            cache[b, : lengths[b]] = torch.randn(int(lengths[b]), NHEADS_K, dim).to(dtype)
        caches.append(cache)
    call = {"q": torch.randn(BATCH, seqlen_q, NHEADS, headdim).to(dtype), "cache_seqlens": lengths}
    if seqlen_new:
        call["k"] = torch.randn(BATCH, seqlen_new, NHEADS_K, headdim).to(dtype)
        call["v"] = torch.randn(BATCH, seqlen_new, NHEADS_K, headdim_v).to(dtype)
    if rotary:
        half = headdim // 2 if rotary["whole"] else 5
        angle = torch.rand(CAPACITY, half) * 6
        call |= {"rotary_cos": angle.cos(), "rotary_sin": angle.sin()}
        call |= {"rotary_interleaved": rotary["interleaved"], "rotary_per_row": rotary["per_row"]}
    if layout == "leftpad":
        call["k_leftpad"] = torch.tensor([3, 0, 20], dtype=torch.int32)
    if layout == "rows":
        call["cache_batch_idx"] = torch.tensor([2, 0, 1], dtype=torch.int32)
        call["cache_seqlens"] = lengths[[2, 0, 1]]
    if layout == "pages":
        generator = torch.get_rng_state()
        k_pages, call["block_table"] = paged_copy(caches[0], 16)
        torch.set_rng_state(generator)
        v_pages, _ = paged_copy(caches[1], 16)
        caches = [k_pages, v_pages]
    return KVAppendArgs(k_cache=caches[0], v_cache=caches[1], **call)


def clones(args):
    return KVAppendArgs(
        **{
            name: x.clone() if isinstance(x := getattr(args, name), torch.Tensor) else x
            for name in args.__slots__
        }
    )


ROTARY = [None] + [
    {"whole": whole, "interleaved": interleaved, "per_row": per_row}
    for whole, interleaved, per_row in itertools.product((True, False), repeat=3)
]


@pytest.mark.parametrize("layout", ["plain", "leftpad", "rows", "pages"])
@pytest.mark.parametrize("rotary", ROTARY, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_append(machine, dtype, rotary, layout):
    for headdim, headdim_v, seqlen_new in ((64, 64, 3), (40, 33, 1), (64, 128, 0)):
        args = append_args(dtype, headdim, headdim_v, seqlen_new, rotary, layout)
        expected_args = clones(args)
        expected = reference.append_kv(expected_args)
        q, seqlens = machine.append_kv(args, seed=headdim)
        assert machine.faults() == {}, machine.report()
        assert torch.equal(seqlens, expected[1])
        ulp = torch.finfo(dtype).eps
        # Products that cancel leave roundings of what cancelled.
        torch.testing.assert_close(
            q, expected[0], rtol=2 * ulp, atol=4e-6 if dtype == torch.bfloat16 else 4e-7
        )
        for found, wanted in ((args.k_cache, expected_args.k_cache), (args.v_cache, expected_args.v_cache)):
            torch.testing.assert_close(found, wanted, rtol=2 * ulp, atol=4e-6, equal_nan=True)
        assert torch.equal(args.v_cache.nan_to_num(), expected_args.v_cache.nan_to_num())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("layout", ["plain", "rows", "pages", "leftpad"])
def test_a_decode_step(machine, layout, dtype):
    """Append, then attend: the new tokens see the cache and each other."""
    rotary = {"whole": True, "interleaved": False, "per_row": True}
    args = append_args(dtype, 64, 64, 3, rotary, layout)
    expected_args = clones(args)
    found_q, seqlens = machine.append_kv(args)
    expected_q, _ = reference.append_kv(expected_args)

    def attend(q, cache):
        return plain_args(
            q, cache.k_cache, cache.v_cache, causal=True, seqlens_k=seqlens, k_leftpad=cache.k_leftpad,
            cache_batch_idx=cache.cache_batch_idx, block_table=cache.block_table,
        )  # fmt: skip

    out, lse = checked(machine, attend(found_q, args))
    truth, lse_truth = reference.attention(attend(expected_q, expected_args))
    torch.testing.assert_close(out, truth, rtol=0, atol=4e-6 if dtype == torch.float32 else 3e-3)
    torch.testing.assert_close(lse, lse_truth, rtol=1e-3, atol=2e-3)
