"""Sampling by the CUDA kernel, token for token the CPU's: emulated, and on a GPU where there is one."""

from __future__ import annotations

import math

import pytest
import torch
from sampling_cases import EXTREME_LOGITS, EXTREME_PARAMETERS, PARAMETERS, sampling_args

from fastattn.backends import cpu, cuda, reference


def check(machine, args, seeds=(1,)):
    """Tokens, and the kept sets, are the CPU's; the tokens under each schedule."""
    expected = cpu.sample(args)[0]
    for seed in seeds:
        tokens = machine.sample(args, seed)
        assert machine.faults() == {}, machine.report()
        assert torch.equal(tokens, expected), f"{tokens} {expected}"
    asked = args._replace(survivors=True)
    kept, wanted = machine.survivors(asked), cpu.survivors(asked)
    assert machine.faults() == {}, machine.report()
    assert torch.equal(kept, wanted), f"{kept.sum(1)} {wanted.sum(1)}"


def rows_of(vocab):
    """(4, vocab) float32: normal, with -inf, with ties, all equal"""
    logits = torch.randn(4, vocab) * 2
    logits[1, 1::3] = -math.inf
    logits[2] = logits[2].round()
    logits[3] = 1.5
    return logits


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("vocab", [1, 64, 203, 1025])
def test_the_tokens_of_the_cpu(machine, vocab, name):
    noise = {"seeds": torch.arange(4) * 2**40 - 5, "positions": torch.arange(4) * 2**33}
    args = sampling_args(rows_of(vocab), **noise, **PARAMETERS[name])
    check(machine, args, seeds=(0, 1) if vocab == 203 else (1,))
    if vocab == 203:
        assert torch.equal(machine.sample(args), reference.sample(args)[0])


@pytest.mark.parametrize(
    ("vocab", "name"), [(9000, "all"), (40000, "top_p"), (128256, "all"), (200000, "plain")]
)
def test_many_blocks_for_a_row(machine, vocab, name):
    logits = torch.randn(1, vocab) * 2
    logits[0, vocab // 2 :: 7] = logits[0, : len(logits[0, vocab // 2 :: 7])]  # ties between blocks
    check(machine, sampling_args(logits, seeds=11, **PARAMETERS[name]))


def test_the_number_of_blocks_does_not_come_in(machine):
    """One block for each of 130 rows, three for each of two."""
    logits = torch.randn(1, 8200).bfloat16().expand(130, -1)
    seeds = torch.arange(130)
    tokens = machine.sample(sampling_args(logits, top_p=0.9, seeds=seeds))
    assert torch.equal(machine.sample(sampling_args(logits[:2], top_p=0.9, seeds=seeds[:2])), tokens[:2])
    assert torch.equal(tokens, cpu.sample(sampling_args(logits, top_p=0.9, seeds=seeds))[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtypes_and_row_strides(machine, dtype):
    logits = torch.randn(4, 150).to(dtype)[:, 3:132]
    per_row = {"top_k": torch.tensor([0, 1, 5, 500]), "top_p": torch.tensor([1.0, 0.5, 0.9, 0.3]).double()}
    check(machine, sampling_args(logits, seeds=3, positions=8, **per_row))


@pytest.mark.parametrize("kind", ["ties", "bf16 grid"])
def test_every_k_and_every_p(machine, kind):
    row = torch.randint(-2, 3, (44,)) / 2 if kind == "ties" else torch.randn(44)
    steps = torch.arange(1, 47)
    logits = row.bfloat16().expand(46, -1)
    check(machine, sampling_args(logits, top_k=steps, seeds=steps))
    check(
        machine,
        sampling_args(logits, top_p=steps.double() / 47, top_k=steps.flip(0), temperature=2.5, seeds=steps),
    )


def test_zeros_are_equal_whatever_their_sign(machine):
    logits = torch.zeros(24, 130)
    logits[:, 5], logits[:, 7] = 1.0, -0.0
    check(machine, sampling_args(logits, top_k=9, temperature=5.0, seeds=torch.arange(24)))
    assert machine.sample(sampling_args(-logits.abs(), temperature=0.0))[0] == 0


def test_extreme_logits(machine):
    for call in EXTREME_PARAMETERS:
        check(machine, sampling_args(EXTREME_LOGITS, seeds=4, **call))


def test_a_row_that_has_no_token_says_why_and_harms_nobody(machine):
    logits = torch.randn(5, 600)
    good = machine.sample(sampling_args(logits, top_p=0.9, seeds=1))
    logits[0, 3], logits[0, 4], logits[2, 599], logits[3] = math.inf, math.nan, math.inf, -math.inf
    args = sampling_args(logits, top_p=0.9, seeds=1)
    assert machine.sample(args).tolist() == [-1, good[1], -2, -3, good[4]]
    kept = machine.survivors(args._replace(survivors=True))
    assert kept.any(1).tolist() == [False, True, False, False, True]
    assert machine.faults() == {}, machine.report()


def test_no_rows(machine):
    assert machine.sample(sampling_args(torch.randn(0, 100))).shape == (0,)


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (sampling_args(torch.zeros(1, 3).double()), "lacks dtype 'float64'"),
        (sampling_args(torch.zeros(1, 1).expand(1, (1 << 22) + 1)), "lacks vocabularies above 4194304"),
        (sampling_args(torch.zeros(1, 3), logprobs=2, allowed=torch.ones(3).bool()), None),
        (sampling_args(torch.zeros(1, 3), survivors=True, logit_bias=torch.zeros(3)), None),
    ],
)
def test_what_it_refuses(args, reason):
    assert cuda._lacks(args) == reason
