"""Attention forward: a program owns a tile of queries of one head and walks the keys that it sees (FlashAttention-2,
arXiv 2307.08691). Masks cost only where a block of keys meets an edge; blocks that nobody sees are not visited.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels import primitives as P
from fastattn.kernels.launch import attention_call, outputs, padded, tuned, unit_stride

CONFIGS = [
    {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
    {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2},
    {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2},
    {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
    {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1},
    {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
    {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
]


def forward_config(q: Tensor, v: Tensor) -> dict[str, int]:
    """The fixed choice, by bytes per row: what fits registers and shared memory (benchmarks/triton_static.py)."""
    row = padded(max(q.shape[3], v.shape[3])) * q.element_size()
    return next((c for most, c in zip((128, 256, 512, 1024), CONFIGS) if row <= most), CONFIGS[4])


@triton.jit
def attend(
    q, rows, seq, table, modifiers, dropout, k, v, k_batch, k_row, v_batch, v_row, page_size, headdim, headdim_v,
    first_key, last_key,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    EVEN_D: tl.constexpr, EVEN_DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax of a tile ``q (BLOCK_M, BLOCK_D)`` over its keys in [first_key, last_key).

    first_key is a multiple of BLOCK_N; k and v point at their head.
    """
    begin, full_begin, full_end, end = P.key_range(
        rows, seq, modifiers.left, modifiers.right, first_key, last_key, BLOCK_N
    )
    state = P.State(
        tl.full([BLOCK_M], float("-inf"), tl.float32),
        tl.zeros([BLOCK_M], tl.float32),
        tl.zeros([BLOCK_M, BLOCK_DV], tl.float32),
    )
    for phase in tl.static_range(3):  # the left edge, blocks without a mask, the right edge
        if phase == 0:
            lo, hi = begin, full_begin
        elif phase == 1:
            lo, hi = full_begin, full_end
        else:
            lo, hi = full_end, end
        if phase != 0 or modifiers.left is not None:
            for n in range(lo, hi, BLOCK_N):
                j = n + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
                inside = j < seq.seqlen_k
                at = P.key_rows(seq, table, j, inside, page_size, k_batch, k_row)
                keys = P.load_rows(k, at, inside, headdim, BLOCK_D, EVEN_D, phase != 1)  # (BLOCK_N, BLOCK_D)
                s = tl.dot(q, tl.trans(keys), input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
                s, _ = P.modify(s, rows, seq, j, modifiers, phase != 1)
                keep = None
                if dropout is not None:
                    keep = P.dropout_keep(dropout, rows, n, BLOCK_M, BLOCK_N)
                at = P.key_rows(seq, table, j, inside, page_size, v_batch, v_row)
                values = P.load_rows(
                    v, at, inside, headdim_v, BLOCK_DV, EVEN_DV, phase != 1
                )  # (BLOCK_N, BLOCK_DV)
                state = P.softmax_step(state, s, values, keep, PRECISION)
    return state


@tuned(CONFIGS, key=["headdim", "headdim_v", "longest"])
@triton.jit(do_not_specialize=["seqlen_q", "seqlen_k", "longest", "left", "right", "dropout_threshold"])
def attention_forward_kernel(
    q, k, v, out, lse,
    cu_seqlens_q, cu_seqlens_k, seqlens_k, leftpad, batch_idx, table, slopes, bias, mask, sinks, rng_state,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, out_batch, out_row, out_head,
    lse_batch, lse_head, table_batch, slopes_batch, bias_batch, bias_head, bias_row, bias_key,
    mask_batch, mask_head, mask_row, mask_key,
    nheads, seqlen_q, seqlen_k, page_size, headdim, headdim_v, longest,
    scale, softcap, left, right, dropout_threshold, dropout_scale,
    GROUP: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    EVEN_D: tl.constexpr, EVEN_DV: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program per (tile of queries, head, sequence), flattened in this order, the longest tiles first."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(longest, BLOCK_M)
    tile = pid % tiles
    head = (pid // tiles % nheads).to(tl.int64)
    b = pid // tiles // nheads
    if right is not None:
        tile = tiles - 1 - tile
    seq = P.sequence_of(b, cu_seqlens_q, cu_seqlens_k, seqlens_k, leftpad, batch_idx, seqlen_q, seqlen_k)
    if table is not None:
        table = table + b.to(tl.int64) * table_batch
    if tile * BLOCK_M >= seq.seqlen_q:
        return
    rows = P.rows_of(tile, head.to(tl.int32), seq.seqlen_q, BLOCK_M, 1)
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
    row = seq.q_first + rows.i  # (BLOCK_M,) int64
    at = b.to(tl.int64) * q_batch + row * q_row + head * q_head
    queries = P.load_rows(q, at, rows.inside, headdim, BLOCK_D, EVEN_D, True)  # (BLOCK_M, BLOCK_D)
    kv_head = head // GROUP
    state = attend(
        queries, rows, seq, table, modifiers, dropout, k + kv_head * k_head, v + kv_head * v_head,
        k_batch, k_row, v_batch, v_row, page_size, headdim, headdim_v, 0, seq.seqlen_k,
        BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, EVEN_D, EVEN_DV, PRECISION,
    )  # fmt: skip
    if sinks is not None:
        state = P.add_sink(state, tl.load(sinks + rows.head))
    values, log_sum = P.finish(state, dropout_scale)
    d = tl.arange(0, BLOCK_DV)
    at = b.to(tl.int64) * out_batch + row * out_row + head * out_head
    stored = rows.inside[:, None] & (d < headdim_v)[None, :]
    tl.store(out + at[:, None] + d[None, :], values.to(out.dtype.element_ty), mask=stored)
    tl.store(lse + b.to(tl.int64) * lse_batch + head * lse_head + row, log_sum, mask=rows.inside)


def forward(args: Any) -> tuple[Tensor, Tensor]:
    """``out (batch, seqlen_q, nheads, headdim_v)`` in q's dtype and ``lse (batch, nheads, seqlen_q)`` float32.

    Packed: out (1, total_q, nheads, headdim_v), lse (nheads, total_q). ``args`` is an ``AttentionArgs``.
    """
    q, k, v = unit_stride(args.q), unit_stride(args.k), unit_stride(args.v)
    out, lse, places = outputs(args, q, v.shape[3])
    longest = args.max_seqlen_q if args.cu_seqlens_q is not None else q.shape[1]
    call = attention_call(args, q, k, v)
    if out.numel() and longest:
        programs = args.batch * q.shape[2]

        def grid(blocks: dict[str, Any]) -> tuple[int]:
            return (triton.cdiv(longest, blocks["BLOCK_M"]) * programs,)

        attention_forward_kernel.launch(
            grid, forward_config(q, v), out=out, lse=lse, longest=longest, **places, **call
        )
    return out, lse
