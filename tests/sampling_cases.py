"""Calls of ``fastattn.sample`` that every kernel is held to: filters, and batches with everything that edits can say."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import sampling_oracle as oracle
import torch
from torch import Tensor

from fastattn import TokenCounts
from fastattn.args import SamplingArgs
from fastattn.sampling_checks import logit_edits

INF = math.inf
PARAMETERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "greedy": {"temperature": 0.0},
    "uniform": {"temperature": INF},
    "cold": {"temperature": 1e-30},
    "top_k": {"top_k": 7},
    "top_k 1": {"top_k": 1},
    "top_k half": {"top_k": 101},
    "top_p": {"top_p": 0.8},
    "top_p 0": {"top_p": 0.0},
    "top_p nearly 1": {"top_p": 1.0 - 1e-9, "temperature": 0.3},
    "min_p": {"min_p": 0.2},
    "all": {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
}
# Where exponents, differences and the smallest floats are at their ends.
EXTREME_LOGITS = torch.tensor([[3.4e38, -3.4e38, 1.0], [-3.4e38, -3.4e38, -3.3e38], [1e-45, 0.0, -1e-45]])
EXTREME_PARAMETERS: list[dict[str, Any]] = [
    {},
    {"top_p": 0.5},
    {"min_p": 0.5},
    {"temperature": 1e-38},
    {"temperature": 1e30, "top_k": 2},
]
WHICH = ["p", "b", "a", "pb", "pa", "ba", "pba"]  # penalties, bias, allowed


def filter_combinations() -> Iterator[dict[str, Any]]:
    """Greedy, and every subset of the filters."""
    yield {"temperature": 0.0}
    filters = {"top_k": 25, "top_p": 0.85, "min_p": 0.02}
    for n in range(len(filters) + 1):
        for names in itertools.combinations(filters, n):
            yield {"temperature": 1.3} | {name: filters[name] for name in names}


def sampling_args(logits: Tensor, **parameters: Any) -> SamplingArgs:
    """Everything off but what is given; edits by the names that ``fastattn.sample`` has for them."""
    off = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seeds": 0, "positions": 0}
    of_args = {name: parameters.pop(name) for name in SamplingArgs._fields if name in parameters}
    if parameters:
        of_args["edits"] = checked_edits(logits, **parameters)
    return SamplingArgs(logits, **(off | of_args))


def checked_edits(
    logits: Tensor,
    logit_bias: Any = None,
    allowed: Tensor | None = None,
    repetition_penalty: float | Tensor = 1.0,
    presence_penalty: float | Tensor = 0.0,
    frequency_penalty: float | Tensor = 0.0,
    token_counts: Any = None,
    prompt_mask: Tensor | None = None,
) -> Any:
    """The edits as backends take them."""
    penalties = (repetition_penalty, presence_penalty, frequency_penalty)
    return logit_edits(logits, logit_bias, allowed, penalties, token_counts, prompt_mask)


def packed(mask: np.ndarray) -> Tensor:
    """(batch, vocab) bool as (batch, ceil(vocab / 32)) int32."""
    words = np.zeros((len(mask), -(-mask.shape[1] // 32) * 32), dtype=bool)
    words[:, : mask.shape[1]] = mask
    return torch.from_numpy(np.packbits(words, axis=1, bitorder="little").view(np.int32))


class Case:
    """A batch with everything that can be said about its tokens, from one seed; with ``plain`` of its last row nothing."""

    def __init__(self, seed: int, vocab: int, batch: int = 3, *, plain: bool = False) -> None:
        rng = np.random.default_rng(seed)
        self.shape = (batch, vocab)
        self.logits = torch.from_numpy((3 * rng.standard_normal(self.shape)).astype(np.float32))
        self.logits[torch.from_numpy(rng.random(self.shape) < 0.1)] = -INF
        seen = min(vocab, 60)
        self.prompts = [rng.integers(0, vocab, rng.integers(0, seen + 1)).tolist() for _ in range(batch)]
        self.written = rng.integers(0, vocab, (batch, seen))  # (batch, steps), -1 = none
        self.written[:, seen // 2 :] = self.written[:, : seen - seen // 2]  # some more than once
        self.ids = rng.integers(-1, vocab, (batch, 40))  # (batch, n), some twice
        self.values = np.float32(4 * rng.standard_normal(self.ids.shape))
        self.values[:, ::9] = -INF
        self.allowed = rng.random(self.shape) < 0.7
        best = self.logits.argmax(1).numpy()
        for row in range(batch):  # something is left
            self.logits[row, best[row]] = self.logits[row, best[row]].clamp(min=-9.0)
            self.allowed[row, best[row]] = True
            self.ids[row][self.ids[row] == best[row]] = -1
        if plain:
            self.prompts[-1], self.written[-1], self.ids[-1], self.allowed[-1] = [], -1, -1, True
        self.counts = np.stack([np.bincount(row[row >= 0], minlength=vocab) for row in self.written])
        self.prompt = np.zeros(self.shape, dtype=bool)
        self.bias = np.zeros(self.shape)
        for row in range(batch):
            self.prompt[row][self.prompts[row]] = True
            for i, value in zip(self.ids[row], self.values[row]):
                self.bias[row, i] += value if i >= 0 else 0.0

    def seen(self, form: str) -> dict[str, Any]:
        if form == "dense":
            return {
                "token_counts": torch.from_numpy(self.counts),
                "prompt_mask": torch.from_numpy(self.prompt),
            }
        counts = TokenCounts(self.prompts, self.shape[1])
        for step in range(self.written.shape[1]):
            counts.add(torch.from_numpy(self.written[:, step]))
        return {"token_counts": counts}

    def logit_bias(self, form: str) -> Any:
        if form == "dense":
            return torch.from_numpy(self.bias).float()
        return torch.from_numpy(self.ids), torch.from_numpy(self.values)

    def mask(self, form: str) -> Tensor:
        return torch.from_numpy(self.allowed) if form == "dense" else packed(self.allowed)

    def edits(self, which: str, form: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Keywords of fastattn.sample, and of the oracle with a leading row axis."""
        ours: dict[str, Any] = {}
        theirs: dict[str, Any] = {}
        if "p" in which:
            ours |= {"repetition_penalty": 1.3, "presence_penalty": 0.7, "frequency_penalty": 0.3}
            ours |= self.seen(form)
            theirs |= {"counts": self.counts, "prompt": self.prompt}
        if "b" in which:
            ours["logit_bias"] = self.logit_bias(form)
            theirs["bias"] = self.bias
        if "a" in which:
            ours["allowed"] = self.mask(form)
            theirs["allowed"] = self.allowed
        return ours, theirs

    def edited(self, theirs: dict[str, Any], logits: Tensor | None = None) -> Tensor:
        """(batch, vocab) float32, by the oracle."""
        numbers = {"repetition": 1.3, "presence": 0.7, "frequency": 0.3} if "counts" in theirs else {}
        rows = (self.logits if logits is None else logits).float().numpy()
        return torch.from_numpy(
            np.stack(
                [
                    oracle.edited(x, **{k: v[n] for k, v in theirs.items()}, **numbers)
                    for n, x in enumerate(rows)
                ]
            )
        )


def rows_that_edits_break(vocab: int) -> SamplingArgs:
    """NaN and +inf after the edits, nothing left, two ids that are none, NaN that is not allowed; then two sound rows.

    The first of the two has +inf that is not allowed.
    """
    logits = torch.randn(8, vocab)
    ids, values = torch.full((8, 3), -1), torch.zeros(8, 3)
    allowed = torch.ones(8, vocab).bool()
    ids[0, 1], values[0, 1] = vocab - 1, math.nan
    ids[1, 0], values[1, 0] = 17, INF
    allowed[2] = False
    ids[3, 2], ids[4, 0] = vocab, -2
    logits[5, 3], allowed[5, 3] = math.nan, False
    logits[6, 4], allowed[6, 4] = INF, False
    return sampling_args(logits, seeds=1, logit_bias=(ids, values), allowed=allowed)


def rows_without_a_softmax(vocab: int) -> SamplingArgs:
    """NaN, +inf that is not allowed, nothing finite; then a row that edits empty, which has one, and a sound one."""
    logits = torch.randn(5, vocab)
    logits[0, 3], logits[1, 4], logits[2] = math.nan, INF, -INF
    allowed = torch.ones(5, vocab).bool()
    allowed[1, 4], allowed[3] = False, False
    return sampling_args(logits, seeds=1, allowed=allowed, logprobs=2)
