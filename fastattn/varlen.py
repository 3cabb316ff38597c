"""Attention over packed sequences of different lengths, as flash_attn's varlen functions define it."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from fastattn import ops
from fastattn.args import AttentionArgs
from fastattn.attention_checks import (
    check_modifiers,
    check_qkv,
    checked_causal,
    checked_scale,
    checked_window,
)
from fastattn.checks import Shapes, check_dtype, check_integer, check_pages, check_tensor


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    attn_bias: Tensor | None = None,
    attn_mask: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,
    block_table: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """``attention`` of every sequence by itself; the sequences lie one after the other, without padding.

    Args:
        q: (total_q, nheads, headdim), any strides.
        k: (total_k, nheads_k, headdim); with block_table (num_blocks, page_size, nheads_k, headdim).
        v: (total_k, nheads_k, headdim_v), or paged likewise.
        cu_seqlens_q: (batch + 1,) int32, where each sequence's queries begin, and total_q. Empty sequences are fine.
        cu_seqlens_k: the same for the keys; with block_table only the lengths count.
        max_seqlen_q: at least the longest; so is max_seqlen_k.
        attn_bias: broadcastable to (batch, nheads, max_seqlen_q, max_seqlen_k), indexed within each sequence.
        attn_mask: the same, bool.
        block_table: (batch, max_blocks) int32, the pages of each sequence's keys, of any size.
        causal, softmax_scale, window_size, softcap, alibi_slopes, sinks, dropout_p, rng_state, return_lse, backend: as
            in ``attention``.

    Returns:
        out (total_q, nheads, headdim_v); with return_lse also lse (nheads, total_q), natural log, float32.

    Raises:
        ValueError, TypeError, NotImplementedError: as ``attention``. While torch.compile traces, the values of
            cu_seqlens are not looked at.
    """
    if torch.is_autocast_enabled("cpu"):
        q, k, v, attn_bias = ops.autocast(q, k, v, attn_bias)
    Shapes().match("q", q, "total_q nheads headdim")
    spec = "total_k nheads_k {}" if block_table is None else "num_blocks page_size nheads_k {}"
    shapes = Shapes(headdim=q.shape[2])
    shapes.match("k", k, spec.format("headdim"))
    shapes.match("v", v, spec.format("headdim_v"))
    keys, values = (x[None] if block_table is None else x for x in (k, v))
    check_qkv(q[None], keys.flatten(0, 1)[None], values.flatten(0, 1)[None])
    for name, value in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        check_integer(name, value, 0, 2**31 - 1)
    tracing = ops.is_tracing(q, k, v)
    for name, starts in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check_tensor(name, starts, q.device)
    _check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, max_seqlen_q, q.shape[0], tracing)
    total_k = None if block_table is not None else k.shape[0]
    _check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, max_seqlen_k, total_k, tracing)
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        raise ValueError(
            f"cu_seqlens_k: expected {tuple(cu_seqlens_q.shape)}, got {tuple(cu_seqlens_k.shape)}"
        )
    lengths = None
    if block_table is not None:
        lengths = cu_seqlens_k.diff().to(torch.int32)
        block_table = check_pages(block_table, lengths, k, tracing)
    args = AttentionArgs(
        q=q[None],
        k=keys,
        v=values,
        softmax_scale=checked_scale(softmax_scale, q.shape[2]),
        causal=checked_causal(causal),
        window_size=checked_window(window_size),
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        attn_bias=attn_bias,
        attn_mask=attn_mask,
        sinks=sinks,
        dropout_p=dropout_p,
        rng_state=ops.checked_rng_state(dropout_p, rng_state, q.device),
        cu_seqlens_q=cu_seqlens_q.contiguous(),
        cu_seqlens_k=cu_seqlens_k.contiguous() if block_table is None else None,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        seqlens_k=lengths,
        block_table=block_table,
        return_lse=return_lse,
        needs_grad=ops.needs_grad(q, k, v, attn_bias, sinks),
    )
    check_modifiers(args)
    out, lse = ops.attention(args, backend)
    return (out[0], lse) if return_lse else out[0]  # type: ignore[return-value]


def _check_cu_seqlens(name: str, x: Tensor, longest: int, total: int | None, tracing: bool) -> None:
    Shapes().match(name, x, "batch_plus_1")
    check_dtype(name, x, (torch.int32,))
    if x.shape[0] == 0:
        raise ValueError(f"{name}: expected (batch + 1,), got (0,)")
    if tracing:
        return
    values = x.tolist()
    lengths = [b - a for a, b in pairwise(values)]
    if values[0] != 0 or min(lengths, default=0) < 0:
        raise ValueError(f"{name}: expected values that begin with 0 and never fall, got {values}")
    if total is not None and values[-1] != total:
        raise ValueError(f"{name}: expected {total} tokens at its end, got {values[-1]}")
    if max(lengths, default=0) > longest:
        raise ValueError(
            f"max_seqlen_{name[-1]}: expected at least {max(lengths)}, the longest, got {longest}"
        )
