"""Keys and values of the tokens that a batch of sequences has been through.

Layers with a window keep no more than the window asks for. Their memory is a ring of pages: page ``n`` of a row
lies where page ``n - ring`` was, and a block table says so to the kernels, so that positions, masks and the
order of the arithmetic are those of an endless cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.model.config import ModelConfig

MAX_PAGE = 64  # tokens; the attention kernels' block of keys
MAX_PIECE = 256  # tokens; long prompts pass through a ring in pieces


class Ring:
    """The sizes of a windowed layer's memory.

    Args:
        window: tokens that one sees, itself included, >= 1.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self.page = min(MAX_PAGE, 1 << (window - 1).bit_length())  # tokens
        self.piece = min(window, MAX_PIECE)  # new tokens that are appended before they attend, at most
        # A token lies where the one before it by so many pages was; the first of a piece looks back by window - 1.
        self.pages = -(-(window - 1 + self.piece) // self.page)  # per row
        self.tokens = self.pages * self.page  # per row


def tokens_kept(config: ModelConfig, layer: int, seqlen: int) -> int:
    """How many tokens' memory this layer takes for a row of ``seqlen``: no more than its ring, in whole pages."""
    if layer not in config.local_layers:
        return seqlen
    ring = Ring(config.window)
    return min(-(-seqlen // ring.page) * ring.page, ring.tokens)


class KVCache:
    """One k and one v per layer, and how many tokens of each row count.

    ``k[layer]`` and ``v[layer]`` are (batch, capacity, nheads_k, headdim) in the model's dtype; in memory a
    head's tokens lie next to each other, as attention reads them. In layers with a window they are (batch, at
    most ``ring.tokens``, nheads_k, headdim), contiguous. ``seqlens`` is (batch,) int32. What lies past a row's
    length is uninitialised.

    Args:
        config: the model's sizes.
        batch: number of rows, >= 0.
        capacity: tokens per row, >= 0; ``reserve`` grows it.
        dtype: of k and v.

    Attributes:
        ring: of the layers with a window, or None.
        block_table: (batch, max_blocks) int32, the pages of each row in the layers with a window, once there may be
            more tokens than the ring holds; until then None, and token t lies at t.

    Raises:
        ValueError: batch or capacity below 0, or capacity above ``config.max_seqlen``.
    """

    def __init__(self, config: ModelConfig, batch: int, capacity: int, dtype: torch.dtype) -> None:
        if batch < 0:
            raise ValueError(f"batch: expected at least 0, got {batch}")
        self.config = config
        self.dtype = dtype
        self.ring = Ring(config.window) if config.local_layers else None
        self.block_table: Tensor | None = None
        self.seqlens = torch.zeros(batch, dtype=torch.int32)  # (batch,)
        self._written = self.seqlens  # (batch,) the most that each row has held
        self.capacity = 0
        self.k = [self._allocate(layer, batch, 0) for layer in range(config.nlayers)]
        self.v = [self._allocate(layer, batch, 0) for layer in range(config.nlayers)]
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

    def pages(self, seqlen: int) -> Tensor | None:
        """``block_table`` if rows of up to ``seqlen`` tokens need it; None where token t still lies at t."""
        rolls = self.ring is not None and seqlen > self.ring.tokens
        return self.block_table if rolls else None

    def advance(self, seqlens: list[int]) -> None:
        """The rows hold so many tokens now; they have been written."""
        self.seqlens = torch.tensor(seqlens, dtype=torch.int32)  # (batch,)
        self._written = torch.maximum(self._written, self.seqlens)  # (batch,)

    def rewind(self, seqlens: list[int]) -> list[int]:
        """Forget all but the first ``seqlens[row]`` tokens of each row.

        Returns:
            how many are kept, those or 0: where a window layer has overwritten what the next token would see, the
            row has to be read again.
        """
        kept = [self._rewound(*row) for row in zip(seqlens, self.seqlens.tolist(), self._written.tolist())]
        self.seqlens = torch.tensor(kept, dtype=torch.int32)  # (batch,)
        self._written = torch.where(self.seqlens > 0, self._written, 0)  # (batch,)
        return kept

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
        self.seqlens, self._written = self.seqlens[index], self._written[index]  # (batch after,)
        self._move(self.capacity, index)

    def _allocate(self, layer: int, batch: int, capacity: int) -> Tensor:
        heads, headdim = self.config.nheads_k, self.config.headdim
        tokens = tokens_kept(self.config, layer, capacity)
        if layer in self.config.local_layers:
            # Tokens outermost, so that the same memory is a row of tokens and a row of pages.
            return torch.empty(batch, tokens, heads, headdim, dtype=self.dtype)
        shape = (batch, heads, tokens, headdim)
        return torch.empty(shape, dtype=self.dtype).transpose(1, 2)  # (batch, capacity, nheads_k, headdim)

    def _grow(self, capacity: int) -> None:
        if not 0 <= capacity <= self.config.max_seqlen:
            limit = f"max_seqlen={self.config.max_seqlen}"
            raise ValueError(f"capacity: expected 0 to {limit} tokens, got {capacity}")
        self._move(capacity)

    def _move(self, capacity: int, index: Tensor | None = None) -> None:
        """Into memory for so many tokens per row, of all rows or those of ``index``."""
        used = int(self._written.max()) if self.batch else 0
        for kind in (self.k, self.v):
            for layer, old in enumerate(kind):
                new = self._allocate(layer, self.batch, capacity)
                # A full ring is of one size for ever, so that its pages keep their places.
                filled = min(used, old.shape[1])
                new[:, :filled] = old[:, :filled] if index is None else old[index, :filled]
                kind[layer] = new
        self.capacity = capacity
        if self.ring is not None and capacity > self.ring.tokens:
            pages = torch.arange(-(-capacity // self.ring.page)) % self.ring.pages  # (max_blocks,)
            first = torch.arange(self.batch)[:, None] * self.ring.pages  # (batch, 1)
            self.block_table = (first + pages).to(torch.int32)  # (batch, max_blocks)

    def _rewound(self, wanted: int, held: int, written: int) -> int:
        wanted = min(wanted, held)
        if self.ring is None:
            return wanted
        oldest = written - self.ring.tokens  # still there
        return wanted if oldest <= max(0, wanted - self.ring.window + 1) else 0
