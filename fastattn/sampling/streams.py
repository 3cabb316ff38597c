"""Seeds out of seeds: streams of noise that have nothing to do with each other."""

from __future__ import annotations

import torch
from torch import Tensor


def mix64(x: Tensor) -> Tensor:
    """A bijection of 64-bit integers after which neighbours look random: SplitMix64 (Steele et al., OOPSLA 2014).

    Args:
        x: int64, any shape; read as 64 bits, products wrap.

    Returns:
        int64, the same shape.
    """
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def row_seeds(seed: int, batch: int) -> Tensor:
    """One seed for a whole batch: (batch,) int64, a different stream for each row.

    Mixed first, so that the rows of one seed are not those of its neighbour.
    """
    return mix64(torch.tensor(seed)) + torch.arange(batch)


def _signed(bits: int) -> int:
    return bits - 2**64 if bits >= 2**63 else bits


def _shift(x: Tensor, by: int) -> Tensor:
    """A shift right that brings in zeros."""
    return x.bitwise_right_shift(by).bitwise_and(2 ** (64 - by) - 1)
