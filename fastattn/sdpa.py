"""``scaled_dot_product_attention`` with torch's signature, layout and semantics, on this library's kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastattn import ops, plain
from fastattn.args import MAX_HEADDIM, AttentionArgs, top_left
from fastattn.attention_checks import DTYPES, check_modifiers, checked_scale
from fastattn.checks import check_dtype, check_like, check_range


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention``, forward and backward through our kernels.

    Args:
        query: (..., nheads, seqlen_q, headdim); of 2 or more dimensions, the leading ones broadcast, heads included.
        key: (..., nheads, seqlen_k, headdim).
        value: (..., nheads, seqlen_k, headdim_v).
        attn_mask: broadcastable to (..., nheads, seqlen_q, seqlen_k). bool, True = may attend; or float32 or query's
            dtype, added to the scores, with a gradient. Together with ``is_causal`` both hold.
        dropout_p: probability of dropping an attention weight, in training or not.
        is_causal: query i sees key j iff ``j <= i``: the corner is top-left, unlike in ``fastattn.attention``.
        scale: default 1 / sqrt(headdim).
        enable_gqa: key and value may have fewer heads (dimension -3) whose number divides query's; query head h reads
            head ``h // (nheads // nheads_k)``.

    Returns:
        (..., nheads, seqlen_q, headdim_v) in query's dtype, in memory as ``torch.empty_like(query)`` if headdim_v is
        headdim. A query that sees no key has zeros, and gradients 0.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or range; the message names it.
        NotImplementedError: no backend can serve the call, with the reasons.
    """
    if dropout_p == 0.0:
        quick = plain.attention(
            plain.TORCH, query, key, value, is_causal, scale, enable_gqa, plain.NO_WINDOW, 0.0, None, attn_mask, None,
            None, False,
        )  # fmt: skip
        if quick is not None:
            return quick  # type: ignore[no-any-return]
    if torch.is_autocast_enabled("cpu"):
        query, key, value, attn_mask = ops.autocast(query, key, value, attn_mask)
    if type(is_causal) is not bool:
        raise TypeError(f"is_causal: expected a bool, got {type(is_causal).__name__}")
    _check_tensors(query, key, value)
    call = _as_batch(query, key, value, attn_mask, enable_gqa)
    return _run(call, query, dropout_p, is_causal, scale)


class _Call(NamedTuple):
    """The call with one batch dimension, and the leading dimensions of its result."""

    q: Tensor  # (batch, nheads, seqlen_q, headdim)
    k: Tensor  # (batch, nheads_k, seqlen_k, headdim)
    v: Tensor  # (batch, nheads_k, seqlen_k, headdim_v)
    mask: Tensor | None  # broadcastable to (batch, nheads, seqlen_q, seqlen_k)
    lead: tuple[int, ...]


def _run(call: _Call, query: Tensor, dropout_p: float, is_causal: bool, scale: float | None) -> Tensor:
    q, k, v, mask, lead = call
    seqlen_q, seqlen_k = q.shape[2], k.shape[2]
    causal, window = is_causal, (-1, -1)
    if is_causal:
        used, causal, window = top_left(seqlen_q, seqlen_k)
        if used < seqlen_k:
            k, v = k[:, :, :used], v[:, :, :used]
            mask = mask[..., :used] if mask is not None and mask.shape[-1] == seqlen_k else mask
    is_bias = mask is not None and mask.dtype != torch.bool
    args = AttentionArgs(
        q=q.transpose(1, 2),  # (batch, seqlen_q, nheads, headdim)
        k=k.transpose(1, 2),  # (batch, seqlen_k, nheads_k, headdim)
        v=v.transpose(1, 2),  # (batch, seqlen_k, nheads_k, headdim_v)
        softmax_scale=checked_scale(scale, q.shape[3], "scale"),
        causal=causal,
        window_size=window,
        attn_bias=mask if is_bias else None,
        attn_mask=None if is_bias else mask,
        dropout_p=dropout_p,
        rng_state=ops.checked_rng_state(dropout_p, None, q.device),
        needs_grad=ops.needs_grad(q, k, v, mask if is_bias else None),
    )
    check_range("dropout_p", dropout_p, 0.0, 1.0)
    if mask is not None:
        check_modifiers(args)
    out, _ = ops.attention(args, "auto")
    out = out.transpose(1, 2)  # (batch, nheads, seqlen_q, headdim_v)
    if len(lead) != 2:
        out = out.reshape(*lead, *out.shape[2:])
    return _laid_out_like(out, query)


def _laid_out_like(out: Tensor, query: Tensor) -> Tensor:
    """``out``, with the strides that callers of torch's own attention reckon with."""
    if out.shape != query.shape or query.stride(-1) != 1:
        return out.contiguous()
    if query.stride() == out.stride() or out.numel() == 0:
        return out
    like = torch.empty_like(query)
    return out if like.stride() == out.stride() else like.copy_(out)


def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
        if x.dim() < 2:
            raise ValueError(
                f"{name}: expected 2 or more dimensions (..., seqlen, dim), got {tuple(x.shape)}"
            )
    check_dtype("query", query, DTYPES)
    check_like("key", key, "query", query)
    check_like("value", value, "query", query)
    headdim, (seqlen_k, headdim_k), (seqlen_v, headdim_v) = query.shape[-1], key.shape[-2:], value.shape[-2:]
    if headdim_k != headdim:
        raise ValueError(f"key: expected (..., seqlen_k, headdim={headdim}), got {tuple(key.shape)}")
    if seqlen_v != seqlen_k:
        raise ValueError(f"value: expected (..., seqlen_k={seqlen_k}, headdim_v), got {tuple(value.shape)}")
    for name, dim in (("query", headdim), ("value", headdim_v)):
        if not 1 <= dim <= MAX_HEADDIM:
            raise ValueError(f"{name}: expected a last dimension from 1 to {MAX_HEADDIM}, got {dim}")


def _as_batch(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, enable_gqa: bool) -> _Call:
    """Every leading dimension but the heads becomes the batch; heads that broadcast are not copied."""
    if mask is not None:
        _check_mask(mask, query)
    if query.dim() == key.dim() == value.dim() == 4 and query.shape[0] == key.shape[0] == value.shape[0]:
        batch: tuple[int, ...] = (query.shape[0],)
    else:
        batch = _broadcast([x.shape[:-3] for x in (query, key, value)], query, key, value)
    heads = tuple(1 if x.dim() == 2 else x.shape[-3] for x in (query, key, value))
    nheads, nheads_k = _heads(heads, enable_gqa, query, key, value)
    q = _flat_batch(query, batch, nheads)
    k, v = (_flat_batch(x, batch, nheads_k, nheads if enable_gqa else 0) for x in (key, value))
    dims = max(query.dim(), key.dim(), value.dim())
    lead = (*batch, nheads) if dims > 2 else ()
    if mask is not None:
        full = (*batch, nheads, q.shape[2], k.shape[2])
        shape = (1,) * (len(full) - mask.dim()) + tuple(mask.shape)
        if len(shape) != len(full) or any(n not in (1, m) for n, m in zip(shape, full)):
            raise ValueError(
                f"attn_mask: expected a shape that broadcasts to {full}, got {tuple(mask.shape)}"
            )
        if len(batch) > 1:
            mask = mask.reshape(shape).expand(*batch, *shape[-3:]).flatten(0, len(batch) - 1)
    return _Call(q, k, v, mask, lead)


def _check_mask(mask: Tensor, query: Tensor) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"attn_mask: expected a torch.Tensor, got {type(mask).__name__}")
    check_dtype("attn_mask", mask, tuple(dict.fromkeys((torch.bool, torch.float32, query.dtype))))
    if mask.device != query.device:
        raise ValueError(f"attn_mask: expected the device of query, {query.device}, got {mask.device}")


def _broadcast(shapes: list[torch.Size], *tensors: Tensor) -> tuple[int, ...]:
    try:
        return tuple(torch.broadcast_shapes(*shapes))  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        given = ", ".join(str(tuple(x.shape)) for x in tensors)
        raise ValueError(
            f"query, key, value: expected leading dimensions that broadcast, got {given}"
        ) from error


def _heads(heads: tuple[int, ...], enable_gqa: bool, *tensors: Tensor) -> tuple[int, int]:
    """Heads of the result, and the fewest that key and value need."""
    nheads, nheads_k, nheads_v = heads
    if enable_gqa:
        if min(x.dim() for x in tensors) < 3:
            raise ValueError(
                f"enable_gqa: expected tensors with heads, got {[tuple(x.shape) for x in tensors]}"
            )
        for name, n in (("key", nheads_k), ("value", nheads_v)):
            if n == 0 or nheads % n:
                raise ValueError(f"{name}: expected heads that divide query's {nheads}, got {n}")
        return nheads, nheads_k if nheads_k == nheads_v else nheads
    if nheads == nheads_k == nheads_v:
        return nheads, nheads
    (nheads,) = _broadcast([torch.Size((n,)) for n in heads], *tensors)
    return nheads, 1 if nheads_k == nheads_v == 1 else nheads


def _flat_batch(x: Tensor, batch: tuple[int, ...], heads: int, repeats_to: int = 0) -> Tensor:
    """(batch, heads, seqlen, dim) of x (..., seqlen, dim), a view where that can be.

    ``repeats_to``: heads, fewer than that, repeat in place (GQA) to ``heads`` instead of broadcasting.
    """
    if x.dim() == 4 and len(batch) == 1 and x.shape[0] == batch[0] and x.shape[1] == heads:
        return x
    if x.dim() == 2:
        x = x[None]  # (1, seqlen, dim)
    if repeats_to and x.shape[-3] != heads:
        x = x.repeat_interleave(heads // x.shape[-3], dim=-3)
    x = x.expand(*batch, heads, *x.shape[-2:])
    return x.flatten(0, len(batch) - 1) if len(batch) > 1 else (x if batch else x[None])
