"""Argument checks, once, at the border: every message names the argument, what was expected and what came.

``Shapes`` binds a symbol the first time it meets it and holds every later tensor to it::

    shapes = Shapes()
    shapes.match("q", q, "batch seqlen_q nheads headdim")
    shapes.match("k", k, "batch seqlen_k nheads_k headdim")
    # ValueError: k: expected (batch=2, seqlen_k, nheads_k, headdim=64), got (2, 77, 8, 80)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor


@cache
def _symbols(spec: str) -> list[str]:
    return spec.split()


class Shapes:
    """Sizes by name, unified over the tensors of one call."""

    def __init__(self, **known: int) -> None:
        self.sizes: dict[str, int] = dict(known)

    def __getitem__(self, name: str) -> int:
        return self.sizes[name]

    def match(self, name: str, tensor: Any, spec: str) -> None:
        """Bind or compare the sizes of ``tensor`` with the names in ``spec``."""
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
        symbols = _symbols(spec)
        shape = tuple(tensor.shape)
        sizes = self.sizes
        if len(shape) == len(symbols) and all(sizes.get(s, n) == n for s, n in zip(symbols, shape)):
            sizes.update(zip(symbols, shape))
            return
        wanted = ", ".join(f"{s}={sizes[s]}" if s in sizes else s for s in symbols)
        raise ValueError(f"{name}: expected ({wanted}), got {shape}")


def check_dtype(name: str, tensor: Tensor, allowed: Sequence[torch.dtype]) -> None:
    """TypeError unless the tensor has one of the allowed dtypes."""
    if tensor.dtype not in allowed:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise TypeError(f"{name}: expected dtype {names}, got {str(tensor.dtype).removeprefix('torch.')}")


def check_tensor(name: str, tensor: Any, device: torch.device) -> None:
    """TypeError unless it is a tensor, ValueError unless it is where the others are."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected the device of the other tensors, {device}, got {tensor.device}")


def check_float(name: str, tensor: Tensor, hint: str = "") -> None:
    """TypeError unless the dtype is one of the floats."""
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected a float dtype, got {tensor.dtype}{hint}")


def check_like(name: str, tensor: Tensor, model_name: str, model: Tensor) -> None:
    """The dtype and device of ``tensor`` must be those of ``model``."""
    if tensor.dtype != model.dtype:
        raise TypeError(f"{name}: expected the dtype of {model_name}, {model.dtype}, got {tensor.dtype}")
    if tensor.device != model.device:
        raise ValueError(f"{name}: expected the device of {model_name}, {model.device}, got {tensor.device}")


def check_range(name: str, value: float, low: float, high: float) -> None:
    """ValueError unless low <= value <= high (NaN is never inside)."""
    if not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name}: expected a value in [{low}, {high}], got {value}")


def check_integer(name: str, value: int, low: float, high: float) -> None:
    """The same of a whole number."""
    if not isinstance(value, Integral):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    check_range(name, value, low, high)


def check_broadcast(name: str, tensor: Tensor, target: tuple[int, ...]) -> None:
    """ValueError unless ``tensor`` broadcasts to ``target``."""
    shape = tuple(tensor.shape)
    fits = len(shape) <= len(target) and all(n in (1, m) for n, m in zip(shape[::-1], target[::-1]))
    if not fits:
        raise ValueError(f"{name}: expected a shape that broadcasts to {target}, got {tuple(tensor.shape)}")


def check_pages(table: Tensor, lengths: Tensor, pages: Tensor, tracing: bool) -> Tensor:
    """A block table (batch, max_blocks) int32 that holds ``lengths`` (batch,) tokens.

    Args:
        pages: (num_blocks, page_size, ...), what the table points into.
        tracing: do not look at values.

    Returns:
        The table, with unit stride.
    """
    Shapes(batch=lengths.shape[0]).match("block_table", table, "batch max_blocks")
    check_tensor("block_table", table, pages.device)
    check_dtype("block_table", table, (torch.int32,))
    num_blocks, page_size = pages.shape[:2]
    if page_size == 0:
        raise ValueError("block_table: expected pages of at least 1 token, got page_size=0")
    if not tracing and lengths.shape[0]:
        room, longest = table.shape[1] * page_size, int(lengths.max())
        if room < longest:
            raise ValueError(
                f"block_table: expected room for {longest} tokens, got max_blocks={table.shape[1]} pages of {page_size}"
            )
        in_use = torch.arange(table.shape[1]) < -(-lengths // page_size)[:, None]  # (batch, max_blocks)
        used = table[in_use]
        if used.numel() and not (int(used.min()) >= 0 and int(used.max()) < num_blocks):
            wrong = used[(used < 0) | (used >= num_blocks)][0]
            raise ValueError(f"block_table: expected pages in [0, {num_blocks}), got {int(wrong)}")
    return table if table.stride(-1) == 1 or table.shape[1] <= 1 else table.contiguous()
