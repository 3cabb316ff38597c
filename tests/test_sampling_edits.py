"""fastattn.sample: penalties, logit_bias, allowed and log-probabilities."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import sampling_oracle as oracle
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sampling_cases import INF, WHICH, Case, packed, sampling_args
from torch import Tensor

import fastattn
from fastattn import SampledTokens, TokenCounts, token_counts
from fastattn.backends import cpu, reference_sampling

BACKENDS = ["cpu", "reference"]


def survivors(backend: str, logits: Tensor, edits: dict[str, Any], **changes: Any) -> np.ndarray:
    """The kept set of each row, (batch, vocab) bool."""
    args = sampling_args(logits, **changes, **edits)
    if backend == "cpu":
        return cpu.survivors(args).numpy()
    order, _, kept = reference_sampling.survivors(args)
    return torch.zeros_like(kept).scatter_(1, order, kept).numpy()


FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"top_k": 20},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"temperature": 0.7, "top_k": 50, "top_p": 0.9, "min_p": 0.02},
]


# ---- edits are what the oracle does to the logits


def check_edits(backend: str, case: Case, which: str, form: str, logits: Tensor) -> None:
    ours, theirs = case.edits(which, form)
    wanted = case.edited(theirs, logits)
    seeds = torch.arange(len(logits))
    for changes in FILTERS:
        if backend == "cpu" or changes.get("temperature") != 0.0:
            for row, mask in zip(wanted, survivors(backend, logits, ours, **changes)):
                assert oracle.kept(row.numpy(), **changes).accepts(mask), changes
        drawn = fastattn.sample(logits, **ours, **changes, seeds=seeds, backend=backend)
        assert torch.equal(drawn, fastattn.sample(wanted, **changes, seeds=seeds, backend=backend)), changes


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_edited_logits(isa: str, which: str, form: str) -> None:
    for vocab in (7, 300, 1203):
        case = Case(seed=vocab, vocab=vocab)
        check_edits("cpu", case, which, form, case.logits)


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_reference_edits(which: str, form: str) -> None:
    case = Case(seed=2, vocab=300)
    check_edits("reference", case, which, form, case.logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_edited_16_bit_logits_are_not_rounded_again(isa: str, dtype: torch.dtype) -> None:
    for form in ("dense", "sparse"):
        case = Case(seed=5, vocab=900)
        check_edits("cpu", case, "pba", form, case.logits.to(dtype))
        check_edits("cpu", case, "p", form, case.logits.to(dtype))


def test_edited_float64_logits_stay_float64() -> None:
    logits = torch.tensor([[1.0, 1.0, 1.0]], dtype=torch.float64)
    bias = torch.tensor([0.0, 1e-12, 0.0], dtype=torch.float64)
    assert fastattn.sample(logits, temperature=0, logit_bias=bias).tolist() == [1]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32), st.integers(1, 400), st.sampled_from(WHICH), st.sampled_from(["dense", "sparse"])
)
def test_edits_of_any_row(seed: int, vocab: int, which: str, form: str) -> None:
    case = Case(seed, vocab, batch=1)
    ours, theirs = case.edits(which, form)
    wanted = case.edited(theirs)
    assume(bool(wanted.isfinite().any()))  # a row with nothing to draw is an error, tested elsewhere
    for changes in FILTERS[1:]:
        mask = survivors("cpu", case.logits, ours, **changes)[0]
        assert oracle.kept(wanted[0].numpy(), **changes).accepts(mask), changes


def test_isas_and_threads_agree_on_edits() -> None:
    case = Case(seed=3, vocab=40_000, batch=4)
    before, threads = fastattn._C.isa(), torch.get_num_threads()
    for which in ("p", "pba"):
        for form in ("dense", "sparse"):
            ours, _ = case.edits(which, form)
            drawn = []
            for name in fastattn.cpu_isas():
                fastattn._C.select_isa(name)
                for nthreads in (1, 2):
                    torch.set_num_threads(nthreads)
                    drawn += [fastattn.sample(case.logits, **ours, top_p=0.9, seeds=7)]
            assert all(torch.equal(drawn[0], other) for other in drawn)
    fastattn._C.select_isa(before)
    torch.set_num_threads(threads)


def test_parameters_per_row() -> None:
    case = Case(seed=8, vocab=500)
    penalties = {
        "repetition_penalty": torch.tensor([1.0, 1.5, 0.7]),
        "presence_penalty": torch.tensor([0.0, -1.0, 2.0]),
        "frequency_penalty": torch.tensor([0.5, 0.0, -0.5]),
    }
    for backend in BACKENDS:
        for form in ("dense", "sparse"):
            counts = case.seen(form)
            drawn = fastattn.sample(case.logits, **penalties, **counts, seeds=1, backend=backend)
            for row in range(3):
                one = {name: float(value[row]) for name, value in penalties.items()}
                alone = fastattn.sample(case.logits, **one, **counts, seeds=1, backend=backend)
                assert int(alone[row]) == int(drawn[row])


def test_one_bias_and_one_mask_for_all_rows() -> None:
    case = Case(seed=9, vocab=100)
    mask, bias = case.allowed[0] | True, case.bias[0]
    mask[::3] = False
    shared = {"allowed": torch.from_numpy(mask), "logit_bias": torch.from_numpy(bias).float()}
    full = {name: value.expand(3, 100) for name, value in shared.items()}
    lists = {"allowed": packed(mask[None])[0], "logit_bias": (torch.arange(100), shared["logit_bias"])}
    for backend in BACKENDS:
        drawn = [
            fastattn.sample(case.logits.nan_to_num(neginf=-9.0), **form, seeds=2, backend=backend)
            for form in (shared, full, lists)
        ]
        assert torch.equal(drawn[0], drawn[1])
        assert torch.equal(drawn[0], drawn[2])
        assert mask[drawn[0].numpy()].all()


# ---- TokenCounts


@pytest.mark.parametrize("kernel", [True, False])
def test_token_counts_count(kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kernel:
        monkeypatch.setattr(token_counts, "count_tokens", lambda *lists: False)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 300, n).tolist() for n in (0, 5, 200)]
    counts = TokenCounts(prompts, 300)
    dense = np.zeros((3, 300), dtype=np.int64)
    seen = np.zeros((3, 300), dtype=bool)
    for row, prompt in enumerate(prompts):
        seen[row, prompt] = True
    for _ in range(250):
        tokens = rng.integers(-1, 300, 3)
        counts.add(torch.from_numpy(tokens))
        for row, token in enumerate(tokens):
            if token >= 0:
                dense[row, token] += 1
                seen[row, token] = True
        for row in range(3):
            ids = counts.ids[row, : counts.lengths[row]]
            assert torch.equal(ids, torch.from_numpy(np.flatnonzero(seen[row])).int())
        bits = np.unpackbits(counts.unseen.numpy(), axis=1, bitorder="little")
        assert np.array_equal(bits[:, :300] == 0, seen)
        assert bits[:, 300:].all()
    assert np.array_equal(counts.dense()[0].numpy(), dense)
    assert np.array_equal(counts.dense()[1].numpy(), seen)
    counts.select([2, 0])
    unseen = np.unpackbits(counts.unseen.numpy(), axis=1, bitorder="little")[:, :300]
    assert np.array_equal(unseen == 0, seen[[2, 0]])
    assert np.array_equal(counts.dense()[0].numpy(), dense[[2, 0]])
    assert counts.batch == 2


def test_token_counts_of_nothing() -> None:
    counts = TokenCounts(0, 10)
    counts.add(torch.zeros(0, dtype=torch.int64))
    assert fastattn.sample(torch.zeros(0, 10), presence_penalty=1.0, token_counts=counts).shape == (0,)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TokenCounts([[3], [10]], 10), r"prompts\[1\]: expected ids in \[0, 10\), got 10"),
        (lambda: TokenCounts([[-1, 3]], 10), r"prompts\[0\]: expected ids in \[0, 10\), got -1"),
        (lambda: TokenCounts(1, 0), "vocab: expected a number in"),
        (lambda: TokenCounts(2, 10).add(torch.tensor([1])), r"tokens: expected \(batch=2\), got \(1,\)"),
        (lambda: TokenCounts(1, 10).add(torch.tensor([10])), "tokens: expected ids below 10, got 10"),
    ],
)
def test_wrong_token_counts(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# ---- log-probabilities


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [1, 50, 3001])
def test_logprobs(isa: str, dtype: torch.dtype, vocab: int) -> None:
    case = Case(seed=vocab, vocab=vocab)
    logits = case.logits.to(dtype)
    logits[:, ::5] = logits[:, :1].clone()  # ties; -inf in some rows
    logits[:, vocab // 2] = 2.0
    wanted = torch.log_softmax(logits.double(), 1)
    order = torch.sort(logits.double(), dim=1, descending=True, stable=True).indices
    edits = {"logit_bias": case.logit_bias("sparse"), "top_p": 0.9, "temperature": 0.5}
    for backend in BACKENDS:
        for n in {1, min(7, vocab), vocab}:
            for call in ({}, edits, {"temperature": 0.0}, {"top_k": 5}):
                plain = fastattn.sample(logits, **call, seeds=4, backend=backend)
                done = fastattn.sample(logits, **call, seeds=4, return_logprobs=n, backend=backend)
                assert isinstance(done, SampledTokens)
                assert torch.equal(done.tokens, plain)
                assert torch.equal(done.top_ids, order[:, :n])
                drawn = wanted.gather(1, done.tokens[:, None])[:, 0]
                torch.testing.assert_close(done.logprobs, drawn.float(), rtol=1e-6, atol=2e-6)
                best = wanted.gather(1, order[:, :n]).float()
                torch.testing.assert_close(done.top_logprobs, best, rtol=1e-6, atol=2e-6)


def test_logprobs_of_an_empty_batch() -> None:
    done = fastattn.sample(torch.zeros(0, 9), return_logprobs=3)
    assert [x.shape for x in done] == [(0,), (0,), (0, 3), (0, 3)]


# ---- errors


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("row", "edits", "message"),
    [
        ([0.0, math.nan], {"allowed": [True, False]}, "row 1 has NaN$"),
        ([0.0, INF], {"allowed": [False, True]}, r"row 1 has \+inf$"),
        ([0.0, INF], {"logit_bias": [0.0, -INF]}, r"row 1 has \+inf$"),
        ([-INF, -INF], {"allowed": [True, False]}, "row 1 has no finite logit$"),
        (
            [-INF, 0.0],
            {"allowed": [True, False]},
            "row 1 has no finite logit after penalties, logit_bias and",
        ),
        ([0.0, 0.0], {"allowed": [False, False]}, "row [01] has no finite logit after"),
        ([0.0, -INF], {"logit_bias": [-INF, 1.0]}, "row 1 has no finite logit after"),
        ([0.0, 1.0], {"logit_bias": [0.0, INF]}, r"row [01] has \+inf after"),
        ([0.0, 1.0], {"logit_bias": [0.0, math.nan]}, "row [01] has NaN after"),
    ],
)
def test_rows_that_edits_break(
    isa: str, backend: str, row: list[float], edits: dict[str, Any], message: str
) -> None:
    logits = torch.tensor([[0.0, 1.0], row])
    forms = []
    for name, value in edits.items():
        value = torch.tensor(value)
        forms += [{name: value}]
        forms += [{name: packed(value.numpy()[None])[0] if name == "allowed" else (torch.arange(2), value)}]
    for call in forms:
        for temperature in (0.0, 1.0):
            with pytest.raises(ValueError, match=message):
                fastattn.sample(logits, **call, temperature=temperature, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinity_that_is_not_allowed(isa: str, backend: str) -> None:
    call = {"allowed": torch.tensor([True, False]), "backend": backend}
    assert fastattn.sample(torch.tensor([[0.0, INF]]), **call).tolist() == [0]
    with pytest.raises(ValueError, match=r"row 0 has \+inf$"):
        fastattn.sample(torch.tensor([[0.0, INF]]), **call, return_logprobs=1)


COUNTS = torch.zeros(2, 8, dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            {"repetition_penalty": 0.0, "token_counts": COUNTS},
            ValueError,
            "repetition_penalty: expected a number",
        ),
        ({"repetition_penalty": 1.2}, ValueError, "repetition_penalty: expected token_counts or prompt_mask"),
        (
            {"presence_penalty": 1.0},
            ValueError,
            "presence_penalty: expected token_counts beside it, got None",
        ),
        (
            {"frequency_penalty": INF, "token_counts": COUNTS},
            ValueError,
            "frequency_penalty: expected a number",
        ),
        ({"presence_penalty": torch.ones(3), "token_counts": COUNTS}, ValueError, r"expected \(batch=2\)"),
        (
            {"token_counts": COUNTS[0, :7]},
            ValueError,
            r"token_counts: expected \(vocab=8,\) or \(batch=2, vocab=8\)",
        ),
        ({"token_counts": COUNTS.float()}, TypeError, "token_counts: expected an integer dtype"),
        ({"token_counts": [1]}, TypeError, "token_counts: expected a tensor or TokenCounts, got list"),
        (
            {"token_counts": TokenCounts(2, 9)},
            ValueError,
            r"token_counts: expected .* = \(2, 8\), got \(2, 9\)",
        ),
        ({"prompt_mask": COUNTS}, TypeError, "prompt_mask: expected a bool tensor, got torch.int32"),
        (
            {"token_counts": TokenCounts(2, 8), "prompt_mask": COUNTS.bool()},
            ValueError,
            "prompt_mask: expected None",
        ),
        ({"logit_bias": torch.zeros(9)}, ValueError, r"logit_bias: expected \(vocab=8,\) or"),
        (
            {"logit_bias": torch.zeros(8, dtype=torch.int64)},
            TypeError,
            "logit_bias: expected a floating dtype",
        ),
        ({"logit_bias": {1: 2.0}}, TypeError, "logit_bias: expected a tensor or a tuple"),
        (
            {"logit_bias": (torch.tensor([1]), torch.zeros(2))},
            ValueError,
            "logit_bias: expected values of the shape",
        ),
        (
            {"logit_bias": (torch.tensor([0, 8]), torch.zeros(2))},
            ValueError,
            r"expected ids in \[-1, 8\), got 8 in row 0",
        ),
        ({"logit_bias": (torch.tensor([-2]), torch.zeros(1))}, ValueError, r"got -2 in row 0"),
        ({"logit_bias": (torch.zeros(1), torch.zeros(1))}, TypeError, "expected ids of an integer dtype"),
        ({"allowed": torch.ones(2, 7, dtype=torch.bool)}, ValueError, r"allowed: expected \(vocab=8,\) or"),
        (
            {"allowed": torch.ones(2, 2, dtype=torch.int32)},
            ValueError,
            r"allowed: expected \(ceil\(vocab/32\)=1,\) or",
        ),
        ({"allowed": torch.ones(2, 8)}, TypeError, "allowed: expected dtype bool, or int32 for packed bits"),
        ({"allowed": [True] * 8}, TypeError, "allowed: expected a torch.Tensor, got list"),
        ({"return_logprobs": 9}, ValueError, r"return_logprobs: expected a value in \[0, 8\], got 9"),
        ({"return_logprobs": -1}, ValueError, "return_logprobs: expected a value"),
        ({"return_logprobs": 1.5}, TypeError, "return_logprobs: expected an integer, got float"),
        ({"return_logprobs": True}, TypeError, "return_logprobs: expected an integer, got bool"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_errors(backend: str, call: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fastattn.sample(torch.zeros(2, 8), **call, backend=backend)


def test_penalties_that_are_off_need_nothing() -> None:
    logits = torch.zeros(2, 8)
    plain = fastattn.sample(logits, seeds=1)
    off = fastattn.sample(
        logits, seeds=1, repetition_penalty=1, token_counts=COUNTS, prompt_mask=COUNTS.bool()
    )
    assert torch.equal(plain, off)
