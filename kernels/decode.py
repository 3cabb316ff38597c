"""Attention of few queries to a long cache (flash-decoding): the keys are split among programs, the heads that share a
KV head are rows of one tile, and ``combine`` merges the parts. Also the cache's in-place append with rotary.

A split begins at a multiple of its length, which follows the cache's capacity alone: no length is read by the host,
and a row's bits do not depend on its batch.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels import primitives as P
from fastattn.kernels.attention import attend
from fastattn.kernels.combine import combine
from fastattn.kernels.launch import (
    attention_call,
    chosen,
    keys_of,
    outputs,
    padded,
    strides,
    tuned,
    unit_stride,
)

MAX_ROWS = 32  # queries times heads per KV head, above which the forward kernel is as good
MAX_SPLITS = 128
CONFIGS = [
    {"BLOCK_M": 16, "BLOCK_N": 64, "SPLIT": 512, "num_warps": 4, "num_stages": 2},
    {"BLOCK_M": 16, "BLOCK_N": 32, "SPLIT": 512, "num_warps": 4, "num_stages": 2},
    {"BLOCK_M": 16, "BLOCK_N": 16, "SPLIT": 512, "num_warps": 4, "num_stages": 1},
]


def decode_config(q: Tensor, v: Tensor) -> dict[str, int]:
    """The fixed choice, by bytes per row."""
    row = padded(max(q.shape[3], v.shape[3])) * q.element_size()
    return CONFIGS[0] if row <= 256 else CONFIGS[1] if row <= 1024 else CONFIGS[2]


@tuned(CONFIGS, key=["headdim", "headdim_v", "GROUP"])
@triton.jit(do_not_specialize=["seqlen_q", "seqlen_k", "left", "right", "dropout_threshold", "splits"])
def attention_decode_kernel(
    q, k, v, parts, lses,
    cu_seqlens_q, cu_seqlens_k, seqlens_k, leftpad, batch_idx, table, slopes, bias, mask, sinks, rng_state,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, table_batch,
    slopes_batch, bias_batch, bias_head, bias_row, bias_key, mask_batch, mask_head, mask_row, mask_key,
    nheads, seqlen_q, seqlen_k, page_size, headdim, headdim_v, splits, split_factor,
    scale, softcap, left, right, dropout_threshold, dropout_scale,
    GROUP: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    EVEN_D: tl.constexpr, EVEN_DV: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One program per (tile of rows, split of SPLIT * split_factor keys, KV head, sequence), flattened.

    parts (splits, batch, nheads, seqlen_q, headdim_v) and lses (splits, batch, nheads, seqlen_q), float32; the part of
    an empty split stays unwritten.
    """
    pid = tl.program_id(0)
    tiles = tl.cdiv(seqlen_q * GROUP, BLOCK_M)
    kv_heads = nheads // GROUP
    tile = pid % tiles
    split = pid // tiles % splits
    kv_head = pid // tiles // splits % kv_heads
    b = pid // tiles // splits // kv_heads
    batch = tl.num_programs(0) // (tiles * splits * kv_heads)
    seq = P.sequence_of(b, cu_seqlens_q, cu_seqlens_k, seqlens_k, leftpad, batch_idx, seqlen_q, seqlen_k)
    if table is not None:
        table = table + b.to(tl.int64) * table_batch
    rows = P.rows_of(tile, kv_head, seq.seqlen_q, BLOCK_M, GROUP)
    slope, bias_at, mask_at = slopes, bias, mask
    if slopes is not None:
        slope = P.slopes_of(b, rows, slopes, slopes_batch)
    if bias is not None:
        bias_at = P.row_pointers(bias, b, rows, bias_batch, bias_head, bias_row)
    if mask is not None:
        mask_at = P.row_pointers(mask, b, rows, mask_batch, mask_head, mask_row)
    modifiers = P.Modifiers(scale, softcap, slope, bias_at, bias_key, mask_at, mask_key, left, right)
    dropout = None
    if rng_state is not None:
        dropout = P.dropout_of(b, nheads, rows, rng_state, dropout_threshold)
    at = b.to(tl.int64) * q_batch + rows.i.to(tl.int64) * q_row + rows.head.to(tl.int64) * q_head
    queries = P.load_rows(q, at, rows.inside, headdim, BLOCK_D, EVEN_D, True)  # (BLOCK_M, BLOCK_D)
    kv_head = kv_head.to(tl.int64)
    first_key = split * SPLIT * split_factor
    last_key = tl.minimum(first_key + SPLIT * split_factor, seq.seqlen_k)
    state = attend(
        queries, rows, seq, table, modifiers, dropout, k + kv_head * k_head, v + kv_head * v_head,
        k_batch, k_row, v_batch, v_row, page_size, headdim, headdim_v, first_key, last_key,
        BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, EVEN_D, EVEN_DV, PRECISION,
    )  # fmt: skip
    values, log_sum = P.finish(state, dropout_scale)
    row = ((split * batch + b).to(tl.int64) * nheads + rows.head) * seqlen_q + rows.i  # (BLOCK_M,)
    d = tl.arange(0, BLOCK_DV)
    written = (rows.inside & (log_sum > float("-inf")))[:, None] & (d < headdim_v)[None, :]
    tl.store(parts + row[:, None] * headdim_v + d[None, :], values, mask=written)
    tl.store(lses + row, log_sum, mask=rows.inside)


def serves(args: Any) -> bool:
    """Whether a call is a decode step: few queries, of sequences that are not packed."""
    rows = args.q.shape[1] * (args.q.shape[2] // args.k.shape[2])
    return args.cu_seqlens_q is None and rows <= MAX_ROWS


def decode(args: Any) -> tuple[Tensor, Tensor]:
    """As ``attention.forward``: ``out (batch, seqlen_q, nheads, headdim_v)``, ``lse (batch, nheads, seqlen_q)``."""
    q, k, v = unit_stride(args.q), unit_stride(args.k), unit_stride(args.v)
    out, lse, _ = outputs(args, q, v.shape[3])
    if not out.numel():
        return out, lse
    batch, seqlen_q, nheads, _ = q.shape
    config = chosen(decode_config(q, v))
    length = config["SPLIT"]
    factor = triton.cdiv(keys_of(args), length * MAX_SPLITS) or 1
    splits = triton.cdiv(keys_of(args), length * factor) or 1
    parts = q.new_empty((splits, batch, nheads, seqlen_q, v.shape[3]), dtype=torch.float32)
    lses = q.new_empty((splits, batch, nheads, seqlen_q), dtype=torch.float32)
    call = attention_call(args, q, k, v)

    def grid(blocks: dict[str, Any]) -> tuple[int]:
        tiles = triton.cdiv(seqlen_q * call["GROUP"], blocks["BLOCK_M"])
        return (tiles * splits * k.shape[2] * batch,)

    attention_decode_kernel.launch(
        grid, config, parts=parts, lses=lses, splits=splits, split_factor=factor, **call
    )
    combine(parts, lses, call["sinks"], out, lse)
    return out, lse


@triton.jit
def rotated(x, row, position, cos, sin, half, headdim, INTERLEAVED: tl.constexpr, BLOCK_D: tl.constexpr):
    """(BLOCK_D,) float32 of the row that x points at, turned by ``position``; dimensions from 2 * half on stay."""
    d = tl.arange(0, BLOCK_D)
    value = tl.load(x + row + d, mask=d < headdim, other=0.0).to(tl.float32)
    if cos is not None:
        turns = d < 2 * half
        if INTERLEAVED:
            pair, angle, second = d ^ 1, d // 2, d % 2 == 1
        else:
            second = d >= half
            pair = tl.where(second, d - half, d + half)
            angle = tl.where(second, d - half, d)
        other = tl.load(x + row + pair, mask=turns, other=0.0).to(tl.float32)
        at = position.to(tl.int64) * half + angle
        c = tl.load(cos + at, mask=turns, other=1.0)
        s = tl.load(sin + at, mask=turns, other=0.0)
        value = tl.where(turns, tl.where(second, other * s + value * c, value * c - other * s), value)
    return value


@triton.jit
def store_row(x, row, value, headdim, BLOCK_D: tl.constexpr):
    """``value (BLOCK_D,)`` float32 into the row that x points at."""
    d = tl.arange(0, BLOCK_D)
    tl.store(x + row + d, value.to(x.dtype.element_ty), mask=d < headdim)


@tuned([{"num_warps": 4, "num_stages": 1}], key=["headdim"])
@triton.jit(do_not_specialize=["seqlen_q", "seqlen_new", "half"])
def append_kernel(
    q, q_out, k, v, k_cache, v_cache, cache_seqlens, leftpad, batch_idx, table, cos, sin,
    q_batch, q_row, q_head, q_out_batch, q_out_row, q_out_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    k_cache_batch, k_cache_row, k_cache_head, v_cache_batch, v_cache_row, v_cache_head, table_batch,
    nheads, nheads_k, seqlen_q, seqlen_new, page_size, headdim, headdim_v, half,
    PER_ROW: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One program per (token, head) of q, then of the new keys and values, of one sequence (second dimension)."""
    b = tl.program_id(1).to(tl.int64)
    unit = tl.program_id(0)
    length = tl.load(cache_seqlens + b)
    begin = tl.zeros([], tl.int32)
    if leftpad is not None:
        begin = tl.load(leftpad + b)
    queries = 0
    if cos is not None:
        queries = seqlen_q * nheads
    if unit < queries:
        i = (unit // nheads).to(tl.int64)
        head = (unit % nheads).to(tl.int64)
        position = length - begin
        if PER_ROW:
            position += i.to(tl.int32)
        row = b * q_batch + i * q_row + head * q_head
        value = rotated(q, row, position, cos, sin, half, headdim, INTERLEAVED, BLOCK_D)
        store_row(q_out, b * q_out_batch + i * q_out_row + head * q_out_head, value, headdim, BLOCK_D)
    elif k is not None:
        i = ((unit - queries) // nheads_k).to(tl.int64)
        head = ((unit - queries) % nheads_k).to(tl.int64)
        place = length + i
        batch_row = b
        if batch_idx is not None:
            batch_row = tl.load(batch_idx + b).to(tl.int64)
        if table is not None:
            batch_row = tl.load(table + b * table_batch + place // page_size).to(tl.int64)
            place = place % page_size
        row = b * k_batch + i * k_row + head * k_head
        value = rotated(k, row, length - begin + i, cos, sin, half, headdim, INTERLEAVED, BLOCK_D)
        at = batch_row * k_cache_batch + place * k_cache_row + head * k_cache_head
        store_row(k_cache, at, value, headdim, BLOCK_D)
        row = b * v_batch + i * v_row + head * v_head
        values = rotated(v, row, 0, None, None, 0, headdim_v, INTERLEAVED, BLOCK_DV)
        at = batch_row * v_cache_batch + place * v_cache_row + head * v_cache_head
        store_row(v_cache, at, values, headdim_v, BLOCK_DV)


def append(args: Any) -> tuple[Tensor, Tensor]:
    """Write the new (rotated) k and v at ``cache_seqlens``; returns rotated q and the new lengths (batch,)."""
    q = unit_stride(args.q)
    k, v = (None if x is None else unit_stride(x) for x in (args.k, args.v))
    batch, seqlen_q, nheads, headdim = q.shape
    nheads_k, headdim_v = args.v_cache.shape[2:]
    cos, sin = (None if x is None else x.float().contiguous() for x in (args.rotary_cos, args.rotary_sin))
    q_out = q if cos is None else torch.empty_like(q, memory_format=torch.contiguous_format)
    seqlen_new = 0 if k is None else k.shape[1]
    units = (0 if cos is None else seqlen_q * nheads) + seqlen_new * nheads_k
    if batch and units:
        append_kernel.launch(
            lambda blocks: (units, batch), {"num_warps": 4, "num_stages": 1},
            q=q, q_out=q_out, k=k, v=v, k_cache=args.k_cache, v_cache=args.v_cache,
            cache_seqlens=args.cache_seqlens, leftpad=args.k_leftpad, batch_idx=args.cache_batch_idx,
            table=args.block_table, cos=cos, sin=sin,
            **strides(q, "q_batch", "q_row", "q_head"), **strides(q_out, "q_out_batch", "q_out_row", "q_out_head"),
            **strides(k, "k_batch", "k_row", "k_head"), **strides(v, "v_batch", "v_row", "v_head"),
            **strides(args.k_cache, "k_cache_batch", "k_cache_row", "k_cache_head"),
            **strides(args.v_cache, "v_cache_batch", "v_cache_row", "v_cache_head"),
            **strides(args.block_table, "table_batch"),
            nheads=nheads, nheads_k=nheads_k, seqlen_q=seqlen_q, seqlen_new=seqlen_new,
            page_size=args.k_cache.shape[1], headdim=headdim, headdim_v=headdim_v,
            half=0 if cos is None else cos.shape[1], PER_ROW=args.rotary_per_row, INTERLEAVED=args.rotary_interleaved,
            BLOCK_D=padded(headdim), BLOCK_DV=padded(headdim_v),
        )  # fmt: skip
    return q_out, args.cache_seqlens if k is None else args.cache_seqlens + seqlen_new
