"""Penalties, logit_bias, allowed and log-probabilities by the CUDA kernels: the CPU's tokens and kept sets."""

from __future__ import annotations

import pytest
import torch
from sampling_cases import (
    INF,
    PARAMETERS,
    WHICH,
    Case,
    filter_combinations,
    rows_that_edits_break,
    rows_without_a_softmax,
    sampling_args,
)  # fmt: skip
from test_cuda_sampling import check, rows_of

from fastattn import TokenCounts
from fastattn.backends import cpu, reference

FORMS = ["dense", "sparse"]


def check_logprobs(machine, args, seed=1):
    """Tokens and ids are the CPU's, log-probabilities as near to the definition's as the CPU's."""
    tokens, found = machine.sample_with_logprobs(args, seed)
    assert machine.faults() == {}, machine.report()
    expected, (logprobs, ids, best) = cpu.sample(args)
    assert torch.equal(tokens, expected)
    assert torch.equal(found[1], ids)
    torch.testing.assert_close(found[0], logprobs, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(found[2], best, rtol=1e-6, atol=2e-6)


# ---- edits


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("vocab", [1, 97, 1025])
def test_edited_rows_beside_plain_ones(machine, vocab, form, which):
    case = Case(seed=vocab, vocab=vocab, batch=4, plain=True)
    noise = {"seeds": torch.arange(4) - 2, "positions": torch.arange(4) * 2**33}
    ours, _ = case.edits(which, form)
    args = sampling_args(case.logits, **ours, **noise, temperature=1.5, top_p=0.95)
    check(machine, args, seeds=(0, 1) if vocab == 97 else (1,))
    alone = machine.sample(args._replace(edits=None))
    assert machine.sample(args)[3] == alone[3]


@pytest.mark.parametrize("form", FORMS)
def test_all_edits_with_every_filter_combination(machine, form):
    case = Case(seed=5, vocab=300, batch=4, plain=True)
    ours, _ = case.edits("pba", form)
    for filters in filter_combinations():
        check(machine, sampling_args(case.logits, **ours, **filters, seeds=9))


@pytest.mark.parametrize("which", ["p", "pba"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_edited_16_bit_logits_are_not_rounded_again(machine, dtype, form, which):
    case = Case(seed=6, vocab=203)
    logits = torch.zeros(3, 210).to(dtype)[:, 3:206]  # a stride of its own
    logits.copy_(case.logits)
    ours, _ = case.edits(which, form)
    check(machine, sampling_args(logits, **ours, seeds=2, temperature=0.6))
    check(machine, sampling_args(logits, **ours, top_k=5))


@pytest.mark.parametrize(
    ("vocab", "batch", "form", "dtype"),
    [
        (32000, 3, "dense", torch.bfloat16),
        (32000, 3, "sparse", torch.float32),
        (128256, 1, "sparse", torch.float16),
    ],
)
def test_edits_and_logprobs_of_many_blocks(machine, vocab, batch, form, dtype):
    case = Case(seed=7, vocab=vocab, batch=batch, plain=batch > 1)
    for n, edge in enumerate((0, 4095, 4096, vocab - 1)):  # where blocks begin and end
        case.logits[:, edge] = 8.0 + n
        case.prompts[0].append(edge)
        case.ids[0, n], case.values[0, n], case.allowed[0, edge] = edge, 0.25 * n, True
    case.ids[0, 5], case.values[0, 5] = vocab - 1, 0.5
    ours, _ = case.edits("pba", form)
    logits = case.logits.to(dtype)
    args = sampling_args(logits, **ours, **PARAMETERS["all"], seeds=torch.arange(batch))
    check(machine, args)
    check_logprobs(machine, args._replace(logprobs=11))


def test_one_bias_and_one_mask_for_all_rows(machine):
    case = Case(seed=9, vocab=130)
    mask, bias = case.mask("dense")[0], case.logit_bias("dense")[0].clamp(min=-5)
    ids = torch.randperm(130)[:50]
    lists = {"allowed": case.mask("sparse")[0], "logit_bias": (ids.int(), bias[ids])}
    for edits in ({"allowed": mask, "logit_bias": bias}, lists):
        check(machine, sampling_args(case.logits.nan_to_num(neginf=-9.0), **edits, seeds=torch.arange(3)))


@pytest.mark.parametrize("form", FORMS)
def test_penalties_per_row(machine, form):
    case = Case(seed=8, vocab=500)
    penalties = {
        "repetition_penalty": torch.tensor([1.0, 1.5, 0.7]),
        "presence_penalty": torch.tensor([0.0, -1.0, 2.0]),
        "frequency_penalty": torch.tensor([0.5, 0.0, -0.5]),
    }
    check(machine, sampling_args(case.logits, **penalties, **case.seen(form), seeds=1))
    check(
        machine, sampling_args(case.logits, repetition_penalty=2.0, prompt_mask=torch.from_numpy(case.prompt))
    )


def test_biases_of_a_token_add_up_in_their_order(machine):
    """In double 2^70 + 1 - 2^70 is 0, but 2^70 - 2^70 + 1 is 1."""
    ids = torch.tensor([2, 1, 2, 0, 2, 1, 1, -1]).expand(2, -1)
    values = torch.tensor([2.0**70, 2.0**70, 1.0, 0.5, -(2.0**70), -(2.0**70), 1.0, 9.0]).expand(2, -1)
    logits = torch.tensor([[0.0, 0.0, 0.0], [0.0, -0.6, 0.4]])
    for bias in ((ids, values), (ids[0], values[0])):
        args = sampling_args(logits, logit_bias=bias, temperature=0.0)
        check(machine, args)
        assert machine.sample(args).tolist() == [1, 0]


def test_counts_and_lists_mix(machine):
    """Dense counts beside listed biases, and listed counts beside a dense bias."""
    case = Case(seed=4, vocab=700)
    penalties = {"repetition_penalty": 0.8, "presence_penalty": 0.7, "frequency_penalty": -0.3}
    for seen, bias, allowed in (("dense", "sparse", "sparse"), ("sparse", "dense", "dense")):
        edits = {**case.seen(seen), "logit_bias": case.logit_bias(bias), "allowed": case.mask(allowed)}
        check(machine, sampling_args(case.logits, **penalties, **edits, seeds=3, top_k=40))


def test_no_rows_to_edit(machine):
    counts = TokenCounts(0, 10)
    args = sampling_args(torch.zeros(0, 10), presence_penalty=1.0, token_counts=counts, logprobs=2)
    tokens, logprobs = machine.sample_with_logprobs(args)
    assert [x.shape for x in (tokens, *logprobs)] == [(0,), (0,), (0, 2), (0, 2)]


# ---- log-probabilities


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", [1, 97, 1025])
def test_logprobs(machine, vocab, dtype):
    logits = rows_of(vocab).to(dtype)
    logits[:, ::5] = logits[:, :1].clone()
    for n in sorted({1, min(7, vocab), vocab}):
        args = sampling_args(logits, logprobs=n, seeds=4, **PARAMETERS["all"])
        check_logprobs(machine, args, seed=n % 3)
        definition = reference.sample(args)[1]
        found = machine.sample_with_logprobs(args)[1]
        for mine, wanted in zip(found, definition, strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("n", [1, 40, 300, 600])
def test_what_is_not_finite_comes_last(machine, n):
    logits = torch.full((2, 600), -INF)
    logits[0, ::2] = torch.randn(300)
    logits[1, 77] = 0.5
    check_logprobs(machine, sampling_args(logits, logprobs=n, temperature=0.0))


def test_logprobs_of_extreme_logits(machine):
    logits = torch.tensor([[3.4e38, -3.4e38, 1.0], [-3.4e38, -3.4e38, -3.3e38], [0.0, -0.0, -100.0]])
    check_logprobs(machine, sampling_args(logits, logprobs=3, temperature=0.0))


def test_logprobs_are_those_of_the_logits_as_they_came(machine):
    case = Case(seed=3, vocab=400)
    ours, _ = case.edits("pba", "sparse")
    check_logprobs(machine, sampling_args(case.logits, **ours, temperature=0.3, top_p=0.5, logprobs=5))


# ---- rows that have no token


def test_rows_that_edits_break(machine):
    """NaN and +inf after the edits, nothing left, an id that is none; NaN although it is not allowed."""
    args = rows_that_edits_break(5000)
    ids, values = (x[7:] for x in args.edits.logit_bias)
    good = machine.sample(sampling_args(args.logits[7:], seeds=1, logit_bias=(ids, values)))
    expected = [
        -4,
        -5,
        -6,
        -4,
        -4,
        -4,
        cpu.sample(sampling_args(args.logits[6:], seeds=1, allowed=args.edits.allowed[6:]))[0][0],
        good[0],
    ]
    assert machine.sample(args).tolist() == expected
    kept = machine.survivors(args._replace(survivors=True))
    assert kept.any(1).tolist() == [False] * 6 + [True] * 2
    assert machine.faults() == {}, machine.report()


def test_logprobs_of_rows_without_a_softmax(machine):
    """+inf that is not allowed may be drawn around, but has no softmax; a row that edits empty still has one."""
    args = rows_without_a_softmax(300)
    tokens, (logprobs, ids, best) = machine.sample_with_logprobs(args)
    assert machine.faults() == {}, machine.report()
    healthy = reference.sample(sampling_args(args.logits[3:], seeds=1, logprobs=2))
    assert tokens.tolist() == [-4, -2, -6, -6, healthy[0][1]]
    assert logprobs.isnan().tolist() == [True] * 4 + [False]
    assert (ids[:3] == -1).all()
    assert best[:3].isnan().all()
    assert torch.equal(ids[3:], healthy[1][1])
    torch.testing.assert_close(best[3:], healthy[1][2], rtol=1e-6, atol=2e-6)
