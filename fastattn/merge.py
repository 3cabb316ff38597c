"""Partial attentions over parts of the keys, combined: cascades, shared prefixes, ring attention."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def merge_states(outs: Tensor | Sequence[Tensor], lses: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over all keys, from attentions over disjoint parts of them (FlashInfer, arXiv 2501.01005, section 2.2).

    Args:
        outs: the parts' outputs, (batch, seqlen_q, nheads, headdim_v) or packed (total_q, nheads, headdim_v) each, as
            a sequence or stacked in front.
        lses: their log-sum-exps, (batch, nheads, seqlen_q) or packed (nheads, total_q) each.

    Returns:
        out in the parts' dtype and lse, shaped as one part's. A part with lse = -inf weighs nothing; where all parts
        have it, out = 0 and lse = -inf. Differentiable.

    Raises:
        ValueError: no parts, or shapes that do not belong together; the message names the argument.
    """
    for name, parts in (("outs", outs), ("lses", lses)):
        if not isinstance(parts, Tensor) and len({tuple(x.shape) for x in parts}) > 1:
            raise ValueError(f"{name}: expected parts of one shape, got {[tuple(x.shape) for x in parts]}")
    out, lse = (
        x if isinstance(x, Tensor) else torch.stack(list(x)) if len(x) else None for x in (outs, lses)
    )
    if out is None or lse is None or out.shape[0] == 0:
        raise ValueError("outs: expected at least one part, got none")
    if out.dim() not in (4, 5):
        raise ValueError(f"outs: expected parts of 3 (packed) or 4 dimensions, got {out.dim() - 1}")
    rows = out.shape[:-1]  # (parts, [batch,] seqlen_q, nheads)
    expected = (*rows[:-2], rows[-1], rows[-2])
    if tuple(lse.shape) != expected:
        raise ValueError(
            f"lses: expected {expected} to go with outs {tuple(out.shape)}, got {tuple(lse.shape)}"
        )
    weight = lse.to(torch.float64 if out.dtype == torch.float64 else torch.float32).transpose(-1, -2)
    empty = weight == -math.inf  # (parts, [batch,] seqlen_q, nheads)
    # Where a part is empty its weight is 0, and 0 must also be what its derivative is.
    top = weight.detach().amax(0)
    top = torch.where(top == -math.inf, torch.zeros_like(top), top)
    weight = torch.exp(torch.where(empty, torch.zeros_like(weight), weight) - top).masked_fill(empty, 0.0)
    total = weight.sum(0)  # ([batch,] seqlen_q, nheads)
    nothing = total == 0
    total = total.masked_fill(nothing, 1.0)
    merged = (out.to(weight.dtype) * (weight / total)[..., None]).sum(0).to(out.dtype)
    new_lse = (torch.log(total) + top).masked_fill(nothing, -math.inf)
    return merged, new_lse.transpose(-1, -2).contiguous()
