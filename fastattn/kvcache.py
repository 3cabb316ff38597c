"""Attention to a key-value cache that grows: append in place, rotate, attend. The decode step of a language model."""

from __future__ import annotations

import math
from dataclasses import replace
from numbers import Integral

import torch
from torch import Tensor

from fastattn import ops
from fastattn.args import AttentionArgs, KVAppendArgs
from fastattn.attention_checks import (
    check_modifiers,
    check_qkv,
    checked_causal,
    checked_scale,
    checked_window,
)
from fastattn.backends.cpu import plain_kvcache
from fastattn.checks import (
    Shapes,
    check_dtype,
    check_float,
    check_integer,
    check_like,
    check_pages,
    check_range,
    check_tensor,
)


def attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cache_seqlens: int | Tensor | None = None,
    block_table: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = True,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    num_splits: int = 0,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Append k, v to the cache in place (rotated if asked), then attend q to what the cache holds.

    Args:
        q: (batch, seqlen_q, nheads, headdim).
        k_cache: (batch_cache, seqlen_cache, nheads_k, headdim), or pages (num_blocks, page_size, nheads_k, headdim);
            written in place when k is given. In q's dtype; or, under float32 and bfloat16 queries, in float16,
            bfloat16, or int8 with scales.
        v_cache: (batch_cache, seqlen_cache, nheads_k, headdim_v), likewise.
        k: (batch, seqlen_new, nheads_k, headdim), the new keys in q's dtype, or None.
        v: (batch, seqlen_new, nheads_k, headdim_v), the new values; given iff k is.
        cache_seqlens: int or (batch,) int32, tokens in the cache before this call; None = all of it (0 with new k, v).
        block_table: (batch, max_blocks) int32, each row's pages, of any size from 1 on.
        rotary_cos: (seqlen_rotary, rotary_dim / 2), rotary_dim <= headdim. New keys turn by their positions
            ``cache_seqlens - cache_leftpad + row``; so do queries with a causal mask or a window, else all as row 0.
        rotary_sin: the same shape.
        rotary_interleaved: True pairs dimensions (0, 1), (2, 3), ... (GPT-J); False (0, rotary_dim / 2), ... (NeoX).
        cache_batch_idx: (batch,) int32, the cache's row of each row; None = its own.
        cache_leftpad: (batch,) int32, where each row's tokens begin; None = 0.
        k_scale: (batch_cache, seqlen_cache, nheads_k) float32 of an int8 cache: its elements stand for
            k_cache * k_scale. New rows are quantised per token and head, in steps of their largest element / 127.
        v_scale: the same of v_cache.
        num_splits: accepted for compatibility; the split follows the KV length alone, so results do not depend on it.
        causal, softmax_scale, window_size, softcap, alibi_slopes, sinks, return_lse, backend: as in ``attention``;
            seqlen_k is each row's length after the append.

    Returns:
        As ``attention``.

    Raises:
        ValueError, TypeError, NotImplementedError: as ``attention``; the cache is then as it was. While torch.compile
            traces, the values of cache_seqlens, block_table, cache_batch_idx and cache_leftpad are not looked at.
    """
    if (
        plain_kvcache is not None
        and backend in ("auto", "cpu")
        and block_table
        is cache_batch_idx
        is cache_leftpad
        is k_scale
        is v_scale
        is alibi_slopes
        is sinks
        is None
        and softcap == 0.0
        and num_splits == 0
        and window_size == (-1, -1)
        and not return_lse
        and not ops.is_watched()
    ):
        step = (q, k_cache, v_cache, k, v, cache_seqlens, rotary_cos, rotary_sin, rotary_interleaved)
        quick = plain_kvcache(*step, causal, softmax_scale, torch.get_num_threads())
        if quick is not None:
            return quick
    tracing = ops.is_tracing(q, k_cache, v_cache)
    _check_cache(q, k_cache, v_cache, k_scale, v_scale, paged=block_table is not None)
    check_integer("num_splits", num_splits, 0, math.inf)
    batch = q.shape[0]
    if block_table is not None:
        Shapes(batch=batch).match("block_table", block_table, "batch max_blocks")
    given = 0 if cache_seqlens is None and k is not None else cache_seqlens
    capacity = k_cache.shape[1] if block_table is None else block_table.shape[-1] * k_cache.shape[1]
    seqlens, longest = _cache_seqlens(given, q, capacity, tracing)
    leftpad = _indices("cache_leftpad", cache_leftpad, q, 0, capacity, tracing)
    batch_idx = _indices("cache_batch_idx", cache_batch_idx, q, 0, k_cache.shape[0] - 1, tracing)
    if batch_idx is not None and block_table is not None:
        raise ValueError(
            "cache_batch_idx: expected None together with block_table, which already says where rows are"
        )
    if leftpad is not None and not tracing and bool((leftpad > seqlens).any()):
        raise ValueError("cache_leftpad: expected at most cache_seqlens in every row")
    if block_table is not None:
        seqlen_new = k.shape[1] if k is not None and k.dim() == 4 else 0  # a wrong one is refused below
        block_table = check_pages(block_table, seqlens + seqlen_new, k_cache, tracing)
    elif batch_idx is None and k_cache.shape[0] != batch:
        raise ValueError(
            f"k_cache: expected (batch={batch}, seqlen_cache, nheads_k, headdim), got {tuple(k_cache.shape)}"
        )
    window = checked_window(window_size)
    args = AttentionArgs(
        q=q,
        k=k_cache,
        v=v_cache,
        softmax_scale=checked_scale(softmax_scale, q.shape[3]),
        causal=checked_causal(causal),
        window_size=window,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        seqlens_k=seqlens,
        k_leftpad=leftpad,
        cache_batch_idx=batch_idx,
        block_table=block_table,
        k_scale=k_scale,
        v_scale=v_scale,
        return_lse=return_lse,
        needs_grad=ops.needs_grad(q, k_cache, v_cache, k, v, sinks),
    )
    if args.features():
        check_modifiers(args)
    ops.check_served(args, backend)
    if k is not None or v is not None or rotary_cos is not None or rotary_sin is not None:
        append = KVAppendArgs(
            q=q,
            k_cache=k_cache,
            v_cache=v_cache,
            cache_seqlens=seqlens,
            k=k,
            v=v,
            rotary_cos=rotary_cos,
            rotary_sin=rotary_sin,
            rotary_interleaved=rotary_interleaved,
            rotary_per_row=causal or window != (-1, -1),
            k_leftpad=leftpad,
            cache_batch_idx=batch_idx,
            block_table=block_table,
            k_scale=k_scale,
            v_scale=v_scale,
            needs_grad=args.needs_grad,
        )
        _check_append(append, longest, capacity)
        # From here on nothing is refused: a call that fails leaves the cache as it was.
        q, seqlens = ops.append_kv(append, backend)
        args = replace(args, q=q, seqlens_k=seqlens)
    out, lse = ops.attention(args, backend)
    return (out, lse) if return_lse else out  # type: ignore[return-value]  # lse is there when it is asked for


def _check_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    *,
    paged: bool,
) -> None:
    shapes = Shapes()
    shapes.match("q", q, "batch seqlen_q nheads headdim")
    layout = "num_blocks page_size nheads_k" if paged else "batch_cache seqlen_cache nheads_k"
    shapes.match("k_cache", k_cache, layout + " headdim")
    shapes.match("v_cache", v_cache, layout + " headdim_v")
    if (k_scale is None) != (v_scale is None):
        raise ValueError("k_scale, v_scale: expected both or neither")
    if (k_cache.dtype == torch.int8) != (k_scale is not None):
        raise ValueError(
            f"k_scale: expected with an int8 cache and only then, got a cache of {k_cache.dtype}"
        )
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is not None:
            shapes.match(name, scale, layout)
            check_tensor(name, scale, q.device)
            check_dtype(name, scale, (torch.float32,))
    if k_cache.dtype != q.dtype:
        check_dtype("q", q, (torch.float32, torch.bfloat16))
        check_dtype("k_cache", k_cache, (torch.bfloat16, torch.float16, torch.int8))
        check_like("v_cache", v_cache, "k_cache", k_cache)
        k_cache, v_cache = (x[:, :0].to(q.dtype) for x in (k_cache, v_cache))
    # One row stands for all: how many the cache has is another question.
    check_qkv(q[:0], k_cache[:0], v_cache[:0], names=("k_cache", "v_cache"))


def _check_append(args: KVAppendArgs, longest: int, capacity: int) -> None:
    """``longest`` is the largest of ``cache_seqlens``, -1 where it is not known; ``capacity`` what a row can hold."""
    if (args.k is None) != (args.v is None):
        raise ValueError("k, v: expected both or neither, got only " + ("v" if args.k is None else "k"))
    if (args.rotary_cos is None) != (args.rotary_sin is None):
        raise ValueError("rotary_cos, rotary_sin: expected both or neither")
    batch, (nheads_k, headdim) = args.q.shape[0], args.k_cache.shape[2:]
    seqlen_new = 0
    if args.k is not None and args.v is not None:
        shapes = Shapes(batch=batch, nheads_k=nheads_k, headdim=headdim, headdim_v=args.v_cache.shape[3])
        shapes.match("k", args.k, "batch seqlen_new nheads_k headdim")
        shapes.match("v", args.v, "batch seqlen_new nheads_k headdim_v")
        seqlen_new = shapes["seqlen_new"]
        check_like("k", args.k, "q", args.q)
        check_like("v", args.v, "q", args.q)
        for name, cache in (("k_cache", args.k_cache), ("v_cache", args.v_cache)):
            if cache.stride(3) != 1 and cache.shape[3] > 1:
                raise ValueError(
                    f"{name}: expected stride(-1) == 1, it is written in place; got strides {cache.stride()}"
                )
    if longest + seqlen_new > capacity:
        raise ValueError(
            f"k_cache: expected seqlen_cache >= {longest + seqlen_new} "
            f"(cache_seqlens {longest} + {seqlen_new} new), got {capacity}"
        )
    if args.rotary_cos is not None and args.rotary_sin is not None:
        shapes = Shapes()
        shapes.match("rotary_cos", args.rotary_cos, "seqlen_rotary half_rotary_dim")
        shapes.match("rotary_sin", args.rotary_sin, "seqlen_rotary half_rotary_dim")
        for name, table in (("rotary_cos", args.rotary_cos), ("rotary_sin", args.rotary_sin)):
            check_tensor(name, table, args.q.device)
            check_float(name, table)
        if 2 * shapes["half_rotary_dim"] > headdim:
            raise ValueError(
                f"rotary_cos: expected at most headdim / 2 = {headdim // 2} columns, got {shapes['half_rotary_dim']}"
            )
        rows = max(seqlen_new, args.q.shape[1] if args.rotary_per_row else 1)
        if shapes["seqlen_rotary"] < longest + rows:
            raise ValueError(
                f"rotary_cos: expected at least {longest + rows} rows (positions), got {shapes['seqlen_rotary']}"
            )


def _cache_seqlens(given: int | Tensor | None, q: Tensor, capacity: int, tracing: bool) -> tuple[Tensor, int]:
    """The number of valid cache rows before the append, as (batch,) int32, and the largest, -1 if unknown."""
    batch = q.shape[0]
    if given is None:
        given = capacity
    if isinstance(given, Tensor):
        Shapes(batch=batch).match("cache_seqlens", given, "batch")
        check_dtype("cache_seqlens", given, (torch.int32, torch.int64))
        check_tensor("cache_seqlens", given, q.device)
        if tracing:
            return given.to(torch.int32).contiguous(), -1
        lengths: list[int] = given.tolist()
        for length in (min(lengths), max(lengths)) if lengths else ():
            check_range("cache_seqlens", length, 0, capacity)
        return given.to(torch.int32).contiguous(), max(lengths, default=0)
    if not isinstance(given, Integral):
        raise TypeError(f"cache_seqlens: expected an int or a tensor, got {type(given).__name__}")
    check_range("cache_seqlens", given, 0, capacity)
    return torch.full((batch,), given, dtype=torch.int32, device=q.device), given if batch else 0


def _indices(name: str, x: Tensor | None, q: Tensor, low: int, high: int, tracing: bool) -> Tensor | None:
    """(batch,) int32 in [low, high], contiguous."""
    if x is None:
        return None
    Shapes(batch=q.shape[0]).match(name, x, "batch")
    check_tensor(name, x, q.device)
    check_dtype(name, x, (torch.int32, torch.int64))
    if not tracing:
        for value in x.tolist():
            check_range(name, value, low, high)
    return x.to(torch.int32).contiguous()
