"""Keys and values of the tokens that a batch of sequences has been through."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.model.config import ModelConfig


class KVCache:
    """One k and one v per layer, and how many tokens of each row count.

    ``k[layer]`` and ``v[layer]`` are (batch, capacity, nheads_k, headdim) in the model's dtype; in memory a
    head's tokens lie next to each other, as attention reads them. ``seqlens`` is (batch,) int32. What lies
    past a row's length is uninitialised.

    Args:
        config: the model's sizes.
        batch: number of rows, >= 0.
        capacity: tokens per row, >= 0; ``reserve`` grows it.
        dtype: of k and v.

    Raises:
        ValueError: batch or capacity below 0, or capacity above ``config.max_seqlen``.
    """

    def __init__(self, config: ModelConfig, batch: int, capacity: int, dtype: torch.dtype) -> None:
        if batch < 0:
            raise ValueError(f"batch: expected at least 0, got {batch}")
        self.config = config
        self.dtype = dtype
        self.seqlens = torch.zeros(batch, dtype=torch.int32)  # (batch,)
        self.capacity = 0
        self.k = [self._allocate(batch, 0) for _ in range(config.nlayers)]
        self.v = [self._allocate(batch, 0) for _ in range(config.nlayers)]
        self._grow(capacity)

    @property
    def batch(self) -> int:
        """Number of rows."""
        return self.seqlens.shape[0]

    @property
    def nbytes(self) -> int:
        """Memory of k and v of all layers, in bytes."""
        return sum(x.numel() * x.element_size() for x in (*self.k, *self.v))

    def reserve(self, capacity: int) -> None:
        """Make room for ``capacity`` tokens per row, growing at least twofold: appending is amortised O(1).

        Raises:
            ValueError: more than ``config.max_seqlen``.
        """
        if capacity > self.capacity:
            self._grow(max(capacity, min(2 * self.capacity, self.config.max_seqlen)))

    def select(self, rows: list[int]) -> None:
        """Keep these rows, in this order; the others are dropped.

        Raises:
            ValueError: a row that is not in [0, batch).
        """
        for row in rows:
            if not 0 <= row < self.batch:
                raise ValueError(f"rows: expected values in [0, {self.batch}), got {row}")
        if rows == list(range(self.batch)):
            return
        index = torch.tensor(rows, dtype=torch.int64)  # (batch after,)
        self.seqlens = self.seqlens[index]
        used = int(self.seqlens.max()) if rows else 0
        for kind in (self.k, self.v):
            for layer, old in enumerate(kind):
                new = self._allocate(len(rows), self.capacity)
                new[:, :used] = old[index, :used]
                kind[layer] = new

    def _allocate(self, batch: int, capacity: int) -> Tensor:
        shape = (batch, self.config.nheads_k, capacity, self.config.headdim)
        return torch.empty(shape, dtype=self.dtype).transpose(1, 2)  # (batch, capacity, nheads_k, headdim)

    def _grow(self, capacity: int) -> None:
        if not 0 <= capacity <= self.config.max_seqlen:
            limit = f"max_seqlen={self.config.max_seqlen}"
            raise ValueError(f"capacity: expected 0 to {limit} tokens, got {capacity}")
        used = int(self.seqlens.max()) if self.batch else 0
        for kind in (self.k, self.v):
            for layer, old in enumerate(kind):
                new = self._allocate(self.batch, capacity)
                new[:, :used] = old[:, :used]
                kind[layer] = new
        self.capacity = capacity
