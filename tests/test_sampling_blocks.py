"""fastattn.sampling's building blocks: exactly what they keep, how often they draw, whose noise, every error."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import sampling_oracle as oracle
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastattn
from fastattn import sampling

INF = math.inf
BACKENDS = ["cpu", "reference"]
ROUNDING = Fraction(
    2, 10**12
)  # a prefix that is short by this share of the row's mass may count as long enough


def total_order(row: list[float]) -> list[int]:
    """Ids, the best first."""
    return sorted(range(len(row)), key=lambda i: (-row[i], i))


def top_p_lengths(row: list[float], top_p: float) -> tuple[int, int]:
    """The shortest prefix with that share of the mass, in rational numbers: with rounding in its favour, without."""
    order, exact = total_order(row), [Fraction(p) for p in row]
    if top_p >= 1:
        positive = sum(p > 0 for p in row)
        return positive, positive
    lengths = []
    for share in (Fraction(top_p) * (1 - ROUNDING), Fraction(top_p)):
        target, mass, n = share * sum(exact), Fraction(0), 0
        while n == 0 or (mass < target and n < len(row)):
            mass += exact[order[n]]
            n += 1
        lengths.append(n)
    return lengths[0], lengths[1]


def kept_ids(renormalized: Tensor) -> list[set[int]]:
    return [set(row.nonzero()[:, 0].tolist()) for row in renormalized]


# ---- what is kept

# Few values, so that ties are everywhere; a row of its neighbours, which logarithms in float32 would merge.
masses = st.one_of(
    st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0, 3e-39, 1e-30]),
    st.integers(0, 40).map(lambda i: float(np.float32(1e-5) * np.float32(1 + i * 2**-23))),
    st.floats(0, 1, width=16),
    st.floats(2**-100, 1, width=32),  # not so small that renormalised it is zero
)
shares = st.one_of(st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.75, 0.9, 1.0]), st.floats(0, 1))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    row=st.lists(masses, min_size=1, max_size=30).filter(lambda row: max(row) > 0),
    repeat=st.integers(1, 12),
    top_k=st.integers(-1, 60),
    top_p=shares,
)
@example(row=[0.1] * 10, repeat=1, top_k=3, top_p=0.3)
@example(row=[1e-5 * (1 + i * 2**-23) for i in range(30)], repeat=12, top_k=7, top_p=0.5)
def test_renorm_of_any_row(isa: str, row: list[float], repeat: int, top_k: int, top_p: float) -> None:
    row = [float(np.float32(p)) for p in row] * repeat
    if max(row) == 0:  # float32 has smaller numbers than hypothesis thought
        row[0] = 1.0
    probs, order = torch.tensor([row]), total_order(row)

    kept = kept_ids(sampling.top_p_renorm_probs(probs, top_p))[0]
    low, high = top_p_lengths(row, top_p)
    assert low <= len(kept) <= high
    assert kept == set(order[: len(kept)])

    limit = len(row) if top_k <= 0 else min(top_k, len(row))
    expected = {i for i in order[:limit] if row[i] > 0}
    assert kept_ids(sampling.top_k_renorm_probs(probs, top_k))[0] == expected


KINDS = ["softmax", "heavy", "bf16 grid", "uniform", "two values", "ascending", "neighbours", "mostly zero"]


def make_probs(kind: str, vocab: int, batch: int = 2) -> Tensor:
    """(batch, vocab) float32"""
    g = torch.Generator().manual_seed(vocab)
    x = torch.randn(batch, vocab, generator=g)
    if kind == "softmax":
        return (3 * x).softmax(1)
    if kind == "heavy":
        return 1 / torch.rand(batch, vocab, generator=g).clamp(min=1e-6)
    if kind == "bf16 grid":
        return (3 * x).softmax(1).bfloat16().float()
    if kind == "uniform":
        return torch.full((batch, vocab), 1 / vocab)
    if kind == "two values":
        return torch.where(x > 0, 2.0, 1.0) / vocab
    if kind == "ascending":
        return (3 * x).softmax(1).sort(1).values
    if kind == "neighbours":  # each a float32 apart, in random order
        steps = torch.stack([torch.randperm(vocab, generator=g) for _ in range(batch)])
        return (torch.tensor(1e-5).view(torch.int32) + steps.int()).view(torch.float32)
    if kind == "mostly zero":
        return (3 * x).softmax(1) * (torch.rand(batch, vocab, generator=g) < 0.03)
    raise ValueError(kind)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_renorm_of_large_rows(backend: str, kind: str) -> None:
    probs = make_probs(kind, 20011)
    for top_p in (0.0, 0.3, 0.9, 0.999, 1.0):
        renormalized = sampling.top_p_renorm_probs(probs, top_p, backend=backend)
        for row, made in zip(probs.double().numpy(), renormalized.double().numpy()):
            order = np.lexsort((np.arange(len(row)), -row))
            n = int((made > 0).sum())
            mass = np.cumsum(row[order].astype(np.longdouble))
            assert set(np.flatnonzero(made)) == set(order[:n])
            if top_p == 1:
                assert n == (row > 0).sum()
            else:
                low, high = (
                    int(np.flatnonzero(mass >= share * mass[-1])[0]) + 1
                    for share in (top_p * (1 - float(ROUNDING)), np.longdouble(top_p))
                )
                assert low <= n <= high, top_p
            np.testing.assert_allclose(made[order[:n]], row[order[:n]] / float(mass[n - 1]), rtol=3e-7)
    for top_k in (1, 50, 5000, 0, -1, 10**6):
        kept = sampling.top_k_renorm_probs(probs, top_k, backend=backend) > 0
        for row, mask in zip(probs.numpy(), kept.numpy()):
            order = np.lexsort((np.arange(len(row)), -row))[: top_k if top_k > 0 else None]
            assert set(np.flatnonzero(mask)) == set(order[row[order] > 0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_known_vectors(backend: str) -> None:
    """llama.cpp's of tests/test-sampling.cpp; and FlashInfer's of pull request 3774, whose kernels kept three tokens."""
    probs = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    for made, wanted in (
        (sampling.top_p_renorm_probs(probs, 0.7, backend=backend), [0, 0, 0.428571, 0.571429]),
        (sampling.top_k_renorm_probs(probs, 3, backend=backend), [0, 0.22222, 0.33333, 0.44444]),
        (sampling.top_k_renorm_probs(probs, 1, backend=backend), [0, 0, 0, 1]),
        (
            sampling.top_k_renorm_probs(torch.tensor([[0.4, 0.3, 0.3, 0]]), 2, backend=backend),
            [4 / 7, 3 / 7, 0, 0],
        ),
    ):
        torch.testing.assert_close(made, torch.tensor([wanted]).float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mask(isa: str, backend: str, dtype: torch.dtype) -> None:
    logits = torch.randint(-3, 4, (4, 999), generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[1, ::2] = -INF
    logits[2] = 0.0
    logits[3, 5:] = -INF
    top_k = torch.tensor([10, 300, 998, 50])
    masked = sampling.top_k_mask_logits(logits, top_k, backend=backend)
    assert masked.dtype == dtype
    for row, made, k in zip(logits.double().numpy(), masked.double().numpy(), top_k.tolist()):
        order = [i for i in np.lexsort((np.arange(len(row)), -row)) if row[i] > -INF][:k]
        expected = np.full(len(row), -INF)
        expected[order] = row[order]
        assert np.array_equal(made, expected)
    assert (masked > -INF).sum(1).tolist() == [10, 300, 998, 5]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    probs = make_probs("softmax", 999).to(dtype)
    for made in (
        sampling.top_p_renorm_probs(probs, 0.8),
        sampling.top_k_renorm_probs(probs, 40),
    ):
        assert made.dtype == dtype
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(
            made.double().sum(1), torch.ones(2, dtype=torch.float64), rtol=0, atol=4 * eps
        )
    wide = sampling.top_p_renorm_probs(probs.double(), 0.8)
    assert torch.equal(sampling.top_p_renorm_probs(probs, 0.8) > 0, wide > 0)


def test_parameters_per_row() -> None:
    probs = make_probs("softmax", 3001, batch=5)
    top_p, top_k = torch.tensor([0.0, 0.5, 1.0, 0.9, 0.2]), torch.tensor([0, 1, 50, -1, 4000])
    renormalized, limited = (
        sampling.top_p_renorm_probs(probs, top_p),
        sampling.top_k_renorm_probs(probs, top_k),
    )
    for row in range(5):
        alone = probs[row : row + 1]
        assert torch.equal(sampling.top_p_renorm_probs(alone, float(top_p[row])), renormalized[row : row + 1])
        assert torch.equal(sampling.top_k_renorm_probs(alone, int(top_k[row])), limited[row : row + 1])


def test_any_stride() -> None:
    probs = make_probs("softmax", 500)
    padded = torch.full((2, 700), math.nan)
    padded[:, 100:600] = probs
    for x in (padded[:, 100:600], probs.t().contiguous().t()):
        assert torch.equal(sampling.top_p_renorm_probs(x, 0.7), sampling.top_p_renorm_probs(probs, 0.7))
        assert torch.equal(sampling.top_k_mask_logits(x, 9), sampling.top_k_mask_logits(probs, 9))
    one = sampling.top_p_renorm_probs(probs[:1], 0.7)
    assert torch.equal(sampling.top_p_renorm_probs(probs[:1].expand(3, -1), 0.7), one.expand(3, -1))


# ---- draws

VOCAB, DRAWS = 24, 1_000_000
LOGITS = torch.linspace(-2, 2, VOCAB)[torch.randperm(VOCAB, generator=torch.Generator().manual_seed(1))][None]
LOGITS[0, [3, 7]] = float(LOGITS[0, 11])  # a tie


def row_index(draws: int = DRAWS) -> Tensor:
    return torch.zeros(draws, dtype=torch.int64)


def test_top_k_first_frequencies() -> None:
    tokens = sampling.top_k_top_p_sampling_from_logits(LOGITS, 12, 0.8, indices=row_index(), seed=11)
    expected = oracle.probabilities(LOGITS[0].numpy(), top_k=12, top_p=0.8)
    assert oracle.g_test(tokens.numpy(), expected) > 0.001


def test_joint_frequencies() -> None:
    # Of the whole row, 0.8 of the mass takes 13 tokens; of the 14 that top_k keeps it takes fewer.
    x, top_k, top_p = LOGITS[0].numpy(), 14, 0.8
    within, first = (
        int((oracle.probabilities(x, **f) > 0).sum())
        for f in ({"top_p": top_p}, {"top_k": top_k, "top_p": top_p})
    )
    assert first < within < top_k
    tokens = sampling.top_k_top_p_sampling_from_logits(LOGITS, top_k, top_p, row_index(), "joint", seed=21)
    assert oracle.g_test(tokens.numpy(), oracle.probabilities(x, top_k=within)) > 0.001


@pytest.mark.parametrize("backend", BACKENDS)
def test_joint_takes_the_shorter_prefix(backend: str) -> None:
    logits = LOGITS.expand(2, VOCAB)
    seeds = torch.arange(2)
    for top_k, top_p in ((3, 0.9), (20, 0.5), (0, 0.5), (-1, 1.0), (5, 1.0), (9, torch.tensor([0.1, 0.9]))):
        call = {"indices": None, "filter_apply_order": "joint", "seed": seeds, "backend": backend}
        joint = sampling.top_k_top_p_sampling_from_logits(logits, top_k, top_p, **call)
        for row in range(2):
            share = float(torch.as_tensor(top_p).expand(2)[row])
            n = int((oracle.probabilities(LOGITS[0].numpy(), top_p=share) > 0).sum())
            n = min(n, top_k) if top_k > 0 else n
            assert int(joint[row]) == int(fastattn.sample(LOGITS, top_k=n, seeds=row))


def test_min_p_frequencies() -> None:
    probs = LOGITS.softmax(1)
    tokens = sampling.min_p_sampling_from_probs(probs, 0.2, row_index(), seed=31)
    assert isinstance(tokens, Tensor)
    expected = np.where(probs[0] >= 0.2 * probs.max(), probs[0], 0.0).astype(np.float64)
    assert 3 < (expected > 0).sum() < VOCAB
    assert oracle.g_test(tokens.numpy(), expected / expected.sum()) > 0.001


def test_min_p_keeps_its_boundary() -> None:
    """A quarter is exactly half of a half, though not of their logarithms in float32."""
    probs = torch.tensor([[0.5, 0.25, 0.2499999, 0.1, 1e-38]])
    drawn = sampling.min_p_sampling_from_probs(probs, 0.5, row_index(4000), seed=0)
    assert isinstance(drawn, Tensor)
    assert set(drawn.tolist()) == {0, 1}
    third = torch.tensor([[0.75, 0.25, 0.2499]])
    assert set(sampling.min_p_sampling_from_probs(third, 1 / 3, row_index(4000), seed=0).tolist()) == {0, 1}
    zeros = torch.tensor([[0.0, 0.5, 0.0, 0.5]])
    assert set(sampling.min_p_sampling_from_probs(zeros, 0.0, row_index(4000), seed=0).tolist()) == {1, 3}


def test_rows_that_are_not_valid() -> None:
    probs = torch.full((7, 5), 0.2)
    probs[1, 2], probs[2, 0], probs[3], probs[4, 4] = math.nan, -0.1, 0.0, INF
    probs[6, 0], probs[6, 1] = -INF, INF
    tokens, valid = sampling.min_p_sampling_from_probs(probs, 0.1, seed=torch.arange(7), return_valid=True)
    assert valid.tolist() == [True, False, False, False, False, True, False]
    assert tokens[~valid].tolist() == [0] * 5
    for row in (0, 5):  # the others have not noticed
        alone = sampling.min_p_sampling_from_probs(probs[row : row + 1], 0.1, seed=torch.tensor([row]))
        assert int(tokens[row]) == int(alone)


# ---- streams


def draw(logits: Tensor, **stream: Any) -> Tensor:
    return sampling.top_k_top_p_sampling_from_logits(logits, 0, 1.0, **stream)


def test_a_seed_per_row_is_sample_s() -> None:
    logits = torch.randn(6, 500, generator=torch.Generator().manual_seed(2))
    seeds, offsets = torch.arange(6) * 7, torch.arange(6)
    expected = fastattn.sample(logits, top_k=40, top_p=0.9, seeds=seeds, positions=offsets)
    drawn = sampling.top_k_top_p_sampling_from_logits(logits, 40, 0.9, seed=seeds, offset=offsets)
    assert torch.equal(drawn, expected)
    reversed_ = sampling.top_k_top_p_sampling_from_logits(
        logits, 40, 0.9, torch.arange(6).flip(0).int(), seed=seeds.flip(0), offset=offsets.flip(0)
    )
    assert torch.equal(reversed_.flip(0), expected)


def test_one_seed_is_a_stream_for_each_row() -> None:
    logits = torch.zeros(64, 1000)
    first, again, other, later = (
        draw(logits, seed=seed, offset=offset)
        for seed, offset in ((5, 0), (torch.tensor([5]), None), (6, 0), (5, 1))
    )
    assert torch.equal(first, again)
    assert len(set(first.tolist())) > 50
    for a, b in ((first, other), (first, later), (first[1:], other[:-1]), (first[:-1], other[1:])):
        assert int((a == b).sum()) < 5  # of 64, by chance 0.064


def test_a_generator_feeds_the_seeds() -> None:
    logits = torch.zeros(64, 1000)
    g = torch.Generator().manual_seed(3)
    first, second = draw(logits, generator=g), draw(logits, generator=g)
    assert torch.equal(first, draw(logits, generator=torch.Generator().manual_seed(3)))
    assert int((first == second).sum()) < 5
    torch.manual_seed(4)
    fresh = draw(logits)
    torch.manual_seed(4)
    assert torch.equal(fresh, draw(logits))


def test_splitmix64_known_answers() -> None:
    """The first outputs of Vigna's splitmix64.c from state 1234567."""
    from fastattn.sampling.streams import mix64

    gamma = 0x9E3779B97F4A7C15
    states = [(1234567 + n * gamma) % 2**64 for n in range(5)]
    signed = torch.tensor([s - 2**64 if s >= 2**63 else s for s in states])
    assert [x % 2**64 for x in mix64(signed).tolist()] == [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821,
    ]  # fmt: skip


def test_one_row_is_not_copied_for_its_indices() -> None:
    logits = torch.randn(1, 100_000)
    before = fastattn.sample(logits, seeds=7)
    drawn = draw(logits, indices=row_index(1), seed=torch.tensor([7, 7])[:1].expand(1))
    assert drawn.shape == before.shape
    from fastattn.sampling.blocks import _select

    assert _select(logits, row_index(10_000)).data_ptr() == logits.data_ptr()


# ---- errors

P = torch.full((2, 4), 0.25)
from_logits, min_p = sampling.top_k_top_p_sampling_from_logits, sampling.min_p_sampling_from_probs


def bad_probs(value: float) -> Tensor:
    probs = P.clone()
    probs[1, 2] = value
    return probs


@pytest.mark.parametrize("block", [sampling.top_p_renorm_probs, sampling.top_k_renorm_probs, min_p])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, "probs: row 1 has NaN"),
        (-0.5, "probs: row 1 has a negative value, -0.5"),
        (INF, r"probs: row 1 has \+inf"),
    ],
)
def test_bad_probs(block: Any, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        block(bad_probs(value), 1)
    with pytest.raises(ValueError, match="probs: row 0 has nothing positive"):
        block(torch.zeros(2, 4), 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [math.nan, INF])
def test_bad_logits(backend: str, value: float) -> None:
    for call in (sampling.top_k_mask_logits, lambda x, k, **kw: from_logits(x, k, 0.5, **kw)):
        with pytest.raises(ValueError, match="logits: row 1 has"):
            call(bad_probs(value), 2, backend=backend)
        with pytest.raises(ValueError, match="logits: row 1 has no finite logit"):
            call(torch.tensor([[0.0, 1.0], [-INF, -INF]]), 2, backend=backend)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sampling.top_p_renorm_probs(P, 1.5), ValueError, r"top_p: expected a number in \[0.0, 1.0\], got 1.5"),
        (lambda: sampling.top_p_renorm_probs(P, torch.tensor([0.5, -1.0])), ValueError, "top_p: .*got -1.0 in row 1"),
        (lambda: sampling.top_k_renorm_probs(P, -2), ValueError, "top_k: expected an integer in .*, got -2"),
        (lambda: sampling.top_k_mask_logits(P, 2.5), TypeError, "top_k: expected an integer"),
        (lambda: sampling.top_k_mask_logits(P[0], 2), ValueError, r"logits: expected \(batch, vocab\), got \(4,\)"),
        (lambda: sampling.top_k_mask_logits(P[:, :0], 2), ValueError, "logits: expected at least one column"),
        (lambda: sampling.top_k_renorm_probs(P.long(), 2), TypeError, "probs: expected dtype float32"),
        (lambda: min_p(P, -0.1), ValueError, "min_p: expected a number in"),
        (lambda: min_p(P, 0.1, torch.tensor([0, 2])), ValueError, r"indices: .*\[0, 2\), got 2 in row 1"),
        (lambda: min_p(P, 0.1, torch.tensor([0.0])), TypeError, "indices: expected dtype int32, int64"),
        (lambda: from_logits(P, 1, 1.0, filter_apply_order="p"), ValueError, "filter_apply_order: .*, got 'p'"),
        (lambda: from_logits(P, 1, 1.0, seed=2.5), TypeError, "seed: expected an integer"),
        (lambda: from_logits(P, 1, 1.0, seed=2**63), ValueError, "seed: expected an integer"),
        (lambda: from_logits(P, 1, 1.0, seed=torch.arange(3)), ValueError, r"seed: expected \(batch=2\), got \(3,\)"),
        (lambda: from_logits(P, 1, 1.0, offset=-1), ValueError, "offset: expected an integer"),
        (lambda: from_logits(P, 1, 1.0, seed=1, generator=torch.Generator()), ValueError, "generator: expected None"),
        (lambda: from_logits(P, torch.tensor([1, 2, 3]), 1.0), ValueError, r"top_k: expected \(batch=2\), got"),
        (lambda: from_logits(P, 1, 1.0, backend="abacus"), ValueError, "backend: expected one of"),
        (
            lambda: sampling.top_p_renorm_probs(P.double(), 0.5, backend="cpu"),
            NotImplementedError,
            "'cpu' lacks .*float64",
        ),
    ],
)  # fmt: skip
def test_errors(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
