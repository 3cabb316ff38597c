"""What sampling keeps, in numpy and extended precision, one row at a time; shares no code with fastattn."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

# Two masses, as fractions of the row's, that are closer than this are equal to float64 arithmetic.
ROUNDING = 1e-11


def edited(
    logits: np.ndarray,
    counts: np.ndarray | None = None,
    prompt: np.ndarray | None = None,
    repetition: float = 1.0,
    presence: float = 0.0,
    frequency: float = 0.0,
    bias: np.ndarray | None = None,
    allowed: np.ndarray | None = None,
) -> np.ndarray:
    """(vocab,) float32 logits after penalties, bias and mask: double arithmetic, one rounding, token by token."""
    out = np.empty(len(logits), dtype=np.float32)
    for i, logit in enumerate(logits):
        x = float(logit)
        written = int(counts[i]) if counts is not None else 0
        if written > 0 or (prompt is not None and prompt[i]):
            x = x * (1.0 / repetition if x > 0.0 else repetition)
        if written > 0:
            x = x - frequency * written
            x = x - presence
        if bias is not None:
            x = x + float(bias[i])
        out[i] = np.float32(x) if allowed is None or allowed[i] else -math.inf
    return out


@dataclass(frozen=True)
class Kept:
    """A prefix of the total order, whose length may be any of a few where masses tie within rounding."""

    order: np.ndarray  # ids, the best first
    shortest: int
    longest: int

    def accepts(self, mask: np.ndarray) -> bool:
        n = int(mask.sum())
        return self.shortest <= n <= self.longest and bool(mask[self.order[:n]].all())


def kept(
    logits: np.ndarray, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Kept:
    x = np.asarray(logits, dtype=np.longdouble)
    finite = np.flatnonzero(np.isfinite(x))
    order = np.array(sorted(finite, key=lambda i: (-x[i], i)), dtype=np.int64)
    if temperature == 0.0:
        return Kept(order, 1, 1)
    odds = np.exp((x[order] - x[order[0]]) / np.longdouble(temperature))
    limit = len(order) if top_k <= 0 else min(top_k, len(order))

    def shortest_prefix(p: float) -> int:
        total = np.cumsum(odds[:limit])
        reached = np.flatnonzero(total >= np.longdouble(p) * total[-1])
        return int(reached[0]) + 1 if len(reached) else limit

    low = high = limit
    if top_p < 1.0:
        low, high = shortest_prefix(top_p - ROUNDING), shortest_prefix(top_p + ROUNDING)
    if min_p > 0.0:
        low = min(low, int((odds >= min_p * (1 + ROUNDING)).sum()) or 1)
        high = min(high, int((odds >= min_p * (1 - ROUNDING)).sum()))
    return Kept(order, low, high)


def probabilities(logits: np.ndarray, **filters: float) -> np.ndarray:
    """(vocab,) float64: what each token's share of the draws must be."""
    which = kept(logits, **filters)
    assert which.shortest == which.longest, "choose a row whose kept set is not a matter of rounding"
    ids = which.order[: which.longest]
    x = np.asarray(logits, dtype=np.longdouble)
    weights = np.zeros(len(x), dtype=np.longdouble)
    weights[ids] = np.exp((x[ids] - x[ids[0]]) / np.longdouble(filters.get("temperature", 1.0)))
    return np.asarray(weights / weights.sum(), dtype=np.float64)


def g_test(tokens: np.ndarray, expected: np.ndarray) -> float:
    """p-value of the tokens under the expected probabilities; rare tokens are pooled to >= 5 draws."""
    from scipy.stats import power_divergence

    counts = np.bincount(tokens, minlength=len(expected)).astype(np.float64)
    assert not counts[expected == 0.0].any(), "a token outside the kept set was drawn"
    wanted = expected * len(tokens)
    common = wanted >= 5.0
    observed, means = list(counts[common]), list(wanted[common])
    rare = np.flatnonzero(~common & (wanted > 0.0))
    pools = np.floor(np.cumsum(wanted[rare]) / 10.0) if len(rare) else np.array([])
    for pool in np.unique(pools):
        members = rare[pools == pool]
        observed.append(counts[members].sum())
        means.append(wanted[members].sum())
    while len(means) > 1 and means[-1] < 5.0:  # the last pool may be too small for itself
        small, mean = observed.pop(), means.pop()
        observed[-1] += small
        means[-1] += mean
    if len(means) == 1:
        return 1.0
    scale = math.fsum(observed) / math.fsum(means)
    return float(power_divergence(observed, np.array(means) * scale, lambda_="log-likelihood").pvalue)
