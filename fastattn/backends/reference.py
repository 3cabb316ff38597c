"""Attention and sampling in plain PyTorch: the definition to read, and the fallback for what no kernel has yet.

Nothing here is fused: scores take ``seqlen_q x seqlen_k`` memory. Statistics are float32 (float64 for float64).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastattn.backends.reference_dropout import dropout_keep
from fastattn.backends.reference_sampling import sample
from fastattn.backends.reference_sampling import survivors_by_id as survivors

if TYPE_CHECKING:
    from fastattn.args import AttentionArgs, KVAppendArgs, SamplingArgs

__all__ = [
    "FEATURES",
    "NAME",
    "append_kv",
    "attention",
    "attention_backward",
    "sample",
    "supports",
    "survivors",
    "unavailable",
]

NAME = "reference"
FEATURES = frozenset(
    {
        "window", "softcap", "alibi", "bias", "relative_bias", "mask", "sinks", "dropout", "varlen", "leftpad",
        "cache_batch_idx", "paged", "kv_dtype", "gradients", "append_gradients", "penalties", "logit_bias", "allowed",
        "logprobs", "survivors",
    }
)  # fmt: skip


def unavailable() -> str | None:
    """PyTorch runs everywhere."""
    return None


def is_misforced() -> bool:
    """Nothing about it can be forced."""
    return False


def supports(args: AttentionArgs | KVAppendArgs | SamplingArgs) -> str | None:
    """None if this backend can serve the call, else why not."""
    lacking = sorted(args.features() - FEATURES)
    return f"lacks {', '.join(map(repr, lacking))}" if lacking else None


class _Dense(NamedTuple):
    """The call with one row of queries and keys per sequence, as long as the longest."""

    q: Tensor  # (batch, seqlen_q, nheads, headdim)
    k: Tensor  # (batch, seqlen_k, nheads_k, headdim)
    v: Tensor  # (batch, seqlen_k, nheads_k, headdim_v)
    used_q: Tensor  # (batch, 1, 1, 1): how many of each count
    used_k: Tensor


def attention(args: AttentionArgs) -> tuple[Tensor, Tensor | None]:
    """``out (batch, seqlen_q, nheads, headdim_v)`` in q's dtype and ``lse (batch, nheads, seqlen_q)``.

    Packed sequences: out (1, total_q, nheads, headdim_v) and lse (nheads, total_q).
    """
    x = _dense(args)
    batch, seqlen_q, nheads, _ = x.q.shape
    group = nheads // x.k.shape[2]
    q = x.q.transpose(1, 2)  # (batch, nheads, seqlen_q, headdim)
    k = x.k.transpose(1, 2).repeat_interleave(group, dim=1)  # (batch, nheads, seqlen_k, headdim)
    v = x.v.transpose(1, 2).repeat_interleave(group, dim=1)  # (batch, nheads, seqlen_k, headdim_v)

    scores = args.softmax_scale * (q @ k.transpose(-1, -2))  # (batch, nheads, seqlen_q, seqlen_k)
    scores, visible = _modify(args, scores, x)
    # A masked score must not reach the derivative of anything: it counts as 0 here and as -inf from there on.
    scores = scores.masked_fill(~visible, -math.inf)
    columns = scores
    if args.sinks is not None:
        sink = args.sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        columns = torch.cat([scores, sink], dim=-1)
    # Rows that see nothing have lse = -inf; what is subtracted there must be finite, in the gradient too.
    empty = (columns == -math.inf).all(dim=-1, keepdim=True)  # (batch, nheads, seqlen_q, 1)
    lse = torch.logsumexp(columns.masked_fill(empty, 0.0), dim=-1, keepdim=True)
    probs = torch.softmax(columns.masked_fill(empty, 0.0), dim=-1)[..., : scores.shape[3]]
    probs = probs.masked_fill(empty | ~visible, 0.0)
    lse = lse.masked_fill(empty, -math.inf).squeeze(-1)  # (batch, nheads, seqlen_q)
    if args.dropout_p > 0 and args.rng_state is not None:
        keep = dropout_keep(args.rng_state, batch, nheads, seqlen_q, scores.shape[3], args.dropout_p)
        probs = probs * keep * (1 / (1 - args.dropout_p) if args.dropout_p < 1 else 0.0)
    out = (probs @ v).transpose(1, 2).to(args.q.dtype)  # (batch, seqlen_q, nheads, headdim_v)
    if args.cu_seqlens_q is not None:
        out, lse = _pack(out, lse, x.used_q)
    return out.contiguous(), (lse.contiguous() if args.return_lse else None)


def attention_backward(
    args: AttentionArgs, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, *, needs_dbias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """``dq, dk, dv, dbias, dsinks`` in their inputs' shapes, from autograd over the definition above."""
    names = ["q", "k", "v"]
    if needs_dbias:
        names.append("attn_bias")
    if args.sinks is not None:
        names.append("sinks")
    # Inside an operator autograd is switched off twice: by grad mode, and below it by the dispatcher.
    keys = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
    with torch.enable_grad(), keys:
        leaves = {name: getattr(args, name).detach().requires_grad_() for name in names}
        new_out, new_lse = attention(replace(args, return_lse=True, **leaves))
        assert new_lse is not None
        outputs = (new_out,) if dlse is None else (new_out, new_lse)
        given = (dout,) if dlse is None else (dout, dlse)
        grads = torch.autograd.grad(outputs, list(leaves.values()), given, allow_unused=True)
    found = {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), grads)
    }
    return found["q"], found["k"], found["v"], found.get("attn_bias"), found.get("sinks")


def _dense(args: AttentionArgs) -> _Dense:
    compute = torch.float64 if args.q.dtype == torch.float64 else torch.float32
    device, batch = args.q.device, args.batch
    q = args.q
    if args.cu_seqlens_q is not None:
        starts, used_q = args.cu_seqlens_q[:-1].long(), args.cu_seqlens_q.diff().long()
        index = starts[:, None] + torch.arange(args.max_seqlen_q, device=device)  # (batch, seqlen_q)
        q = _take(q[0], index, used_q)
    else:
        used_q = torch.full((batch,), q.shape[1], device=device)
    if args.cu_seqlens_k is not None:
        starts, used_k = args.cu_seqlens_k[:-1].long(), args.cu_seqlens_k.diff().long()
        index = starts[:, None] + torch.arange(args.max_seqlen_k, device=device)
    else:
        index, used_k = _key_rows(
            args.k, batch, args.seqlens_k, args.k_leftpad, args.cache_batch_idx, args.block_table
        )
        if args.cu_seqlens_q is not None:  # pages, which may have more or less room than max_seqlen_k
            index = pad(index, (0, args.max_seqlen_k - index.shape[1]))
    k, v = (
        _take(x.flatten(0, 1).to(compute) * (1.0 if s is None else s.flatten(0, 1)[..., None]), index, used_k)
        for x, s in ((args.k, args.k_scale), (args.v, args.v_scale))
    )
    return _Dense(q.to(compute), k, v, used_q.view(-1, 1, 1, 1), used_k.view(-1, 1, 1, 1))


def _key_rows(
    k: Tensor, batch: int, end: Tensor | None, begin: Tensor | None, rows: Tensor | None, table: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Where each key of each sequence lies in k flattened to tokens, (batch, seqlen_k); and how many there are."""
    page_size, device = k.shape[1], k.device
    capacity = page_size if table is None else table.shape[1] * page_size
    start = torch.zeros(batch, dtype=torch.long, device=device) if begin is None else begin.long()
    stop = torch.full_like(start, capacity) if end is None else end.long()
    token = start[:, None] + torch.arange(capacity, device=device)  # (batch, seqlen_k)
    if table is None:
        row = torch.arange(batch, device=device) if rows is None else rows.long()
        place = row[:, None] * page_size + token
    else:
        page = token.div(page_size, rounding_mode="floor").clamp(max=table.shape[1] - 1)
        place = table.long().gather(1, page) * page_size + token % page_size
    return place, (stop - start).clamp(min=0)


def _take(rows: Tensor, index: Tensor, used: Tensor) -> Tensor:
    """``rows[index]`` (batch, seqlen, heads, dim) with zeros, not whatever lies there, from ``used`` on."""
    inside = torch.arange(index.shape[1], device=index.device) < used[:, None]  # (batch, seqlen)
    if rows.shape[0] == 0:
        return rows.new_zeros((*index.shape, *rows.shape[1:]))
    taken = rows[index.clamp(0, rows.shape[0] - 1)]
    return taken.masked_fill(~inside[..., None, None], 0.0)


def _pack(out: Tensor, lse: Tensor, used_q: Tensor) -> tuple[Tensor, Tensor]:
    """(batch, seqlen_q, ...) to (1, total_q, ...), and lse (batch, nheads, seqlen_q) to (nheads, total_q)."""
    inside = torch.arange(out.shape[1], device=out.device) < used_q.view(-1, 1)  # (batch, seqlen_q)
    return out[inside][None], lse.transpose(1, 2)[inside].T


def _modify(args: AttentionArgs, scores: Tensor, x: _Dense) -> tuple[Tensor, Tensor]:
    """Softcap, bias and ALiBi; and which scores are visible. All (batch, nheads, seqlen_q, seqlen_k)."""
    seqlen_q, seqlen_k, device = scores.shape[2], scores.shape[3], scores.device
    i = torch.arange(seqlen_q, device=device).view(1, 1, -1, 1)
    j = torch.arange(seqlen_k, device=device).view(1, 1, 1, -1)
    offset = i + x.used_k - x.used_q - j  # (batch, 1, seqlen_q, seqlen_k)
    if args.softcap > 0:
        scores = args.softcap * torch.tanh(scores / args.softcap)
    if args.attn_bias is not None:
        bias = args.attn_bias.to(scores.dtype)
        scores = scores + (bias_by_score(bias, seqlen_q, seqlen_k) if args.bias_is_relative else bias)
    if args.alibi_slopes is not None:
        slopes = args.alibi_slopes.to(scores.dtype).view(-1, scores.shape[1], 1, 1)
        scores = scores - slopes * offset.abs()
    left, right = args.window_size
    if args.causal:
        right = 0
    visible = (j < x.used_k) & (i < x.used_q)
    if left >= 0:
        visible = visible & (offset <= left)
    if right >= 0:
        visible = visible & (offset >= -right)
    if args.attn_mask is not None:
        visible = visible & args.attn_mask
    return scores, visible.expand_as(scores)


def bias_by_score(relative: Tensor, seqlen_q: int, seqlen_k: int) -> Tensor:
    """A relative bias (batch, nheads, 1, seqlen_q + seqlen_k - 1) as (batch, nheads, seqlen_q, seqlen_k)."""
    i = torch.arange(seqlen_q, device=relative.device)[:, None]
    j = torch.arange(seqlen_k, device=relative.device)
    return relative[:, :, 0][:, :, j - i + seqlen_q - 1]


def append_kv(args: KVAppendArgs) -> tuple[Tensor, Tensor]:
    """Write the new (rotated) k and v at ``cache_seqlens``; returns rotated q and the new lengths (batch,)."""
    q, seqlens = args.q, args.cache_seqlens
    if args.rotary_cos is not None:
        q = rotate(args, q, per_row=args.rotary_per_row)
    if args.k is None or args.v is None:
        return q, seqlens
    k = rotate(args, args.k, per_row=True) if args.rotary_cos is not None else args.k
    rows, used = _key_rows(
        args.k_cache, q.shape[0], seqlens, args.k_leftpad, args.cache_batch_idx, args.block_table
    )
    new = used[:, None] + torch.arange(
        k.shape[1], device=k.device
    )  # (batch, seqlen_new), the keys they become
    place = rows.gather(1, new)
    at = (place.div(args.k_cache.shape[1], rounding_mode="floor"), place % args.k_cache.shape[1])
    for x, cache, scale in ((k, args.k_cache, args.k_scale), (args.v, args.v_cache, args.v_scale)):
        if scale is not None:
            step = x.float().abs().amax(-1) / 127  # (batch, seqlen_new, nheads_k)
            scale[at] = step
            x = (x.float() / step.clamp(min=torch.finfo(torch.float32).tiny)[..., None]).round()
        cache[at] = x.to(cache.dtype)
    return q, seqlens + k.shape[1]


def rotate(args: KVAppendArgs, x: Tensor, *, per_row: bool) -> Tensor:
    """Rotary embedding of x (batch, seqlen, heads, headdim) at positions ``cache_seqlens - k_leftpad + row``."""
    assert args.rotary_cos is not None
    assert args.rotary_sin is not None
    half = args.rotary_cos.shape[1]
    rows = torch.arange(x.shape[1], device=x.device) * int(per_row)
    start = (
        args.cache_seqlens.long() if args.k_leftpad is None else (args.cache_seqlens - args.k_leftpad).long()
    )
    positions = start[:, None] + rows  # (batch, seqlen)
    cos = args.rotary_cos[positions].float()[:, :, None]  # (batch, seqlen, 1, rotary_dim / 2)
    sin = args.rotary_sin[positions].float()[:, :, None]
    turned = x[..., : 2 * half].float()
    a, b = (turned[..., ::2], turned[..., 1::2]) if args.rotary_interleaved else turned.chunk(2, dim=-1)
    pair = (a * cos - b * sin, a * sin + b * cos)  # each (batch, seqlen, heads, rotary_dim / 2)
    turned = torch.stack(pair, dim=-1).flatten(-2) if args.rotary_interleaved else torch.cat(pair, dim=-1)
    return torch.cat([turned.to(x.dtype), x[..., 2 * half :]], dim=-1)
