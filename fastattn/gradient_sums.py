"""The parts of a backward pass that are no kernels: sums around them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import fold, pad

SLOT_KEYS = 64  # csrc/params.h, kBiasSlotKeys


class BiasSums:
    """Zeros, where the kernel adds up the gradient of ``attn_bias``: in its shape, or more where threads would meet.

    A bias without queries or without keys gets a sum per head and sequence of ``full``, the shape of the scores.
    """

    stride_slot = 0

    def __init__(self, bias: Tensor, full: tuple[int, int, int, int], compute: torch.dtype) -> None:
        self.bias, shape = bias, _four(bias)
        if shape[2] == 1 and full[2] > 1:
            shape = (*full[:2], 1, full[3])
        elif shape[3] == 1 and full[3] > 1:
            shape = (*full[:3], 1)
        self.sums = torch.zeros(shape, dtype=compute)
        self.address, self.strides = self.sums.data_ptr(), _broadcast_strides(self.sums)

    def gradient(self) -> Tensor:
        """What the sums hold after the call, in the bias' shape and dtype."""
        sums = self.sums
        for dim, size in enumerate(_four(self.bias)):
            if size == 1 and sums.shape[dim] != 1:  # a sum over one is a copy, and these are large
                sums = sums.sum(dim, keepdim=True)
        return sums.to(self.bias.dtype).view(self.bias.shape)


class DiagonalSums:
    """The same for a relative bias: a sum per diagonal and ``SLOT_KEYS`` keys, so that threads do not meet.

    In a slot the diagonal of query q and the slot's key k stands at ``q - k + SLOT_KEYS - 1``.
    """

    def __init__(self, bias: Tensor, full: tuple[int, int, int, int], compute: torch.dtype) -> None:
        self.bias = bias  # (batch or 1, nheads or 1, 1, seqlen_q + seqlen_k - 1)
        _, _, seqlen_q, seqlen_k = full
        slots, width = max(1, -(-seqlen_k // SLOT_KEYS)), seqlen_q + SLOT_KEYS - 1
        self.sums = torch.zeros((*bias.shape[:2], slots, width), dtype=compute)
        self.address = self.sums.data_ptr() + (SLOT_KEYS - 1) * self.sums.element_size()
        self.strides = (*_broadcast_strides(self.sums)[:2], 1, -1)
        self.stride_slot = width + SLOT_KEYS

    def gradient(self) -> Tensor:
        """What the sums hold after the call, in the bias' shape and dtype."""
        batch, nheads, slots, width = self.sums.shape
        columns = self.sums.flip(3).flatten(0, 1).transpose(1, 2)  # (batch * nheads, width, slots)
        diagonals = (slots - 1) * SLOT_KEYS + width  # and what the last slot has too much
        total = fold(columns, (1, diagonals), (1, width), stride=(1, SLOT_KEYS))
        return total.view(batch, nheads, 1, diagonals)[..., : self.bias.shape[3]].to(self.bias.dtype)


def scores_to_bias(dscores: Tensor, bias: Tensor, is_relative: bool) -> Tensor:
    """The gradient of the scores (batch, nheads, seqlen_q, seqlen_k) added up over what ``bias`` spreads."""
    if is_relative:
        _, _, seqlen_q, seqlen_k = dscores.shape
        diagonals = bias.shape[3]
        dscores = dscores.sum_to_size((*bias.shape[:2], seqlen_q, seqlen_k))
        # A row one element longer than there are diagonals: seen without it, each row starts one further right.
        rows = pad(dscores.flip(2), (0, diagonals + 1 - seqlen_k)).flatten(2)
        skewed = rows[..., : seqlen_q * diagonals].view(*bias.shape[:2], seqlen_q, diagonals)
        dscores = skewed.sum(2, keepdim=True)
    return dscores.sum_to_size(bias.shape).to(bias.dtype)


def sinks_gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """A sink takes ``exp(sink - lse)`` of each row's weight, and gives no value for it."""
    column = sinks.to(lse.dtype)[:, None]  # (nheads, 1)
    weight = torch.exp(column - lse).masked_fill(lse == -torch.inf, 0.0)
    total = (weight * delta).sum(-1)  # (batch, nheads), packed (nheads,)
    return -(total if total.dim() == 1 else total.sum(0)).to(sinks.dtype)


def _broadcast_strides(x: Tensor) -> tuple[int, ...]:
    """Strides of a contiguous tensor, 0 where it broadcasts."""
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))


def _four(bias: Tensor) -> tuple[int, ...]:
    return (1,) * (4 - bias.dim()) + tuple(bias.shape)
