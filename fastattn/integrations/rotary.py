"""``flash_attn.layers.rotary.apply_rotary_emb``: rotary position embedding (arXiv 2104.09864) in plain PyTorch.

Names, arguments and results are those of flash_attn 2.8 (Dao-AILab/flash-attention, flash_attn/layers/rotary.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["apply_rotary_emb", "apply_rotary_emb_func", "apply_rotary_emb_torch"]


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Rotate the first ``rotary_dim`` dimensions of every head of x by its token's position; differentiable in x.

    Args:
        x: (batch, seqlen, nheads, headdim); packed, with cu_seqlens, (total, nheads, headdim).
        cos: (seqlen_rotary, rotary_dim / 2); sin the same.
        interleaved: pairs are dimensions 2i and 2i + 1 (GPT-J), not i and i + rotary_dim / 2 (GPT-NeoX).
        inplace: write into x, and return it.
        seqlen_offsets: position of each sequence's first token, a number or (batch,).
        cu_seqlens: (batch + 1,) int32, where each packed sequence begins.
        max_seqlen: not needed here.

    Raises:
        ValueError: a shape, or a position beyond seqlen_rotary.
    """
    half = cos.shape[-1]
    if cos.dim() != 2 or cos.shape != sin.shape or 2 * half > x.shape[-1]:
        raise ValueError(
            f"cos, sin: expected (seqlen_rotary, at most {x.shape[-1] // 2}), "
            f"got {tuple(cos.shape)}, {tuple(sin.shape)}"
        )
    position = _positions(x, seqlen_offsets, cu_seqlens)
    if position.numel() and not 0 <= int(position.min()) <= int(position.max()) < cos.shape[0]:
        raise ValueError(
            f"cos: expected positions up to {int(position.max())}, got seqlen_rotary={cos.shape[0]}"
        )
    c, s = (t[position][..., None, :].to(x.dtype) for t in (cos, sin))  # (..., seqlen, 1, rotary_dim / 2)
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        a, b = turned[..., ::2], turned[..., 1::2]
        turned = torch.stack([a * c - b * s, a * s + b * c], dim=-1).flatten(-2)
    else:
        a, b = turned.chunk(2, dim=-1)
        turned = torch.cat([a * c - b * s, a * s + b * c], dim=-1)
    out = torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned
    return x.copy_(out) if inplace else out


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_torch(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """The same of x (batch, seqlen, nheads, headdim) from position 0 on."""
    return apply_rotary_emb(x, cos, sin, interleaved)


def _positions(x: Tensor, offsets: int | Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """(1 or batch, seqlen), packed (total,)."""
    offset = torch.as_tensor(offsets, device=x.device).long()
    if cu_seqlens is None:
        if x.dim() != 4:
            raise ValueError(f"x: expected (batch, seqlen, nheads, headdim), got {tuple(x.shape)}")
        return offset.view(-1, 1) + torch.arange(x.shape[1], device=x.device)
    if x.dim() != 3:
        raise ValueError(f"x: expected (total, nheads, headdim), got {tuple(x.shape)}")
    lengths = cu_seqlens.diff().long()
    begin = torch.repeat_interleave(cu_seqlens[:-1].long() - offset, lengths)  # (total,)
    return torch.arange(x.shape[0], device=x.device) - begin
