"""Attention's gradients without atomics: one kernel owns tiles of queries (dQ), another blocks of keys (dK, dV), and
each recomputes the probabilities from ``lse`` (FlashAttention-2, arXiv 2307.08691, section 3.1.2). Every sum has one
order.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels import primitives as P
from fastattn.kernels.launch import attention_call, keys_of, padded, strides, tuned, unit_stride

DQ_CONFIGS = [
    {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
    {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2},
    {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
    {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 8, "num_stages": 1},
]
DKDV_CONFIGS = [
    {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
    {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
    {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
    {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 8, "num_stages": 1},
]
DELTA_CONFIGS = [{"BLOCK_M": 32, "num_warps": 4, "num_stages": 1}]


@tuned(DELTA_CONFIGS, key=["headdim_v"])
@triton.jit(do_not_specialize=["seqlen_q"])
def delta_kernel(
    out, dout, dlse, delta, out_batch, out_row, out_head, dout_batch, dout_row, dout_head,
    nheads, seqlen_q, headdim_v, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta (batch, nheads, seqlen_q) = sum(dout * out) - dlse: what softmax's derivative subtracts from each row."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(seqlen_q, BLOCK_M)
    i = pid % tiles * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    head = (pid // tiles % nheads).to(tl.int64)
    b = (pid // tiles // nheads).to(tl.int64)
    inside = i < seqlen_q
    row = i.to(tl.int64)
    at = b * out_batch + row * out_row + head * out_head
    o = P.load_rows(out, at, inside, headdim_v, BLOCK_DV, False, True).to(tl.float32)  # (BLOCK_M, BLOCK_DV)
    at = b * dout_batch + row * dout_row + head * dout_head
    do = P.load_rows(dout, at, inside, headdim_v, BLOCK_DV, False, True).to(tl.float32)
    total = tl.sum(o * do, 1)
    place = (b * nheads + head) * seqlen_q + row
    if dlse is not None:
        total -= tl.load(dlse + place, mask=inside, other=0.0)
    tl.store(delta + place, total, mask=inside)


@triton.jit
def score_gradients(
    q, k, v, dout, lse, delta, rows, seq, j, modifiers, dropout, dropout_scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Of a tile: P with dropout, dS before and after the softcap, all (BLOCK_M, BLOCK_N) float32.

    ``lse`` (BLOCK_M,) in base 2, +inf in rows that do not exist and 0 in rows that saw nothing: their P is 0.
    """
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    s, derivative = P.modify(s, rows, seq, j, modifiers, MASKED)
    p = tl.exp2(s - lse[:, None])
    dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    kept = p
    if dropout is not None:
        keep = P.dropout_keep(dropout, rows, tl.min(j, 0), BLOCK_M, BLOCK_N)
        kept = tl.where(keep, p * dropout_scale, 0.0)
        dp = tl.where(keep, dp * dropout_scale, 0.0)
    ds = p * (dp - delta[:, None])
    capped = ds
    if modifiers.softcap is not None:
        capped = ds * derivative
    return kept, ds, capped


@triton.jit
def load_statistics(lse, delta, at, inside):
    """``lse`` in base 2 as ``score_gradients`` wants it, and ``delta``; (BLOCK_M,) each."""
    log_sum = tl.load(lse + at, mask=inside, other=float("inf"))
    log_sum = tl.where(log_sum == float("-inf"), 0.0, log_sum * P.LOG2E)
    return log_sum, tl.load(delta + at, mask=inside, other=0.0)


@tuned(DQ_CONFIGS, key=["headdim", "headdim_v", "longest"])
@triton.jit(do_not_specialize=["seqlen_q", "seqlen_k", "longest", "left", "right", "dropout_threshold"])
def attention_dq_kernel(
    q, k, v, dout, lse, delta, dq, dbias,
    cu_seqlens_q, cu_seqlens_k, seqlens_k, leftpad, batch_idx, table, slopes, bias, mask, sinks, rng_state,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, dout_batch, dout_row, dout_head,
    dq_batch, dq_row, dq_head, lse_batch, lse_head, dbias_batch, dbias_head, dbias_row, table_batch,
    slopes_batch, bias_batch, bias_head, bias_row, bias_key, mask_batch, mask_head, mask_row, mask_key,
    nheads, seqlen_q, seqlen_k, page_size, headdim, headdim_v, longest,
    scale, softcap, left, right, dropout_threshold, dropout_scale,
    GROUP: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    EVEN_D: tl.constexpr, EVEN_DV: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dQ, and dS (batch, nheads, seqlen_q, seqlen_k) into ``dbias`` if given; programs as in the forward kernel."""
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
    b = b.to(tl.int64)
    row = seq.q_first + rows.i  # (BLOCK_M,)
    kv_head = head // GROUP
    at = b * q_batch + row * q_row + head * q_head
    queries = P.load_rows(q, at, rows.inside, headdim, BLOCK_D, EVEN_D, True)  # (BLOCK_M, BLOCK_D)
    at = b * dout_batch + row * dout_row + head * dout_head
    do = P.load_rows(dout, at, rows.inside, headdim_v, BLOCK_DV, EVEN_DV, True)  # (BLOCK_M, BLOCK_DV)
    log_sum, row_delta = load_statistics(lse, delta, b * lse_batch + head * lse_head + row, rows.inside)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    begin, full_begin, full_end, end = P.key_range(rows, seq, left, right, 0, seq.seqlen_k, BLOCK_N)
    for phase in tl.static_range(3):
        if phase == 0:
            lo, hi = begin, full_begin
        elif phase == 1:
            lo, hi = full_begin, full_end
        else:
            lo, hi = full_end, end
        if phase != 0 or left is not None:
            for n in range(lo, hi, BLOCK_N):
                j = n + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
                inside = j < seq.seqlen_k
                key_at = P.key_rows(seq, table, j, inside, page_size, k_batch, k_row) + kv_head * k_head
                keys = P.load_rows(
                    k, key_at, inside, headdim, BLOCK_D, EVEN_D, phase != 1
                )  # (BLOCK_N, BLOCK_D)
                value_at = P.key_rows(seq, table, j, inside, page_size, v_batch, v_row) + kv_head * v_head
                values = P.load_rows(v, value_at, inside, headdim_v, BLOCK_DV, EVEN_DV, phase != 1)
                _, ds, capped = score_gradients(
                    queries, keys, values, do, log_sum, row_delta, rows, seq, j, modifiers, dropout, dropout_scale,
                    BLOCK_M, BLOCK_N, PRECISION, phase != 1,
                )  # fmt: skip
                if dbias is not None:
                    dbias_at = b * dbias_batch + head * dbias_head + rows.i.to(tl.int64) * dbias_row
                    tl.store(
                        dbias + dbias_at[:, None] + j[None, :],
                        ds,
                        mask=rows.inside[:, None] & inside[None, :],
                    )
                acc = tl.dot(capped.to(keys.dtype), keys, acc, input_precision=PRECISION)
    d = tl.arange(0, BLOCK_D)
    at = b * dq_batch + row * dq_row + head * dq_head
    stored = rows.inside[:, None] & (d < headdim)[None, :]
    tl.store(dq + at[:, None] + d[None, :], (acc * scale).to(dq.dtype.element_ty), mask=stored)


@tuned(DKDV_CONFIGS, key=["headdim", "headdim_v", "longest"])
@triton.jit(do_not_specialize=["seqlen_q", "seqlen_k", "longest", "left", "right", "dropout_threshold"])
def attention_dkdv_kernel(
    q, k, v, dout, lse, delta, dk, dv,
    cu_seqlens_q, cu_seqlens_k, seqlens_k, leftpad, batch_idx, table, slopes, bias, mask, sinks, rng_state,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, dout_batch, dout_row, dout_head,
    dk_batch, dk_row, dk_head, dv_batch, dv_row, dv_head, lse_batch, lse_head, table_batch,
    slopes_batch, bias_batch, bias_head, bias_row, bias_key, mask_batch, mask_head, mask_row, mask_key,
    nheads, seqlen_q, seqlen_k, page_size, headdim, headdim_v, longest,
    scale, softcap, left, right, dropout_threshold, dropout_scale,
    GROUP: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    EVEN_D: tl.constexpr, EVEN_DV: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dK and dV; one program per (block of keys, KV head, sequence), over the group's heads one after the other."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(longest, BLOCK_N)
    kv_heads = nheads // GROUP
    first_key = pid % blocks * BLOCK_N
    kv_head = (pid // blocks % kv_heads).to(tl.int64)
    sequence = pid // blocks // kv_heads
    b = sequence.to(tl.int64)
    seq = P.sequence_of(
        sequence, cu_seqlens_q, cu_seqlens_k, seqlens_k, leftpad, batch_idx, seqlen_q, seqlen_k
    )
    if table is not None:
        table = table + b * table_batch
    if first_key >= seq.seqlen_k:
        return
    j = first_key + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    inside = j < seq.seqlen_k
    key_row = P.key_rows(seq, table, j, inside, page_size, k_batch, k_row) + kv_head * k_head
    keys = P.load_rows(k, key_row, inside, headdim, BLOCK_D, EVEN_D, True)  # (BLOCK_N, BLOCK_D)
    value_row = P.key_rows(seq, table, j, inside, page_size, v_batch, v_row) + kv_head * v_head
    values = P.load_rows(v, value_row, inside, headdim_v, BLOCK_DV, EVEN_DV, True)  # (BLOCK_N, BLOCK_DV)
    acc_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    acc_v = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    begin, end = P.query_range(first_key, seq, left, right, BLOCK_M, BLOCK_N)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        for m in range(begin, end, BLOCK_M):
            rows = P.rows_of(m // BLOCK_M, head.to(tl.int32), seq.seqlen_q, BLOCK_M, 1)
            slope, bias_at, mask_at = slopes, bias, mask
            if slopes is not None:
                slope = P.slopes_of(sequence, rows, slopes, slopes_batch)
            if bias is not None:
                bias_at = P.row_pointers(bias, sequence, rows, bias_batch, bias_head, bias_row)
            if mask is not None:
                mask_at = P.row_pointers(mask, sequence, rows, mask_batch, mask_head, mask_row)
            modifiers = P.Modifiers(scale, softcap, slope, bias_at, bias_key, mask_at, mask_key, left, right)
            dropout = None
            if rng_state is not None:
                dropout = P.dropout_of(sequence, nheads, rows, rng_state, dropout_threshold)
            row = seq.q_first + rows.i  # (BLOCK_M,)
            at = b * q_batch + row * q_row + head * q_head
            queries = P.load_rows(q, at, rows.inside, headdim, BLOCK_D, EVEN_D, True)  # (BLOCK_M, BLOCK_D)
            at = b * dout_batch + row * dout_row + head * dout_head
            do = P.load_rows(dout, at, rows.inside, headdim_v, BLOCK_DV, EVEN_DV, True)  # (BLOCK_M, BLOCK_DV)
            log_sum, row_delta = load_statistics(
                lse, delta, b * lse_batch + head * lse_head + row, rows.inside
            )
            kept, _, capped = score_gradients(
                queries, keys, values, do, log_sum, row_delta, rows, seq, j, modifiers, dropout, dropout_scale,
                BLOCK_M, BLOCK_N, PRECISION, True,
            )  # fmt: skip
            acc_v = tl.dot(tl.trans(kept.to(do.dtype)), do, acc_v, input_precision=PRECISION)
            acc_k = tl.dot(tl.trans(capped.to(queries.dtype)), queries, acc_k, input_precision=PRECISION)
    d = tl.arange(0, BLOCK_D)
    at = P.key_rows(seq, table, j, inside, page_size, dk_batch, dk_row) + kv_head * dk_head
    stored = inside[:, None] & (d < headdim)[None, :]
    tl.store(dk + at[:, None] + d[None, :], (acc_k * scale).to(dk.dtype.element_ty), mask=stored)
    d = tl.arange(0, BLOCK_DV)
    at = P.key_rows(seq, table, j, inside, page_size, dv_batch, dv_row) + kv_head * dv_head
    stored = inside[:, None] & (d < headdim_v)[None, :]
    tl.store(dv + at[:, None] + d[None, :], acc_v.to(dv.dtype.element_ty), mask=stored)


def config_of(configs: list[dict[str, int]], q: Tensor, v: Tensor) -> dict[str, int]:
    """The fixed choice, by bytes per row."""
    row = padded(max(q.shape[3], v.shape[3])) * q.element_size()
    return next((c for most, c in zip((128, 256, 512), configs) if row <= most), configs[3])


def backward(
    args: Any, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, *, needs_dbias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """``dq, dk, dv, dscores, dsinks`` of a forward call's ``out`` and ``lse``.

    In their inputs' shapes and dtypes, but dscores (batch, nheads, seqlen_q, seqlen_k) float32, if needs_dbias.
    """
    q, k, v = unit_stride(args.q), unit_stride(args.k), unit_stride(args.v)
    out, dout = unit_stride(out), unit_stride(dout)
    _, total_q, nheads, _ = q.shape
    packed = args.cu_seqlens_q is not None
    delta = torch.empty_like(lse)
    dlse = None if dlse is None else dlse.contiguous()
    places = {"lse_batch": 0 if packed else nheads * total_q, "lse_head": total_q}
    dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    scores = (args.batch, nheads, args.max_seqlen_q if packed else total_q, keys_of(args))
    dscores = torch.zeros(scores, dtype=torch.float32, device=q.device) if needs_dbias else None
    if lse.numel():
        rows = q.shape[0] * nheads
        delta_kernel.launch(
            lambda blocks: (triton.cdiv(total_q, blocks["BLOCK_M"]) * rows,), DELTA_CONFIGS[0],
            out=out, dout=dout, dlse=dlse, delta=delta, **strides(out, "out_batch", "out_row", "out_head"),
            **strides(dout, "dout_batch", "dout_row", "dout_head"),
            nheads=nheads, seqlen_q=total_q, headdim_v=v.shape[3], BLOCK_DV=padded(v.shape[3]),
        )  # fmt: skip
        shared = attention_call(args, q, k, v) | places | strides(dout, "dout_batch", "dout_row", "dout_head")
        shared |= {"dout": dout, "lse": lse, "delta": delta}
        dq_places = strides(dq, "dq_batch", "dq_row", "dq_head")
        if packed:
            shared["dout_batch"] = dq_places["dq_batch"] = 0
        if scores[2]:
            attention_dq_kernel.launch(
                lambda blocks: (triton.cdiv(scores[2], blocks["BLOCK_M"]) * args.batch * nheads,),
                config_of(DQ_CONFIGS, q, v), dq=dq, dbias=dscores, longest=scores[2], **dq_places,
                **strides(dscores, "dbias_batch", "dbias_head", "dbias_row"), **shared,
            )  # fmt: skip
        if scores[3] and k.numel():
            attention_dkdv_kernel.launch(
                lambda blocks: (triton.cdiv(scores[3], blocks["BLOCK_N"]) * args.batch * k.shape[2],),
                config_of(DKDV_CONFIGS, q, v), dk=dk, dv=dv, longest=scores[3],
                **strides(dk, "dk_batch", "dk_row", "dk_head"), **strides(dv, "dv_batch", "dv_row", "dv_head"),
                **shared,
            )  # fmt: skip
    dsinks = None
    if args.sinks is not None:  # a sink takes exp(sink - lse) of each row's weight, and gives no value for it
        weight = torch.exp(args.sinks.float()[:, None] - lse).masked_fill(lse == -torch.inf, 0.0)
        total = (weight * delta).sum(-1) if lse.numel() else torch.zeros_like(lse[..., 0])
        dsinks = -(total if packed else total.sum(0)).to(args.sinks.dtype)
    return dq, dk, dv, dscores, dsinks
