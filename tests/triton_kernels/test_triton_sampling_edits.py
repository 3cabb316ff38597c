"""Penalties, logit_bias, allowed and log-probabilities by Triton's kernels: edited rows bit for bit, the CPU's tokens."""

from __future__ import annotations

import pytest
import torch
from device import DTYPES, INTERPRETED, there
from sampling_cases import (
    INF,
    PARAMETERS,
    WHICH,
    Case,
    rows_that_edits_break,
    rows_without_a_softmax,
    sampling_args,
)  # fmt: skip

from fastattn import TokenCounts
from fastattn.backends import cpu, reference, reference_sampling, triton
from fastattn.kernels.launch import fixed_blocks
from fastattn.kernels.sampling_edits import edited

FORMS = ["dense", "sparse"]


@pytest.fixture(autouse=True)
def small_blocks():
    with fixed_blocks(BLOCK=64, RANKS=16):
        yield


def check_edited(args):
    """Edited rows are the definition's, bit for bit."""
    rows = edited(there(args)).cpu()
    assert torch.equal(rows, reference_sampling.edited(args).float())
    return rows


def check_logprobs(args):
    """Tokens and ids are the CPU's, log-probabilities as near to the definition's as the CPU's."""
    tokens, (logprobs, ids, best) = there_and_back(args)
    expected, (wanted, wanted_ids, wanted_best) = cpu.sample(args)
    assert torch.equal(tokens, expected), f"{tokens} {expected}"
    assert torch.equal(ids, wanted_ids)
    torch.testing.assert_close(logprobs, wanted, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(best, wanted_best, rtol=1e-6, atol=2e-6)


def there_and_back(args):
    tokens, logprobs = triton.sample(there(args))
    return tokens.cpu(), tuple(x.cpu() for x in logprobs)


# ---- edits


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("form", FORMS)
def test_edited_rows_beside_plain_ones(form, which):
    for vocab in (1, 203) if which == "pba" else (203,):
        case = Case(seed=vocab, vocab=vocab, batch=4, plain=True)
        ours, theirs = case.edits(which, form)
        rows = check_edited(sampling_args(case.logits, **ours))
        assert torch.equal(rows[3], case.logits[3])
        if form == "sparse":  # a dense bias is float32
            assert torch.equal(rows, case.edited(theirs))


@pytest.mark.parametrize("form", FORMS)
def test_all_edits_with_all_filters(form):
    case = Case(seed=5, vocab=97, batch=2, plain=True)
    noise = {"seeds": torch.arange(2) - 2, "positions": torch.arange(2) * 2**33}
    args = sampling_args(case.logits, **case.edits("pba", form)[0], **noise, **PARAMETERS["all"])
    expected, tokens = cpu.sample(args)[0], triton.sample(there(args))[0].cpu()
    assert torch.equal(tokens, expected), f"{tokens} {expected}"
    asked = args._replace(survivors=True)
    assert torch.equal(triton.survivors(there(asked)).cpu(), cpu.survivors(asked))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [*DTYPES[1:], torch.float64])
def test_edited_logits_are_rounded_once(dtype, form):
    case = Case(seed=6, vocab=203)
    logits = torch.zeros(3, 210).to(dtype)[:, 3:206]  # a stride of its own
    logits.copy_(case.logits)
    check_edited(sampling_args(logits, **case.edits("pba", form)[0]))


def test_one_bias_and_one_mask_for_all_rows():
    case = Case(seed=9, vocab=130)
    mask, bias = case.mask("dense")[0], case.logit_bias("dense")[0].clamp(min=-5)
    ids = torch.randperm(130)[:50]
    lists = {"allowed": case.mask("sparse")[0], "logit_bias": (ids.int(), bias[ids])}
    for edits in ({"allowed": mask, "logit_bias": bias}, lists):
        check_edited(sampling_args(case.logits, **edits))


@pytest.mark.parametrize("form", FORMS)
def test_penalties_per_row(form):
    case = Case(seed=8, vocab=130)
    penalties = {
        "repetition_penalty": torch.tensor([1.0, 1.5, 0.7]),
        "presence_penalty": torch.tensor([0.0, -1.0, 2.0]),
        "frequency_penalty": torch.tensor([0.5, 0.0, -0.5]),
    }
    check_edited(sampling_args(case.logits, **penalties, **case.seen(form)))
    if form == "dense":
        marks = {"prompt_mask": torch.from_numpy(case.prompt)}
        check_edited(sampling_args(case.logits, repetition_penalty=2.0, **marks))


def test_biases_of_a_token_add_up_in_their_order():
    """In double 2^70 + 1 - 2^70 is 0, but 2^70 - 2^70 + 1 is 1."""
    ids = torch.tensor([2, 1, 2, 0, 2, 1, 1, -1]).expand(2, -1)
    values = torch.tensor([2.0**70, 2.0**70, 1.0, 0.5, -(2.0**70), -(2.0**70), 1.0, 9.0]).expand(2, -1)
    logits = torch.tensor([[0.0, 0.0, 0.0], [0.0, -0.6, 0.4]])
    for bias in ((ids, values), (ids[0], values[0])):
        rows = check_edited(sampling_args(logits, logit_bias=bias))
        assert rows[0].tolist() == [0.5, 1.0, 0.0]


def test_a_list_of_no_biases():
    none = (torch.empty(2, 0, dtype=torch.int64), torch.empty(2, 0))
    check_edited(sampling_args(torch.randn(2, 70), logit_bias=none))


def test_counts_and_lists_mix():
    """Dense counts beside listed biases, and listed counts beside a dense bias."""
    case = Case(seed=4, vocab=300)
    penalties = {"repetition_penalty": 0.8, "presence_penalty": 0.7, "frequency_penalty": -0.3}
    for seen, bias, allowed in (("dense", "sparse", "sparse"), ("sparse", "dense", "dense")):
        edits = {**case.seen(seen), "logit_bias": case.logit_bias(bias), "allowed": case.mask(allowed)}
        check_edited(sampling_args(case.logits, **penalties, **edits))


def test_no_rows_to_edit():
    counts = TokenCounts(0, 10)
    args = sampling_args(torch.zeros(0, 10), presence_penalty=1.0, token_counts=counts, logprobs=2)
    tokens, logprobs = there_and_back(args)
    assert [x.shape for x in (tokens, *logprobs)] == [(0,), (0,), (0, 2), (0, 2)]


# ---- log-probabilities


@pytest.mark.parametrize("dtype", DTYPES)
def test_logprobs(dtype):
    logits = (torch.randn(2, 97) * 2).to(dtype)
    logits[1] = logits[1].round()  # ties
    check_logprobs(sampling_args(logits, logprobs=20, temperature=0.0))


@pytest.mark.parametrize("vocab", [1, 70])
def test_logprobs_of_all_tokens(vocab):
    check_logprobs(sampling_args(torch.randn(1, vocab), logprobs=vocab, temperature=0.0))


def test_what_is_not_finite_comes_last():
    logits = torch.full((2, 130), -INF)
    logits[0, ::2] = torch.randn(65)
    logits[1, 77] = 0.5
    check_logprobs(sampling_args(logits, logprobs=70, temperature=0.0))


def test_logprobs_of_extreme_logits():
    logits = torch.tensor([[3.4e38, -3.4e38, 1.0], [-3.4e38, -3.4e38, -3.3e38], [0.0, -0.0, -100.0]])
    check_logprobs(sampling_args(logits, logprobs=3, temperature=0.0))


def test_logprobs_are_those_of_the_logits_as_they_came():
    case = Case(seed=3, vocab=97)
    ours, _ = case.edits("pba", "sparse")
    args = sampling_args(case.logits, **ours, temperature=0.3, top_k=9, seeds=2, logprobs=5)
    check_logprobs(args)
    for mine, wanted in zip(there_and_back(args)[1], reference.sample(args)[1], strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-6, atol=2e-6)


# ---- rows that have no token


def test_rows_that_edits_break():
    """NaN and +inf after the edits, nothing left, an id that is none; NaN although it is not allowed."""
    args = rows_that_edits_break(130)
    logits, allowed = args.logits[6:], args.edits.allowed[6:]
    whole = sampling_args(logits, seeds=1, allowed=allowed)
    assert triton.sample(there(args))[0].tolist() == [-1] * 6 + cpu.sample(whole)[0].tolist()
    kept = triton.survivors(there(args._replace(survivors=True)))
    assert kept.any(1).tolist() == [False] * 6 + [True] * 2


def test_an_id_that_is_none_beside_listed_counts():
    """The row's other edits are left out: every program of it sees the id."""
    counts = TokenCounts([[0, 1, 2]] * 2, 70)
    ids, values = torch.tensor([[0, 70], [0, 3]]), torch.ones(2, 2)
    args = sampling_args(
        torch.randn(2, 70), repetition_penalty=1.5, token_counts=counts, logit_bias=(ids, values)
    )
    tokens = triton.sample(there(args))[0].tolist()
    assert tokens[0] == -1
    assert 0 <= tokens[1] < 70


def test_logprobs_of_rows_without_a_softmax():
    """+inf that is not allowed may be drawn around, but has no softmax; a row that edits empty still has one."""
    args = rows_without_a_softmax(100)
    tokens, (logprobs, ids, best) = there_and_back(args)
    healthy = reference.sample(sampling_args(args.logits[3:], seeds=1, logprobs=2))
    assert tokens.tolist() == [-1, -1, -1, -1, healthy[0][1]]
    assert logprobs.isnan().tolist() == [True] * 4 + [False]
    assert (ids[:3] == -1).all()
    assert best[:3].isnan().all()
    assert torch.equal(ids[3:], healthy[1][1])
    torch.testing.assert_close(best[3:], healthy[1][2], rtol=1e-6, atol=2e-6)


if not INTERPRETED:  # whose loops cost too much

    def test_a_row_of_many_blocks():
        case = Case(seed=7, vocab=5000, batch=2, plain=True)
        for n, edge in enumerate((0, 1023, 1024, 4999)):  # where blocks begin and end
            case.logits[:, edge] = 8.0 + n
            case.prompts[0].append(edge)
            case.ids[0, n], case.values[0, n], case.allowed[0, edge] = edge, 0.25 * n, True
        args = sampling_args(case.logits, **case.edits("pba", "sparse")[0], **PARAMETERS["all"], logprobs=40)
        with fixed_blocks(BLOCK=1024):
            check_edited(args)
            check_logprobs(args)
