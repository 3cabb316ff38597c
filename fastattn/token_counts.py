"""Which tokens a row has seen, as penalties need it: a list per row, in memory and time of the tokens seen."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastattn.backends.cpu_sampling import count_tokens
from fastattn.checks import Shapes

_NOTHING = 2**31 - 1  # fills the ids behind a row's last: they stay ascending


class TokenCounts:
    """What each row of a batch has read and written so far.

    Where a dense (batch, vocab) tensor of counts must be read in full at every step, this is read, updated and stored
    in proportion to the distinct tokens seen, and a bit for each token of the vocabulary. ``fastattn.sample`` takes
    either as ``token_counts``.

    Args:
        prompts: the prompt's token ids of each row, or the number of rows, whose prompts are then empty.
        vocab: every id is below it.
        device: where the lists are; that of the logits.

    Attributes:
        ids: (batch, capacity) int32, the distinct tokens of each row, ascending; then padding.
        counts: (batch, capacity) int32, how often each was drawn; 0 = it is only in the prompt.
        lengths: (batch,) int32, how many of a row's entries are in use.
        unseen: (batch, 8 ceil(vocab / 64)) uint8, bit id % 8 of byte id // 8 is 0 for the tokens in the list, else 1.

    Raises:
        TypeError, ValueError: ids outside [0, vocab).
    """

    def __init__(
        self, prompts: int | Sequence[Sequence[int]], vocab: int, *, device: torch.device | str = "cpu"
    ) -> None:
        if not 1 <= vocab <= _NOTHING:
            raise ValueError(f"vocab: expected a number in [1, {_NOTHING}], got {vocab}")
        rows = [[] for _ in range(prompts)] if isinstance(prompts, int) else [sorted(set(p)) for p in prompts]
        for n, row in enumerate(rows):
            if row and not 0 <= row[0] <= row[-1] < vocab:
                wrong = row[0] if row[0] < 0 else row[-1]
                raise ValueError(f"prompts[{n}]: expected ids in [0, {vocab}), got {wrong}")
        self.vocab = vocab
        self._longest = max(map(len, rows), default=0)
        capacity = _room(self._longest)
        padded = [row + [_NOTHING] * (capacity - len(row)) for row in rows]
        self.ids = torch.tensor(padded, dtype=torch.int32, device=device).reshape(len(rows), capacity)
        self.counts = torch.zeros_like(self.ids)
        self.lengths = torch.tensor([len(row) for row in rows], dtype=torch.int32, device=device)
        self.unseen = _unseen(rows, vocab).to(device)

    @property
    def batch(self) -> int:
        """Rows."""
        return self.ids.shape[0]

    def add(self, tokens: Tensor) -> None:
        """Count one more drawn token per row.

        Args:
            tokens: (batch,) integers below vocab; a negative one leaves its row as it is.

        Raises:
            ValueError: another shape, or an id that is too large.
        """
        Shapes(batch=self.batch).match("tokens", tokens, "batch")
        if self.batch == 0:
            return
        largest = int(tokens.max())
        if largest >= self.vocab:
            raise ValueError(f"tokens: expected ids below {self.vocab}, got {largest}")
        self._longest += 1  # at most
        if self._longest >= self.ids.shape[1]:
            self._longest = int(self.lengths.max()) + 1
        if self._longest >= self.ids.shape[1]:
            self._grow()
        tokens = tokens.to(torch.int64)
        if not count_tokens(self.ids, self.counts, self.lengths, self.unseen, tokens):
            self._insert(tokens.to(torch.int32)[:, None])

    def _insert(self, token: Tensor) -> None:
        """``add`` on any device, token (batch, 1) int32."""
        at = torch.searchsorted(self.ids, token)  # (batch, 1)
        drawn = token >= 0
        new = drawn & (self.ids.gather(1, at) != token)
        behind = new & (torch.arange(self.ids.shape[1], device=at.device) > at)  # (batch, capacity)
        self.ids = torch.where(behind, self.ids.roll(1, 1), self.ids)
        self.counts = torch.where(behind, self.counts.roll(1, 1), self.counts)
        self.ids.scatter_(1, at, torch.where(drawn, token, self.ids.gather(1, at)))
        before = torch.where(new, 0, self.counts.gather(1, at))
        self.counts.scatter_(1, at, before + drawn.to(torch.int32))
        self.lengths += new[:, 0]
        byte = (token.clamp(min=0) // 8).long()  # (batch, 1)
        bits = self.unseen.gather(1, byte)
        bit = torch.where(drawn, 1 << token % 8, 0).to(torch.uint8)
        self.unseen.scatter_(1, byte, bits & ~bit)

    def select(self, rows: Sequence[int] | Tensor) -> None:
        """Keep these rows of the batch, in this order."""
        index = torch.as_tensor(rows, dtype=torch.int64, device=self.ids.device)
        self.ids, self.counts, self.lengths = self.ids[index], self.counts[index], self.lengths[index]
        self.unseen = self.unseen[index]

    def dense(self) -> tuple[Tensor, Tensor]:
        """The same as full tensors: counts (batch, vocab) int32 of the drawn tokens, and (batch, vocab) bool, seen."""
        in_use = torch.arange(self.ids.shape[1], device=self.ids.device) < self.lengths[:, None]
        ids = torch.where(in_use, self.ids, self.vocab).long()  # (batch, capacity)
        counts = self.counts.new_zeros(self.batch, self.vocab + 1).scatter_(1, ids, self.counts)
        seen = torch.zeros_like(counts, dtype=torch.bool).scatter_(1, ids, True)
        return counts[:, :-1], seen[:, :-1]

    def _grow(self) -> None:
        more = (self.batch, _room(self.ids.shape[1]) - self.ids.shape[1])
        self.ids = torch.cat([self.ids, self.ids.new_full(more, _NOTHING)], 1)
        self.counts = torch.cat([self.counts, self.counts.new_zeros(more)], 1)


def _room(entries: int) -> int:
    return max(64, 2 * entries)


def _unseen(rows: list[list[int]], vocab: int) -> Tensor:
    """``TokenCounts.unseen`` of these lists."""
    size = 8 * -(-vocab // 64)
    bits = bytearray(b"\xff") * (size * len(rows))
    for n, row in enumerate(rows):
        for token in row:
            bits[n * size + token // 8] &= ~(1 << token % 8)
    if not rows:
        return torch.empty(0, size, dtype=torch.uint8)
    return torch.frombuffer(bits, dtype=torch.uint8).reshape(len(rows), size)
