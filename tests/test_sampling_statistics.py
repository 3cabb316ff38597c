"""What fastattn.sample draws, by G-test: a million tokens for each combination of its parameters; and whose noise."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import sampling_oracle as oracle
import torch
from scipy.stats import chi2_contingency
from torch import Tensor

import fastattn

VOCAB, DRAWS = 24, 1_000_000
SEEDS = (1, 2**40, -(2**60))  # where a million consecutive ones begin

rng = np.random.default_rng(6)
LOGITS = rng.permutation(np.linspace(-2.0, 2.5, VOCAB)).astype(np.float32)
LOGITS[[3, 9, 20]] = LOGITS[14]  # ties
LOGITS[5] = -math.inf
COUNTS = np.where(rng.random(VOCAB) < 0.4, rng.integers(1, 5, VOCAB), 0)
PROMPT = rng.random(VOCAB) < 0.3
BIAS = np.float32(rng.normal(size=VOCAB) * (rng.random(VOCAB) < 0.5))
ALLOWED = rng.random(VOCAB) < 0.7

FILTERS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.8},
    "top_k": {"top_k": 15},
    "top_p": {"top_p": 0.9},
    "min_p": {"min_p": 0.06},
}
# Keywords of fastattn.sample, and of the oracle.
EDITS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "repetition": (
        {"repetition_penalty": 1.3},
        {"repetition": 1.3, "counts": COUNTS, "prompt": PROMPT},
    ),
    "presence": ({"presence_penalty": 0.5}, {"presence": 0.5, "counts": COUNTS, "prompt": PROMPT}),
    "frequency": ({"frequency_penalty": 0.2}, {"frequency": 0.2, "counts": COUNTS, "prompt": PROMPT}),
    "bias": ({"logit_bias": torch.from_numpy(BIAS)}, {"bias": BIAS}),
    "allowed": ({"allowed": torch.from_numpy(ALLOWED)}, {"allowed": ALLOWED}),
}
SEEN = {"token_counts": torch.from_numpy(COUNTS), "prompt_mask": torch.from_numpy(PROMPT)}


def subsets(names: Any) -> list[tuple[str, ...]]:
    return [c for n in range(len(names) + 1) for c in itertools.combinations(names, n)]


# Every combination of the filters, without edits and with all of them; with all filters and with none, each edit.
COMBINATIONS = [(chosen, edits) for chosen in subsets(FILTERS) for edits in ((), tuple(EDITS))]
COMBINATIONS += [(chosen, edits) for chosen in ((), tuple(FILTERS)) for edits in zip(EDITS)]


def draw(count: int, first_seed: int, filters: Any, edits: Any) -> Tensor:
    call: dict[str, Any] = {"seeds": torch.arange(count) + first_seed}
    for name in filters:
        call |= FILTERS[name]
    for name in edits:
        call |= EDITS[name][0]
    if any("counts" in EDITS[name][1] for name in edits):
        call |= SEEN
    return fastattn.sample(torch.from_numpy(LOGITS).expand(count, VOCAB), **call)


def expected(filters: Any, edits: Any) -> np.ndarray:
    theirs: dict[str, Any] = {}
    for name in edits:
        theirs |= EDITS[name][1]
    changes: dict[str, Any] = {}
    for name in filters:
        changes |= FILTERS[name]
    return oracle.probabilities(oracle.edited(LOGITS, **theirs), **changes)


def without(names: tuple[str, ...], name: str) -> tuple[str, ...]:
    return tuple(other for other in names if other != name)


def test_every_parameter_matters() -> None:
    """None is tested by being absent: each changes the distribution alone, and in company.

    Of the filters, which all keep a prefix, only the shortest shows: each is that of some combination of three.
    """
    for name in FILTERS:
        assert not np.allclose(expected((name,), ()), expected((), ())), name
        company = [c for c in subsets(FILTERS) if len(c) == 3 and name in c]
        assert any(not np.allclose(expected(c, ()), expected(without(c, name), ())) for c in company), name
    for name in EDITS:
        for edits in ((name,), tuple(EDITS)):
            assert not np.allclose(expected((), edits), expected((), without(edits, name))), name


RUNS = [(*combination, seed) for combination in COMBINATIONS for seed in SEEDS]


@pytest.mark.parametrize(
    ("filters", "edits", "first_seed"), RUNS, ids=[f"{'+'.join((*f, *e)) or 'plain'}-{s}" for f, e, s in RUNS]
)
def test_frequencies(filters: tuple[str, ...], edits: tuple[str, ...], first_seed: int) -> None:
    tokens = draw(DRAWS, first_seed, filters, edits).numpy()
    assert oracle.g_test(tokens, expected(filters, edits)) > 0.001


# ---- noise


@pytest.mark.parametrize("by", ["seeds", "positions"])
def test_noise_of_different_tokens_is_independent(by: str) -> None:
    """The best, then the best of the others, then of the rest: an order drawn like balls from an urn (Plackett, Luce).

    Eight ids that are neighbours, or share a Philox block of words or of bytes, or do not.
    """
    weights = np.array([3.0, 1.0, 2.0, 1.0, 1.0, 2.5, 1.0, 0.5])
    logits = torch.full((41,), -math.inf)
    ids = torch.tensor([0, 1, 5, 15, 16, 17, 21, 40])
    logits[ids] = torch.from_numpy(np.log(weights).astype(np.float32))
    logits = logits.expand(DRAWS, 41).clone()
    stream: dict[str, Any] = {"seeds": 11, "positions": 5} | {by: torch.arange(DRAWS)}
    places = []
    for _ in range(3):
        best = fastattn.sample(logits, **stream)
        logits.scatter_(1, best[:, None], -math.inf)
        places.append(torch.searchsorted(ids, best))
    share = np.zeros((8, 8, 8))
    for a, b, c in itertools.permutations(range(8), 3):
        left = weights.sum() - np.cumsum([0.0, weights[a], weights[b]])
        share[a, b, c] = np.prod(weights[[a, b, c]] / left)
    orders = (places[0] * 64 + places[1] * 8 + places[2]).numpy()
    assert oracle.g_test(orders, share.flatten()) > 0.001


@pytest.mark.parametrize("filters", [(), ("temperature", "top_k", "top_p")])
def test_draws_of_a_grid_of_streams_are_independent(filters: tuple[str, ...]) -> None:
    """600 seeds by 600 positions: each draw beside its neighbours in every direction, diagonals too."""
    side = 600
    call: dict[str, Any] = {}
    for name in filters:
        call |= FILTERS[name]
    logits = torch.linspace(0, 1.5, 9).expand(side * side, 9)
    seeds = torch.arange(side).repeat_interleave(side) + 100
    tokens = fastattn.sample(logits, seeds=seeds, positions=torch.arange(side).repeat(side), **call)
    grid = tokens.reshape(side, side).numpy()
    kinds, grid = np.unique(grid, return_inverse=True)
    grid = grid.reshape(side, side)
    for down, right in ((0, 1), (1, 0), (1, 1), (1, -1), (0, 4), (4, 0)):
        left = grid[: side - down, max(0, -right) : side - max(0, right)]
        beside = grid[down:, max(0, right) : side + min(0, right)]
        pairs = np.zeros((len(kinds), len(kinds)))
        np.add.at(pairs, (left.ravel(), beside.ravel()), 1)
        assert chi2_contingency(pairs).pvalue > 0.001, (down, right)


def test_rows_do_not_share_what_they_should_not() -> None:
    """One distribution, drawn with seeds that differ in one bit each, high and low: no two agree by more than chance."""
    logits = torch.zeros(64, 4096)
    seeds = torch.tensor([1 << bit if bit < 63 else -(2**63) for bit in range(64)])
    positions = torch.tensor([1 << bit if bit < 63 else 3 for bit in range(64)])
    by_seed = fastattn.sample(logits, seeds=seeds)
    by_position = fastattn.sample(logits, seeds=0, positions=positions)
    tokens = torch.cat([by_seed, by_position, fastattn.sample(logits[:1], seeds=0)])
    assert len(tokens.unique()) > 120  # of 129; by chance about 127


def test_invariance_with_every_parameter(isa: str, threads: None) -> None:
    """Tokens with all filters and edits, per row: bit-equal in any order, alone, on any number of threads."""
    batch, vocab = 20, 5003
    g = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(batch, vocab, generator=g)
    call: dict[str, Tensor] = {
        "temperature": 0.5 + torch.rand(batch, generator=g), "top_k": torch.randint(-1, 200, (batch,), generator=g),
        "top_p": 0.5 + 0.5 * torch.rand(batch, generator=g), "min_p": 0.05 * torch.rand(batch, generator=g),
        "repetition_penalty": 1 + torch.rand(batch, generator=g), "presence_penalty": torch.rand(batch, generator=g),
        "frequency_penalty": torch.rand(batch, generator=g), "logit_bias": torch.randn(batch, vocab, generator=g),
        "allowed": torch.rand(batch, vocab, generator=g) < 0.7, "seeds": torch.arange(batch) * 977,
        "token_counts": torch.poisson(0.2 * torch.ones(batch, vocab), generator=g).int(),
        "prompt_mask": torch.rand(batch, vocab, generator=g) < 0.1, "positions": torch.arange(batch),
    }  # fmt: skip
    for off in ("top_k", "top_p", "min_p"):
        call[off][::3] = {"top_k": 0, "top_p": 1, "min_p": 0}[off]
    tokens = fastattn.sample(logits, **call)
    assert torch.equal(tokens, fastattn.sample(logits, **call, backend="reference"))
    assert len(tokens.unique()) > 15
    order = torch.randperm(batch, generator=g)
    shuffled = fastattn.sample(logits[order], **{name: value[order] for name, value in call.items()})
    assert torch.equal(shuffled, tokens[order])
    for nthreads in (1, 2, 3):
        torch.set_num_threads(nthreads)
        assert torch.equal(fastattn.sample(logits, **call), tokens)
    for row in range(batch):
        alone = {name: value[row : row + 1] for name, value in call.items()}
        assert int(fastattn.sample(logits[row : row + 1], **alone)) == int(tokens[row])
