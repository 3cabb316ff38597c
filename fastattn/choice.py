"""How a generation draws its tokens: the options, and what its rows have seen, as ``fastattn.sample`` takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastattn.sampling import SampledTokens, sample
from fastattn.token_counts import TokenCounts

if TYPE_CHECKING:
    from fastattn.decoding import GenerationOptions, Row


class Choice:
    """How tokens are drawn: the options as ``fastattn.sample`` takes them, and what the rows have seen."""

    def __init__(self, options: GenerationOptions, rows: Sequence[Row], vocab: int) -> None:
        self._vocab = vocab
        self._counts = TokenCounts([row.prompt_ids for row in rows], vocab) if options.has_penalties else None
        self._allowed = options.allowed if callable(options.allowed) else None
        self._call: dict[str, Any] = {
            "temperature": options.temperature,
            "top_k": options.top_k,
            "top_p": options.top_p,
            "min_p": options.min_p,
            "return_logprobs": min(options.logprobs, vocab),
        }
        if self._counts is not None:
            self._call |= {
                "repetition_penalty": options.repetition_penalty,
                "presence_penalty": options.presence_penalty,
                "frequency_penalty": options.frequency_penalty,
                "token_counts": self._counts,
            }
        if options.logit_bias:
            ids, values = zip(*sorted(options.logit_bias.items()))
            self._call["logit_bias"] = (torch.tensor(ids), torch.tensor(values, dtype=torch.float32))
        if options.allowed is not None and self._allowed is None:
            self._call["allowed"] = self._mask_of(options.allowed)

    def draw(self, logits: Tensor, rows: Sequence[Row], seeds: Tensor, positions: Tensor) -> Tensor:
        """A token for each row, (batch,); log-probabilities go into the rows."""
        if self._allowed is not None:
            self._call["allowed"] = self._masks(rows)
        drawn: Tensor | SampledTokens = sample(logits, seeds=seeds, positions=positions, **self._call)
        if isinstance(drawn, Tensor):
            return drawn
        best = zip(drawn.top_ids.tolist(), drawn.top_logprobs.tolist())
        for row, logprob, (ids, logprobs) in zip(rows, drawn.logprobs.tolist(), best):
            row.logprobs.append(logprob)
            row.top_logprobs.append(list(zip(ids, logprobs)))
        return drawn.tokens

    def keep(self, rows: Sequence[int], tokens: Tensor) -> None:
        """Go on with these rows, which have drawn these tokens."""
        if self._counts is not None:
            if len(rows) < self._counts.batch:
                self._counts.select(rows)
            self._counts.add(tokens)

    def _mask_of(self, ids: Any) -> Tensor:
        mask = torch.zeros(self._vocab, dtype=torch.bool)
        mask[torch.tensor(list(ids), dtype=torch.int64)] = True
        return mask

    def _masks(self, rows: Sequence[Row]) -> Tensor | None:
        assert self._allowed is not None
        masks = [self._allowed(list(row.token_ids)) for row in rows]
        given = [mask for mask in masks if mask is not None]
        if not given:
            return None
        everything = (
            torch.ones_like(given[0]) if given[0].dtype == torch.bool else torch.full_like(given[0], -1)
        )
        return torch.stack(
            [everything if mask is None else mask for mask in masks]
        )  # (batch, vocab or words)
