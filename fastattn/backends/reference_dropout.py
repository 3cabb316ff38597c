"""Dropout's mask in plain PyTorch: Philox4x32-10 keyed by place, as csrc/rng.h defines it."""

from __future__ import annotations

import torch
from torch import Tensor

_MUL = (0xD2511F53, 0xCD9E8D57)
_BUMP = (0x9E3779B9, 0xBB67AE85)
_DOMAIN = 0x64726F70  # "drop"
_LOW = 0xFFFFFFFF


def dropout_keep(
    rng_state: Tensor, batch: int, nheads: int, seqlen_q: int, seqlen_k: int, dropout_p: float
) -> Tensor:
    """``(batch, nheads, seqlen_q, seqlen_k)`` bool, True = kept, of ``rng_state (2,)`` int64: seed and offset."""
    seed, offset = rng_state[0], rng_state[1]
    zero = torch.zeros_like(seed)
    key = _philox((offset & _LOW, _high(offset), zero, zero + _DOMAIN), (seed & _LOW, _high(seed)))[:2]

    def arange(n: int, dim: int) -> Tensor:
        shape = [1, 1, 1]
        shape[dim] = n
        return torch.arange(n, device=seed.device).view(shape)

    head, i, block = arange(batch * nheads, 0), arange(seqlen_q, 1), arange((seqlen_k + 3) // 4, 2)
    head, i, block = torch.broadcast_tensors(head, i, block)  # type: ignore[no-untyped-call]  # (batch * nheads, seqlen_q, seqlen_k / 4)
    words = torch.stack(_philox((block, i, head, torch.full_like(head, _DOMAIN)), key), dim=-1)
    words = words.flatten(-2)[..., :seqlen_k].reshape(batch, nheads, seqlen_q, seqlen_k)
    return words >= int(dropout_p * 2.0**32)


def _high(x: Tensor) -> Tensor:
    return (x >> 32) & _LOW


def _philox(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Words are int64 in [0, 2^32); their products wrap around, which keeps all 64 bits."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = c0 * _MUL[0], c2 * _MUL[1]
        c0, c1, c2, c3 = _high(b) ^ c1 ^ k0, b & _LOW, _high(a) ^ c3 ^ k1, a & _LOW
        k0, k1 = (k0 + _BUMP[0]) & _LOW, (k1 + _BUMP[1]) & _LOW
    return c0, c1, c2, c3
