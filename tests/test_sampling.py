"""fastattn.sample: what is kept, how often each token is drawn, what a draw may depend on, every error."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import sampling_oracle as oracle
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from scipy.stats import chi2_contingency
from torch import Tensor

import fastattn
from fastattn.args import SamplingArgs
from fastattn.backends import cpu, reference, reference_sampling

INF = math.inf
BACKENDS = ["cpu", "reference"]


def filters(**changes: Any) -> dict[str, Any]:
    return {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | changes


def survivors(backend: str, logits: Tensor, **changes: Any) -> np.ndarray:
    """The kept set of each row, (batch, vocab) bool."""
    args = SamplingArgs(logits=logits, **filters(**changes), seeds=0, positions=0)
    if backend == "cpu":
        return cpu.survivors(args).numpy()
    order, _, kept = reference_sampling.survivors(args)
    return torch.zeros_like(kept).scatter_(1, order, kept).numpy()


def make_rows(kind: str, vocab: int, seed: int) -> Tensor:
    """(3, vocab) float32"""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(3, vocab, generator=g)
    if kind == "normal":
        return 3 * x
    if kind == "flat":
        return 0.01 * x
    if kind == "heavy":
        return x / torch.rand(3, vocab, generator=g).clamp(min=1e-4)
    if kind == "bf16 grid":
        return (3 * x).bfloat16().float()
    if kind == "few values":
        return torch.randint(-2, 3, (3, vocab), generator=g).float()
    if kind == "signed zeros":
        return torch.where(x > 0, 0.0, -0.0)
    if kind == "constant":
        return torch.full((3, vocab), -7.25)
    if kind == "mostly -inf":
        x[torch.rand(3, vocab, generator=g) < 0.95] = -INF
        x[:, vocab // 2] = 1.0
        return x
    if kind == "ascending":
        return (3 * x).sort(dim=1).values
    if kind == "descending":
        return (3 * x).sort(dim=1, descending=True).values
    raise ValueError(kind)


KINDS = [
    "normal",
    "flat",
    "heavy",
    "bf16 grid",
    "few values",
    "signed zeros",
    "constant",
    "mostly -inf",
    "ascending",
    "descending",
]
FILTERS: list[dict[str, Any]] = [
    {"top_k": 1},
    {"top_k": 50},
    {"top_k": 1000},
    {"top_p": 0.0},
    {"top_p": 0.3},
    {"top_p": 0.9},
    {"top_p": 0.9999},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"temperature": 0.0},
    {"temperature": 0.7, "top_k": 50, "top_p": 0.9},
    {"temperature": 1.5, "top_k": 40, "top_p": 0.95, "min_p": 0.1},
    {"temperature": INF, "top_k": 7, "top_p": 0.5},
    {"temperature": INF, "min_p": 1.0},
    {"temperature": 1e-8, "top_p": 0.9},
    {"temperature": 1e8, "top_p": 0.9, "min_p": 0.5},
    {"temperature": 1e-300, "top_p": 0.5, "min_p": 0.5},
]


# ---- kept sets


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab", [1, 5, 257, 20011])
def test_kept_sets(isa: str, kind: str, vocab: int) -> None:
    logits = make_rows(kind, vocab, seed=vocab)[:1]
    for changes in FILTERS:
        mask = survivors("cpu", logits, **changes)[0]
        assert oracle.kept(logits[0].numpy(), **changes).accepts(mask), changes


@pytest.mark.parametrize("kind", KINDS)
def test_reference_kept_sets(kind: str) -> None:
    logits = make_rows(kind, 257, seed=1)
    for changes in FILTERS:
        if changes.get("temperature") == 0.0:
            continue
        for row, mask in zip(logits, survivors("reference", logits, **changes)):
            assert oracle.kept(row.numpy(), **changes).accepts(mask), changes


values = st.one_of(
    st.sampled_from([-INF, -3.4e38, -1.0, -0.5, -0.0, 0.0, 0.5, 1.0, 3.4e38]),
    st.floats(-20, 20, width=16),
    st.floats(allow_nan=False, allow_infinity=False, width=32),
)
unit = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0, 1e-300]), st.floats(0, 1))


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    row=st.lists(values, min_size=1, max_size=40).filter(lambda row: max(row) > -INF),
    repeat=st.integers(1, 40),
    temperature=st.sampled_from([1e-300, 1e-8, 0.1, 1.0, 3.0, 1e8, 1e300, INF]),
    top_k=st.integers(-1, 50),
    top_p=unit,
    min_p=unit,
)
# The whole range of floats in two tokens: the search's last bucket ends beyond the largest key.
@example(row=[3.4e38, -17.0], repeat=1, temperature=1e-300, top_k=0, top_p=0.25, min_p=0.0)
def test_kept_sets_of_any_row(
    isa: str, row: list[float], repeat: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = torch.tensor([row * repeat])
    changes = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    mask = survivors("cpu", logits, **changes)[0]
    assert oracle.kept(logits[0].numpy(), **changes).accepts(mask)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("row", "changes", "ids"),
    [
        ([0, 1, 1, 1], {"top_k": 2}, {1, 2}),  # ties at the k-th value: the lower ids
        ([0.0, -0.0, 0.0, -0.0], {"top_k": 3}, {0, 1, 2}),  # both zeros are one value
        ([0, 0, 0, 0], {"top_p": 0.5}, {0, 1}),  # exactly reached: the crossing token is the last
        ([0, 0, 0, 0], {"top_p": 0.51}, {0, 1, 2}),
        ([0] * 10, {"top_p": 0.3}, {0, 1, 2}),
        ([0, 5, 0, 0], {"top_p": 0.0}, {1}),  # at least one
        ([3, 2, 1], {"temperature": 0.5, "top_p": 0.8}, {0}),  # temperature comes first
        ([2, 2, 1, 1], {"top_k": 2, "top_p": 0.6}, {0, 1}),  # top_p acts on top_k's survivors
        ([1, 2, 2, -INF], {"min_p": 1.0}, {1, 2}),  # ties at min_p: all
        ([1, -INF, 2, -INF], {"top_k": 3}, {0, 2}),  # min(k, finite)
        ([1, -INF, 2, -INF], {"temperature": INF}, {0, 2}),
        ([1, -INF, 2, -INF], {"top_k": -1, "top_p": 1.0, "min_p": 0.0}, {0, 2}),  # everything off
    ],
)
def test_boundaries(backend: str, row: list[float], changes: dict[str, Any], ids: set[int]) -> None:
    mask = survivors(backend, torch.tensor([row], dtype=torch.float32), **changes)[0]
    assert set(np.flatnonzero(mask)) == ids


# ---- noise


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter: Any, key: Any, words: Any) -> None:
    out = reference_sampling.philox4x32_10(
        tuple(torch.tensor([c]) for c in counter), tuple(torch.tensor([k]) for k in key)
    )
    assert tuple(int(word) for word in out) == words


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF])
@pytest.mark.parametrize("position", [0, 1, 2**32, 2**63 - 1])
def test_noise_is_philox(isa: str, seed: int, position: int) -> None:
    # At infinite temperature the token is the id with the largest noise, which is the largest Philox word.
    logits = torch.zeros(1, 4096)
    token = fastattn.sample(logits, temperature=INF, seeds=seed, positions=position, backend="cpu")
    args = SamplingArgs(logits=logits, **filters(), seeds=seed, positions=position)
    assert int(token) == int(reference_sampling.gumbel(args, 4096).argmax())


@pytest.mark.parametrize("kind", KINDS)
def test_backends_draw_the_same_token(isa: str, kind: str) -> None:
    logits = make_rows(kind, 700, seed=3).repeat(8, 1)
    for changes in FILTERS:
        call = filters(**changes) | {"seeds": torch.arange(24), "positions": 11}
        kernel = fastattn.sample(logits, **call, backend="cpu")
        assert torch.equal(kernel, fastattn.sample(logits, **call, backend="reference")), changes


@pytest.mark.parametrize("backend", BACKENDS)
def test_greedy_is_the_lowest_id_among_equal_maxima(backend: str) -> None:
    logits = torch.randint(0, 4, (50, 999), generator=torch.Generator().manual_seed(0)).float()
    expected = torch.from_numpy(logits.numpy().argmax(axis=1))  # numpy: the first
    assert torch.equal(fastattn.sample(logits, temperature=0, backend=backend), expected)
    assert torch.equal(fastattn.sample(logits, top_k=1, backend=backend), expected)
    assert torch.equal(fastattn.sample(logits, top_p=0, backend=backend), expected)


# ---- distribution


@pytest.mark.parametrize(
    ("vocab", "draws", "by", "changes"),
    [
        (1000, 200_000, "seeds", {}),
        (1000, 200_000, "positions", {}),
        (1000, 200_000, "seeds", {"temperature": 0.6, "top_k": 50, "top_p": 0.9}),
        (1000, 200_000, "positions", {"temperature": 1.3, "top_p": 0.8}),
        (1000, 200_000, "seeds", {"top_k": 300, "min_p": 0.01}),
        (128_256, 200_000, "seeds", {"temperature": 0.8, "top_k": 50, "top_p": 0.9}),
        (128_256, 200_000, "positions", {"min_p": 0.02}),
        (128_256, 30_000, "seeds", {}),
        (128_256, 30_000, "positions", {"temperature": 0.8, "top_p": 0.7}),
    ],
)
def test_frequencies(vocab: int, draws: int, by: str, changes: dict[str, Any]) -> None:
    logits = make_rows("normal", vocab, seed=5)[:1]
    stream = {"seeds": 42, "positions": 0} | {by: torch.arange(draws)}
    tokens = fastattn.sample(logits.expand(draws, vocab), **changes, **stream)
    assert oracle.g_test(tokens.numpy(), oracle.probabilities(logits[0].numpy(), **changes)) > 0.001


@pytest.mark.parametrize("by", ["seeds", "positions"])
def test_neighbouring_draws_are_independent(by: str) -> None:
    logits = torch.linspace(0, 1, 12).expand(200_000, 12)
    stream = {"seeds": 7, "positions": 0} | {by: torch.arange(200_000)}
    tokens = fastattn.sample(logits, **stream).numpy()
    for lag in (1, 2, 64):
        pairs = np.zeros((12, 12))
        np.add.at(pairs, (tokens[:-lag], tokens[lag:]), 1)
        assert chi2_contingency(pairs).pvalue > 0.001, lag


# ---- what a token may depend on


def test_rows_are_independent_of_batch_and_threads(isa: str) -> None:
    batch, vocab = 24, 9000
    g = torch.Generator().manual_seed(9)
    logits = 3 * torch.randn(batch, vocab, generator=g)
    call = {
        "temperature": torch.rand(batch, generator=g) * 2,
        "top_k": torch.randint(-1, 100, (batch,), generator=g),
        "top_p": torch.rand(batch, generator=g),
        "min_p": torch.rand(batch, generator=g) * 0.1,
        "seeds": torch.randint(-(2**62), 2**62, (batch,), generator=g),
        "positions": torch.randint(0, 2**62, (batch,), generator=g),
    }
    call["temperature"][::5] = 0
    call["top_p"][::3] = 1
    tokens = fastattn.sample(logits, **call)
    shuffle = torch.randperm(batch, generator=g)
    shuffled = fastattn.sample(logits[shuffle], **{name: value[shuffle] for name, value in call.items()})
    assert torch.equal(shuffled, tokens[shuffle])
    before = torch.get_num_threads()
    for nthreads in (1, 2, 5):
        torch.set_num_threads(nthreads)
        assert torch.equal(fastattn.sample(logits, **call), tokens)
    torch.set_num_threads(before)
    for row in range(batch):  # alone, and with numbers for tensors
        alone = fastattn.sample(
            logits[row : row + 1], **{name: value[row].item() for name, value in call.items()}
        )
        assert int(alone) == int(tokens[row])


def test_isas_agree() -> None:
    logits = torch.cat([make_rows(kind, 20011, seed=2) for kind in KINDS])
    before = fastattn._C.isa()
    for changes in FILTERS:
        tokens, kept = [], []
        for name in fastattn.cpu_isas():
            fastattn._C.select_isa(name)
            tokens.append(fastattn.sample(logits, **changes, seeds=torch.arange(len(logits))))
            kept.append(survivors("cpu", logits, **changes))
        fastattn._C.select_isa(before)
        assert all(torch.equal(tokens[0], other) for other in tokens), changes
        assert all(np.array_equal(kept[0], other) for other in kept), changes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_logits_are_their_float32_values(isa: str, dtype: torch.dtype) -> None:
    logits = (3 * torch.randn(8, 3001, generator=torch.Generator().manual_seed(1))).to(dtype)
    logits[:, ::7] = -INF
    for changes in FILTERS:
        seeds = torch.arange(8)
        half = fastattn.sample(logits, **changes, seeds=seeds)
        assert torch.equal(half, fastattn.sample(logits.float(), **changes, seeds=seeds)), changes


def test_float64_logits_go_to_the_reference() -> None:
    logits = torch.tensor([[1.0, 1.0 + 1e-12, 0.0]], dtype=torch.float64)
    assert fastattn.sample(logits, temperature=0).tolist() == [1]
    with pytest.raises(NotImplementedError, match=r"'cpu' lacks dtype 'float64'; .* reference"):
        fastattn.sample(logits, backend="cpu")


def test_any_stride() -> None:
    x = torch.randn(6, 777, generator=torch.Generator().manual_seed(4))
    padded = torch.full((6, 1000), math.nan)
    padded[:, 100:877] = x
    expected = fastattn.sample(x, seeds=3)
    assert torch.equal(fastattn.sample(padded[:, 100:877], seeds=3), expected)
    assert torch.equal(fastattn.sample(x.t().contiguous().t(), seeds=3), expected)
    assert torch.equal(fastattn.sample(x.flip(0).flip(0)[::2], seeds=3), expected[::2])
    assert torch.equal(fastattn.sample(x[:1].expand(6, 777), seeds=3), expected[:1].expand(6))


def test_small_and_large_shapes(isa: str) -> None:
    assert fastattn.sample(torch.zeros(0, 10)).shape == (0,)
    assert fastattn.sample(torch.zeros(4096, 1), top_p=0.5).tolist() == [0] * 4096
    logits = torch.zeros(1, 1_000_000)
    logits[0, 999_999] = 30.0
    assert fastattn.sample(logits, top_p=0.9).tolist() == [999_999]
    assert int(survivors("cpu", logits, temperature=INF, top_p=0.5).sum()) == 500_000


def test_fresh_seeds_follow_torch() -> None:
    logits = torch.zeros(64, 1000)
    torch.manual_seed(3)
    first, second = fastattn.sample(logits), fastattn.sample(logits)
    torch.manual_seed(3)
    assert torch.equal(fastattn.sample(logits), first)
    assert not torch.equal(first, second)
    assert len(set(first.tolist())) > 50  # rows do not share their noise


# ---- errors


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([0.0, math.nan, INF], "logits: row 3 has NaN"),
        ([0.0, INF, -INF], r"logits: row 3 has \+inf"),
        ([-INF, -INF, -INF], "logits: row 3 has no finite logit"),
    ],
)
def test_bad_rows(isa: str, backend: str, dtype: torch.dtype, bad: list[float], message: str) -> None:
    for vocab in (3, 1003):
        logits = torch.full((5, vocab), -INF, dtype=dtype)
        logits[:, 0] = 0.0
        logits[3, -3:] = torch.tensor(bad, dtype=dtype)
        logits[3, :-3] = -INF
        for temperature in (0.0, 1.0):
            with pytest.raises(ValueError, match=message):
                fastattn.sample(logits, temperature=temperature, top_p=0.9, backend=backend)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"temperature": -1.0}, ValueError, r"temperature: expected a number in \[0.0, inf\], got -1.0"),
        ({"temperature": math.nan}, ValueError, "temperature: expected a number"),
        (
            {"temperature": "hot"},
            TypeError,
            r"temperature: expected a number or a \(.*, got str",
        ),
        ({"temperature": True}, TypeError, "temperature: .* got bool"),
        ({"top_k": -2}, ValueError, r"top_k: expected an integer in \[-1, \d+\], got -2"),
        ({"top_k": 2.5}, TypeError, r"top_k: expected an integer or a \(batch,\) tensor, got float"),
        ({"top_p": 1.5}, ValueError, r"top_p: expected a number in \[0.0, 1.0\], got 1.5"),
        ({"min_p": -0.1}, ValueError, r"min_p: expected a number in \[0.0, 1.0\], got -0.1"),
        ({"seeds": 2**63}, ValueError, "seeds: expected an integer in"),
        ({"positions": -1}, ValueError, r"positions: expected an integer in \[0, "),
        ({"top_p": torch.tensor([0.5, 2.0])}, ValueError, r"top_p: expected values in .* got 2.0 in row 1"),
        ({"top_p": torch.tensor([0.5, math.nan])}, ValueError, "got nan in row 1"),
        ({"top_p": torch.ones(3)}, ValueError, r"top_p: expected \(batch=2\), got \(3,\)"),
        ({"top_k": torch.ones(2)}, TypeError, "top_k: expected an integer dtype, got torch.float32"),
        ({"seeds": torch.ones(2, dtype=torch.bool)}, TypeError, "seeds: expected an integer dtype"),
        (
            {"temperature": torch.ones(2, device="meta")},
            ValueError,
            "temperature: expected the device",
        ),
        ({"backend": "abacus"}, ValueError, "backend: expected one of auto, .*reference, got 'abacus'"),
        ({"tempreature": 1.0}, TypeError, "unexpected keyword argument 'tempreature'"),
    ],
)
def test_errors(call: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fastattn.sample(torch.zeros(2, 8), **call)


@pytest.mark.parametrize(
    ("logits", "error", "message"),
    [
        ([1.0], TypeError, "logits: expected a torch.Tensor, got list"),
        (torch.zeros(8), ValueError, r"logits: expected \(batch, vocab\), got \(8,\)"),
        (torch.zeros(2, 0), ValueError, r"logits: expected at least one column, got \(2, 0\)"),
        (torch.zeros(2, 8, dtype=torch.int64), TypeError, "logits: expected dtype float32, .* got int64"),
    ],
)
def test_wrong_logits(logits: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fastattn.sample(logits)


def test_vocabularies_too_large_for_integer_masses_go_to_the_reference() -> None:
    logits = torch.zeros(1, 1).expand(1, 2**22 + 1)
    args = SamplingArgs(logits=logits, **filters(), seeds=0, positions=0)
    assert cpu.supports(args) == "lacks vocabularies above 4194304"
    assert reference.supports(args) is None
