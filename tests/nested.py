"""Tensors inside a call's arguments: in tuples, tuples of tuples and dicts, and in ``TokenCounts``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastattn import TokenCounts


def map_tensors(x: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """x with every tensor changed."""
    if isinstance(x, Tensor):
        return change(x)
    if isinstance(x, dict):
        return {name: map_tensors(value, change) for name, value in x.items()}
    if isinstance(x, tuple):
        items = [map_tensors(item, change) for item in x]
        return type(x)(*items) if hasattr(x, "_fields") else tuple(items)
    if isinstance(x, TokenCounts):
        changed = copy.copy(x)
        for name in ("ids", "counts", "lengths", "unseen"):
            setattr(changed, name, change(getattr(x, name)))
        return changed
    return x


def tensors_in(x: Any) -> list[Tensor]:
    """All of them."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(x, note)
    return found
