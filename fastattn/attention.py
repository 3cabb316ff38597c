"""Public attention: checks once, chooses a backend, calls it.

Causal masks are aligned bottom-right: query i of seqlen_q sees key j of seqlen_k iff ``j <= i + seqlen_k - seqlen_q``::

    seqlen_q=2, seqlen_k=5     seqlen_q=5, seqlen_k=2
      1 1 1 1 0                   0 0
      1 1 1 1 1                   0 0
                                  0 0
                                  1 0
                                  1 1
"""

from __future__ import annotations

import math
from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from fastattn.args import AttentionArgs, KVAppendArgs
from fastattn.backends import resolve
from fastattn.backends.cpu import plain_attention
from fastattn.checks import Shapes, check_broadcast, check_dtype, check_like, check_range

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_HEADDIM = 512


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
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
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Fused softmax attention ``softmax(softmax_scale * q k^T + ...) v`` (FlashAttention, arXiv 2205.14135).

    Args:
        q: (batch, seqlen_q, nheads, headdim), any strides; float32, bfloat16, float16 or float64.
        k: (batch, seqlen_k, nheads_k, headdim); nheads must be a multiple of nheads_k (GQA, MQA).
        v: (batch, seqlen_k, nheads_k, headdim_v).
        causal: bottom-right aligned causal mask, see the module.
        softmax_scale: default 1 / sqrt(headdim).
        window_size: (left, right) keys around ``i + seqlen_k - seqlen_q``, inclusive, -1 = unlimited.
        softcap: scores become ``softcap * tanh(score / softcap)``; 0 = off.
        alibi_slopes: (nheads,) or (batch, nheads) float32; adds ``-slope * |i + seqlen_k - seqlen_q - j|``.
        attn_bias: float, broadcastable to (batch, nheads, seqlen_q, seqlen_k), added to the scores.
        attn_mask: bool, the same broadcast, True = may attend.
        sinks: (nheads,) logits of one more column without a value in every softmax.
        dropout_p: probability of dropping an attention weight.
        return_lse: also return the log-sum-exp of the scores.
        backend: "auto", or a name of ``available_backends()``, which then does it or raises.

    Returns:
        out (batch, seqlen_q, nheads, headdim_v) in q's dtype; with return_lse also lse (batch, nheads, seqlen_q),
        natural log, float32 (float64 for float64). A row that sees no key has out = 0 and lse = -inf.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or range; the message names it.
        NotImplementedError: the forced backend, or every backend, lacks a feature of this call.
    """
    if (
        plain_attention is not None
        and backend == "auto"
        and attn_bias is attn_mask is alibi_slopes is sinks is None
        and softcap == dropout_p == 0.0
        and window_size == (-1, -1)
        and not return_lse
    ):
        out = plain_attention(q, k, v, causal, softmax_scale, torch.get_num_threads())
        if out is not None:
            return out
    _check_qkv(q, k, v)
    if type(causal) is not bool:
        raise TypeError(f"causal: expected a bool, got {type(causal).__name__}")
    args = AttentionArgs(
        q=q,
        k=k,
        v=v,
        softmax_scale=_scale(softmax_scale, q.shape[3]),
        causal=causal,
        window_size=_window(window_size),
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        attn_bias=attn_bias,
        attn_mask=attn_mask,
        sinks=sinks,
        dropout_p=dropout_p,
        return_lse=return_lse,
        needs_grad=torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad),
    )
    out, lse = _serve(args, backend).attention(args)
    return (out, lse) if return_lse else out


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
    num_splits: int = 0,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Append k, v to the cache in place (rotated if asked), then attend q to what the cache holds.

    Args:
        q: (batch, seqlen_q, nheads, headdim).
        k_cache: (batch, seqlen_cache, nheads_k, headdim), written in place when k is given.
        v_cache: (batch, seqlen_cache, nheads_k, headdim_v), likewise.
        k: (batch, seqlen_new, nheads_k, headdim), the new keys, or None.
        v: (batch, seqlen_new, nheads_k, headdim_v), the new values; given iff k is.
        cache_seqlens: int or (batch,) int32, tokens in the cache before this call; None = all of it (0 with new k, v).
        rotary_cos: (seqlen_rotary, rotary_dim / 2), rotary_dim <= headdim. New keys turn by their positions
            ``cache_seqlens + row``; so do queries with a causal mask or a window, else all by ``cache_seqlens``.
        rotary_sin: the same shape.
        rotary_interleaved: True pairs dimensions (0, 1), (2, 3), ... (GPT-J); False (0, rotary_dim / 2), ... (NeoX).
        block_table, cache_batch_idx, cache_leftpad: not built yet, NotImplementedError.
        num_splits: accepted for compatibility; the split follows the KV length alone, so results do not depend on it.
        causal, softmax_scale, window_size, softcap, alibi_slopes, return_lse, backend: as in ``attention``;
            seqlen_k is each row's length after the append.

    Returns:
        As ``attention``.
    """
    for name, value in (
        ("block_table", block_table),
        ("cache_batch_idx", cache_batch_idx),
        ("cache_leftpad", cache_leftpad),
    ):
        if value is not None:
            raise NotImplementedError(f"no backend has {name!r} yet")
    _check_qkv(q, k_cache, v_cache, ("k_cache", "v_cache"))
    check_range("num_splits", num_splits, 0, math.inf)
    seqlens, longest = _cache_seqlens(cache_seqlens, q, k_cache, k)
    window = _window(window_size)
    tensors = (q, k_cache, v_cache) if k is None or v is None else (q, k_cache, v_cache, k, v)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    args = AttentionArgs(
        q=q,
        k=k_cache,
        v=v_cache,
        softmax_scale=_scale(softmax_scale, q.shape[3]),
        causal=causal,
        window_size=window,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        seqlens_k=seqlens,
        return_lse=return_lse,
        needs_grad=needs_grad,
    )
    attend = _serve(args, backend)
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
            needs_grad=needs_grad,
        )
        _check_append(append, longest)
        # From here on nothing is refused: a call that fails leaves the cache as it was.
        q, seqlens = resolve(backend, append).append_kv(append)
        args = replace(args, q=q, seqlens_k=seqlens)
    out, lse = attend.attention(args)
    return (out, lse) if return_lse else out


def _serve(args: AttentionArgs, backend: str) -> ModuleType:
    """Check what goes beyond plain attention, and choose who does it."""
    if args.features():
        _check_modifiers(args)
    return resolve(backend, args)


def _fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether q, k, v need no further look: one quick answer for the calls that are right."""
    try:
        batch, _, nheads, headdim = q.shape
        batch_k, seqlen_k, nheads_k, headdim_k = k.shape
        batch_v, seqlen_v, nheads_v, headdim_v = v.shape
    except (AttributeError, ValueError):
        return False
    return (
        batch == batch_k == batch_v
        and seqlen_k == seqlen_v
        and nheads_k == nheads_v > 0
        and nheads % nheads_k == 0
        and 0 < headdim == headdim_k <= MAX_HEADDIM
        and 0 < headdim_v <= MAX_HEADDIM
        and q.dtype == k.dtype == v.dtype
        and q.dtype in DTYPES
        and q.device == k.device == v.device
    )


def _check_qkv(q: Tensor, k: Tensor, v: Tensor, names: tuple[str, str] = ("k", "v")) -> None:
    if _fits(q, k, v):
        return
    shapes = Shapes()
    shapes.match("q", q, "batch seqlen_q nheads headdim")
    shapes.match(names[0], k, "batch seqlen_k nheads_k headdim")
    shapes.match(names[1], v, "batch seqlen_k nheads_k headdim_v")
    check_dtype("q", q, DTYPES)
    check_like(names[0], k, "q", q)
    check_like(names[1], v, "q", q)
    nheads, nheads_k = q.shape[2], k.shape[2]
    if nheads_k == 0 or nheads % nheads_k:
        raise ValueError(
            f"{names[0]}: expected nheads_k that divides nheads={nheads}, got nheads_k={nheads_k}"
        )
    if not 1 <= q.shape[3] <= MAX_HEADDIM:
        raise ValueError(f"q: expected headdim from 1 to {MAX_HEADDIM}, got {q.shape[3]}")
    raise ValueError(f"{names[1]}: expected headdim_v from 1 to {MAX_HEADDIM}, got {v.shape[3]}")


def _check_modifiers(args: AttentionArgs) -> None:
    """Everything beyond q, k, v: only called when a score modifier or a gradient is in use."""
    batch, seqlen_q, nheads, _ = args.q.shape
    scores = (batch, nheads, seqlen_q, args.k.shape[1])
    check_range("softcap", args.softcap, 0.0, math.inf)
    check_range("dropout_p", args.dropout_p, 0.0, 1.0)
    if args.softcap > 0 and args.dropout_p > 0:
        raise ValueError(f"softcap: expected 0 together with dropout_p={args.dropout_p}, got {args.softcap}")
    if args.attn_bias is not None:
        if not args.attn_bias.is_floating_point():
            raise TypeError(
                f"attn_bias: expected a float dtype, got {args.attn_bias.dtype} (bool masks: attn_mask)"
            )
        check_broadcast("attn_bias", args.attn_bias, scores)
    if args.attn_mask is not None:
        check_dtype("attn_mask", args.attn_mask, (torch.bool,))
        check_broadcast("attn_mask", args.attn_mask, scores)
    if args.alibi_slopes is not None:
        if tuple(args.alibi_slopes.shape) not in ((nheads,), (batch, nheads)):
            raise ValueError(
                f"alibi_slopes: expected (nheads={nheads},) or (batch={batch}, nheads={nheads}), "
                f"got {tuple(args.alibi_slopes.shape)}"
            )
        if args.alibi_slopes.requires_grad:
            raise ValueError(
                "alibi_slopes: expected a tensor without requires_grad, its gradient is not defined"
            )
    if args.sinks is not None:
        Shapes(nheads=nheads).match("sinks", args.sinks, "nheads")


def _check_append(args: KVAppendArgs, longest: int) -> None:
    """``longest`` is the largest of ``cache_seqlens``."""
    if (args.k is None) != (args.v is None):
        raise ValueError("k, v: expected both or neither, got only " + ("v" if args.k is None else "k"))
    if (args.rotary_cos is None) != (args.rotary_sin is None):
        raise ValueError("rotary_cos, rotary_sin: expected both or neither")
    batch, seqlen_cache, nheads_k, headdim = args.k_cache.shape
    seqlen_new = 0
    if args.k is not None and args.v is not None:
        seqlen_new = args.k.shape[1] if args.k.dim() == 4 else 0
        if not (
            args.k.shape == (batch, seqlen_new, nheads_k, headdim)
            and args.v.shape == (batch, seqlen_new, nheads_k, args.v_cache.shape[3])
        ):
            shapes = Shapes(batch=batch, nheads_k=nheads_k, headdim=headdim, headdim_v=args.v_cache.shape[3])
            shapes.match("k", args.k, "batch seqlen_new nheads_k headdim")
            shapes.match("v", args.v, "batch seqlen_new nheads_k headdim_v")
        check_like("k", args.k, "k_cache", args.k_cache)
        check_like("v", args.v, "v_cache", args.v_cache)
        for name, cache in (("k_cache", args.k_cache), ("v_cache", args.v_cache)):
            if cache.stride(3) != 1 and cache.shape[3] > 1:
                raise ValueError(
                    f"{name}: expected stride(-1) == 1, it is written in place; got strides {cache.stride()}"
                )
    if longest + seqlen_new > seqlen_cache:
        raise ValueError(
            f"k_cache: expected seqlen_cache >= {longest + seqlen_new} "
            f"(cache_seqlens {longest} + {seqlen_new} new), got {seqlen_cache}"
        )
    if args.rotary_cos is not None and args.rotary_sin is not None:
        shapes = Shapes()
        shapes.match("rotary_cos", args.rotary_cos, "seqlen_rotary half_rotary_dim")
        shapes.match("rotary_sin", args.rotary_sin, "seqlen_rotary half_rotary_dim")
        if 2 * shapes["half_rotary_dim"] > headdim:
            raise ValueError(
                f"rotary_cos: expected at most headdim / 2 = {headdim // 2} columns, got {shapes['half_rotary_dim']}"
            )
        rows = max(seqlen_new, args.q.shape[1] if args.rotary_per_row else 1)
        if shapes["seqlen_rotary"] < longest + rows:
            raise ValueError(
                f"rotary_cos: expected at least {longest + rows} rows (positions), got {shapes['seqlen_rotary']}"
            )


def _cache_seqlens(
    given: int | Tensor | None, q: Tensor, k_cache: Tensor, k: Tensor | None
) -> tuple[Tensor, int]:
    """The number of valid cache rows before the append, as (batch,) int32, and the largest of them."""
    batch, seqlen_cache = k_cache.shape[:2]
    if given is None:
        given = 0 if k is not None else seqlen_cache
    if isinstance(given, Tensor):
        Shapes(batch=batch).match("cache_seqlens", given, "batch")
        check_dtype("cache_seqlens", given, (torch.int32, torch.int64))
        if given.device != q.device:
            raise ValueError(f"cache_seqlens: expected the device of q, {q.device}, got {given.device}")
        lengths: list[int] = given.tolist()
        for length in (min(lengths), max(lengths)) if lengths else ():
            check_range("cache_seqlens", length, 0, seqlen_cache)
        return given.to(torch.int32).contiguous(), max(lengths, default=0)
    check_range("cache_seqlens", given, 0, seqlen_cache)
    return torch.full((batch,), given, dtype=torch.int32, device=q.device), given if batch else 0


def _scale(softmax_scale: float | None, headdim: int) -> float:
    if softmax_scale is None:
        return 1.0 / math.sqrt(headdim)
    if not math.isfinite(softmax_scale):
        raise ValueError(f"softmax_scale: expected a finite number, got {softmax_scale}")
    return float(softmax_scale)


def _window(window_size: tuple[int, int]) -> tuple[int, int]:
    left, right = window_size
    if left < -1 or right < -1:
        raise ValueError(f"window_size: expected (left, right) with values >= -1, got {window_size}")
    return left, right
