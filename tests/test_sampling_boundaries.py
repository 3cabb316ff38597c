"""Kept sets exactly where they end: every k, every prefix mass and every ratio of rows that are full of ties."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fastattn.args import SamplingArgs
from fastattn.backends import cpu, reference

BACKENDS = {"cpu": cpu, "reference": reference}
EPS = 1e-9  # well above the kernels' rounding of masses, well below the mass of a token here


def make_row(kind: str) -> np.ndarray:
    """(vocab,) float32; every row has ties"""
    rng = np.random.default_rng(len(kind))
    if kind == "normal":
        x = rng.normal(size=120)
        x[rng.permutation(120)[:40]] = x[rng.permutation(120)[:40]]
    elif kind == "heavy-tailed":
        x = np.repeat(np.abs(rng.standard_cauchy(20)) % 9, 4)[rng.permutation(80)]
    elif kind == "bf16 grid":
        x = torch.from_numpy(2 * rng.normal(size=150)).bfloat16().double().numpy()
    elif kind == "constant":
        x = np.full(70, -3.5)
    elif kind == "two values":
        x = np.where(rng.random(90) < 0.5, 1.0, 0.0)
    else:
        x = np.where(rng.random(130) < 0.6, -math.inf, rng.integers(-2, 3, 130) / 2)
    return np.float32(x)


KINDS = ["normal", "heavy-tailed", "bf16 grid", "constant", "two values", "filled with -inf"]


def kept(backend: str, row: np.ndarray, **filters: Tensor) -> np.ndarray:
    """The kept sets of one row under a batch of values, (batch, vocab) bool."""
    batch = len(next(iter(filters.values())))
    off = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    args = SamplingArgs(torch.from_numpy(row).expand(batch, -1), **(off | filters), seeds=0, positions=0)
    return np.asarray(BACKENDS[backend].survivors(args))


class Order:
    """The total order of a row, and the mass of its prefixes, in extended precision."""

    def __init__(self, row: np.ndarray, temperature: float) -> None:
        finite = np.flatnonzero(row > -math.inf)
        self.ids = finite[np.lexsort((finite, -row[finite]))]
        x = row[self.ids].astype(np.longdouble)
        self.odds = np.exp((x - x[0]) / np.longdouble(temperature))
        self.mass = np.cumsum(self.odds) / self.odds.sum()

    def prefixes(self, masks: np.ndarray) -> list[int]:
        """The length of each mask, which must be a prefix."""
        lengths = masks.sum(1).tolist()
        for mask, n in zip(masks, lengths):
            assert set(np.flatnonzero(mask)) == set(self.ids[:n])
        return lengths


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_k(isa: str, backend: str, kind: str) -> None:
    row = make_row(kind)
    order, every = Order(row, 1.0), torch.arange(1, len(row) + 3)
    lengths = order.prefixes(kept(backend, row, top_k=every))
    assert lengths == [min(int(k), len(order.ids)) for k in every]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.5])
@pytest.mark.parametrize("kind", KINDS)
def test_every_prefix_mass(isa: str, backend: str, kind: str, temperature: float) -> None:
    """A hair less than the mass of n tokens takes n, a hair more takes the next as well."""
    row = make_row(kind)
    order = Order(row, temperature)
    mass = torch.from_numpy(order.mass[:-1].astype(np.float64))
    assert (order.odds / order.odds.sum()).min() > 4 * EPS
    warm = torch.full((len(mass),), temperature, dtype=torch.float64)
    for share, extra in ((mass * (1 - EPS), 0), (mass * (1 + EPS), 1)):
        lengths = order.prefixes(kept(backend, row, top_p=share, temperature=warm))
        assert lengths == [n + extra for n in range(1, len(order.ids))]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("vocab", [1, 2, 8, 64, 1024])
def test_masses_that_are_exact(isa: str, backend: str, vocab: int) -> None:
    """n equal tokens of a power of two have a mass that float64 holds: they reach it, and no token more is kept."""
    row = np.zeros(vocab, dtype=np.float32)
    share = torch.arange(1, vocab, dtype=torch.float64) / vocab
    if vocab > 1:
        assert kept(backend, row, top_p=share).sum(1).tolist() == list(range(1, vocab))
    assert kept(backend, row, top_p=torch.tensor([0.0, 1.0]).double()).sum(1).tolist() == [1, vocab]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.5])
@pytest.mark.parametrize("kind", KINDS)
def test_every_ratio(isa: str, backend: str, kind: str, temperature: float) -> None:
    """min_p a hair below a token's share of the best keeps it and all its equals, a hair above none of them."""
    row = make_row(kind)
    order = Order(row, temperature)
    odds = np.unique(order.odds.astype(np.float64))
    warm = torch.full((len(odds),), temperature, dtype=torch.float64)
    for factor in (1 - EPS, 1 + EPS):
        ratios = torch.from_numpy(odds * factor).clamp(max=1.0)
        expected = [int((order.odds >= np.longdouble(r)).sum()) for r in ratios.tolist()]
        assert order.prefixes(kept(backend, row, min_p=ratios, temperature=warm)) == expected


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_k_with_every_p(isa: str, backend: str, kind: str) -> None:
    """top_p acts on what top_k kept, renormalised; min_p on what is left: the shortest of the three prefixes."""
    row = make_row(kind)
    order = Order(row, 1.0)
    cases = [
        (k, p, r) for k in range(1, len(row) + 2, 3) for p in (0.25, 0.5, 0.8, 0.97) for r in (0.0, 0.21, 0.7)
    ]
    k, p, r = (torch.tensor(column) for column in zip(*cases))
    lengths = order.prefixes(kept(backend, row, top_k=k, top_p=p.double(), min_p=r.double()))
    pinned = 0
    for length, (top_k, top_p, min_p) in zip(lengths, cases):
        odds = order.odds[:top_k]
        share = np.cumsum(odds) / odds.sum()
        low, high = (int(np.searchsorted(share, top_p * s)) + 1 for s in (1 - EPS, 1 + EPS))
        within = int((order.odds >= min_p).sum())
        assert min(low, within) <= length <= min(high, within), (top_k, top_p, min_p)
        pinned += low == high
    assert pinned > 0.7 * len(cases)  # the others end exactly at a mass
