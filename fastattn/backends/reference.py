"""Attention and sampling in plain PyTorch: the definition to read, and the fallback for what no kernel has yet.

Nothing here is fused: scores take ``seqlen_q x seqlen_k`` memory. Statistics are float32 (float64 for float64).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastattn.backends.reference_sampling import sample

if TYPE_CHECKING:
    from fastattn.args import AttentionArgs, KVAppendArgs, SamplingArgs

__all__ = ["FEATURES", "NAME", "append_kv", "attention", "sample", "supports", "unavailable"]

NAME = "reference"
FEATURES = frozenset({"window", "softcap", "alibi", "bias", "mask", "sinks", "gradients"})


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


def attention(args: AttentionArgs) -> tuple[Tensor, Tensor | None]:
    """``out (batch, seqlen_q, nheads, headdim_v)`` in q's dtype and ``lse (batch, nheads, seqlen_q)``."""
    compute = torch.float64 if args.q.dtype == torch.float64 else torch.float32
    groups = args.q.shape[2] // args.k.shape[2] if args.k.shape[2] else 1
    q = args.q.to(compute).transpose(1, 2)  # (batch, nheads, seqlen_q, headdim)
    k = (
        args.k.to(compute).transpose(1, 2).repeat_interleave(groups, dim=1)
    )  # (batch, nheads, seqlen_k, headdim)
    v = (
        args.v.to(compute).transpose(1, 2).repeat_interleave(groups, dim=1)
    )  # (batch, nheads, seqlen_k, headdim_v)

    offset, visible = _positions(args)
    scores = args.softmax_scale * (q @ k.transpose(-1, -2))  # (batch, nheads, seqlen_q, seqlen_k)
    if args.softcap > 0:
        scores = args.softcap * torch.tanh(scores / args.softcap)
    if args.attn_bias is not None:
        scores = scores + args.attn_bias.to(compute)
    if args.alibi_slopes is not None:
        slopes = args.alibi_slopes.to(compute).view(-1, q.shape[1], 1, 1)
        scores = scores - slopes * offset.abs()
    if args.attn_mask is not None:
        visible = visible & args.attn_mask
    scores = scores.masked_fill(~visible, -math.inf)
    # Keys past a row's length may hold anything, NaN included: they must not reach 0 * v.
    if args.seqlens_k is not None:
        inside = torch.arange(v.shape[2], device=v.device) < args.seqlens_k.view(-1, 1)  # (batch, seqlen_k)
        v = v.masked_fill(~inside[:, None, :, None], 0.0)

    if args.sinks is not None:
        sink = args.sinks.to(compute).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        lse = torch.logsumexp(torch.cat([scores, sink], dim=-1), dim=-1)
    else:
        lse = torch.logsumexp(scores, dim=-1)  # (batch, nheads, seqlen_q)
    # A row that sees no key has lse = -inf: subtract 0 there, so that exp(-inf) = 0 and not NaN.
    shift = torch.where(lse == -math.inf, torch.zeros_like(lse), lse)
    probs = torch.exp(scores - shift[..., None])  # (batch, nheads, seqlen_q, seqlen_k)
    out = (probs @ v).transpose(1, 2).to(args.q.dtype).contiguous()  # (batch, seqlen_q, nheads, headdim_v)
    return out, (lse if args.return_lse else None)


def _positions(args: AttentionArgs) -> tuple[Tensor, Tensor]:
    """``i + seqlen_k - seqlen_q - j`` and whether key j is visible; both (batch or 1, 1, seqlen_q, seqlen_k)."""
    seqlen_q, seqlen_k, device = args.q.shape[1], args.k.shape[1], args.q.device
    used = torch.tensor([seqlen_k], device=device) if args.seqlens_k is None else args.seqlens_k
    used = used.view(-1, 1, 1, 1).long()
    i = torch.arange(seqlen_q, device=device).view(1, 1, -1, 1)
    j = torch.arange(seqlen_k, device=device).view(1, 1, 1, -1)
    offset = i + used - seqlen_q - j
    left, right = args.window_size
    if args.causal:
        right = 0 if right < 0 else min(right, 0)
    visible = j < used
    if left >= 0:
        visible = visible & (offset <= left)
    if right >= 0:
        visible = visible & (offset >= -right)
    return offset, visible.expand(-1, -1, seqlen_q, -1)


def append_kv(args: KVAppendArgs) -> tuple[Tensor, Tensor]:
    """Write the new (rotated) k and v at ``cache_seqlens``; returns rotated q and the new lengths (batch,)."""
    q, seqlens = args.q, args.cache_seqlens
    if args.rotary_cos is not None:
        q = rotate(args, q, per_row=args.rotary_per_row)
    if args.k is None or args.v is None:
        return q, seqlens
    k = rotate(args, args.k, per_row=True) if args.rotary_cos is not None else args.k
    for row, start in enumerate(seqlens.tolist()):
        args.k_cache[row, start : start + k.shape[1]] = k[row]
        args.v_cache[row, start : start + k.shape[1]] = args.v[row]
    return q, seqlens + k.shape[1]


def rotate(args: KVAppendArgs, x: Tensor, *, per_row: bool) -> Tensor:
    """Rotary embedding of x (batch, seqlen, heads, headdim) at positions ``cache_seqlens + row``."""
    assert args.rotary_cos is not None
    assert args.rotary_sin is not None
    half = args.rotary_cos.shape[1]
    rows = torch.arange(x.shape[1], device=x.device) * int(per_row)
    positions = args.cache_seqlens.long()[:, None] + rows  # (batch, seqlen)
    cos = args.rotary_cos[positions].float()[:, :, None]  # (batch, seqlen, 1, rotary_dim / 2)
    sin = args.rotary_sin[positions].float()[:, :, None]
    turned = x[..., : 2 * half].float()
    a, b = (turned[..., ::2], turned[..., 1::2]) if args.rotary_interleaved else turned.chunk(2, dim=-1)
    pair = (a * cos - b * sin, a * sin + b * cos)  # each (batch, seqlen, heads, rotary_dim / 2)
    turned = torch.stack(pair, dim=-1).flatten(-2) if args.rotary_interleaved else torch.cat(pair, dim=-1)
    return torch.cat([turned.to(x.dtype), x[..., 2 * half :]], dim=-1)
