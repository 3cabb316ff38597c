"""The parts of a backward pass that are no kernels: sums around them."""

from __future__ import annotations

import torch
from torch import Tensor


def bias_sums(bias: Tensor, full: tuple[int, int, int, int], compute: torch.dtype) -> Tensor:
    """Zeros, where the kernel adds up the gradient of ``bias``: in its shape, or more where threads would meet.

    A bias without queries or without keys gets a sum per head and sequence of ``full``, the shape of the scores.
    """
    shape = _four(bias)
    if shape[2] == 1 and full[2] > 1:
        shape = (*full[:2], 1, full[3])
    elif shape[3] == 1 and full[3] > 1:
        shape = (*full[:3], 1)
    return torch.zeros(shape, dtype=compute)


def broadcast_strides(x: Tensor) -> tuple[int, ...]:
    """Strides of a contiguous tensor, 0 where it broadcasts."""
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))


def bias_gradient(bias: Tensor, sums: Tensor) -> Tensor:
    """What ``bias_sums`` holds after the call, in ``bias``' shape and dtype."""
    for dim, size in enumerate(_four(bias)):
        if size == 1:
            sums = sums.sum(dim, keepdim=True)
    return sums.to(bias.dtype).view(bias.shape)


def sinks_gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """A sink takes ``exp(sink - lse)`` of each row's weight, and gives no value for it."""
    column = sinks.to(lse.dtype)[:, None]  # (nheads, 1)
    weight = torch.exp(column - lse).masked_fill(lse == -torch.inf, 0.0)
    total = (weight * delta).sum(-1)  # (batch, nheads), packed (nheads,)
    return -(total if total.dim() == 1 else total.sum(0)).to(sinks.dtype)


def _four(bias: Tensor) -> tuple[int, ...]:
    return (1,) * (4 - bias.dim()) + tuple(bias.shape)
