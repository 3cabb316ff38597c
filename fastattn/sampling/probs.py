"""Rows of probabilities: what they sum to, and why some cannot be drawn from."""

from __future__ import annotations

import torch
from torch import Tensor

_UNUSABLE = ("", "has NaN", "has a negative value", "has +inf", "has nothing positive")


def totals(probs: Tensor) -> Tensor:
    """The sum of each row, float64: (..., vocab) to (...)."""
    return probs.sum(-1, dtype=torch.float64)


def unusable(probs: Tensor, total: Tensor) -> Tensor:
    """Which of ``_UNUSABLE`` a row is, 0 = none: (..., vocab) and its totals (...) to (...) int64."""
    least = probs.amin(-1)  # NaN wins
    why = torch.where(total == 0, 4, 0)
    why = torch.where(total == torch.inf, 3, why)
    why = torch.where(least < 0, 2, why)
    return torch.where(least.isnan(), 1, why)


def checked_totals(name: str, probs: Tensor) -> Tensor:
    """The sum of each row, once all rows can be drawn from: (..., vocab) to (...) float64.

    Raises:
        ValueError: a row with NaN, a negative or infinite value, or nothing positive; names the row and the value.
    """
    total = totals(probs)
    why = unusable(probs, total)
    for place in why.nonzero()[:1].tolist():
        problem = _UNUSABLE[int(why[tuple(place)])]
        if problem.endswith("negative value"):
            problem += f", {probs[tuple(place)].min().item()}"
        where = ", ".join(f"{axis} {index}" for axis, index in zip(("row", "token"), place))
        raise ValueError(f"{name}: {where} {problem}")
    return total
