"""Triton's sampling: what is kept and drawn is what the CPU keeps and draws, token for token."""

from __future__ import annotations

import math

import pytest
import torch
from device import DTYPES, INTERPRETED, there
from sampling_cases import EXTREME_LOGITS, EXTREME_PARAMETERS, PARAMETERS, sampling_args

from fastattn.backends import cpu, reference, triton
from fastattn.kernels import launch
from fastattn.kernels.launch import fixed_blocks


@pytest.fixture(autouse=True)
def small_blocks():
    with fixed_blocks(BLOCK=128):
        yield


def check_kept(args):
    """The kept sets are the CPU's."""
    args = args._replace(survivors=True)
    kept, wanted = triton.survivors(there(args)).cpu(), cpu.survivors(args)
    assert torch.equal(kept, wanted), f"{kept.sum(1)} {wanted.sum(1)}"


def check(args):
    """Tokens, and the kept sets, are the CPU's."""
    expected, tokens = cpu.sample(args)[0], triton.sample(there(args))[0].cpu()
    assert torch.equal(tokens, expected), f"{tokens} {expected}"
    check_kept(args)


def one_call(logits, parameters):
    """Every row with each of these parameters: a launch costs an emulator more than a row."""
    off = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    columns = {
        name: torch.tensor([given.get(name, value) for given in parameters for _ in logits])
        for name, value in off.items()
    }
    columns |= {name: x.double() for name, x in columns.items() if name != "top_k"}
    rows = len(logits) * len(parameters)
    noise = {"seeds": torch.arange(rows) * 2**40 - 5, "positions": torch.arange(rows) * 2**33}
    return sampling_args(logits.repeat(len(parameters), 1), **columns, **noise)


def test_the_tokens_of_the_cpu():
    logits = torch.randn(2, 203) * 2
    logits[1] = logits[1].round()  # ties
    logits[1, ::3] = -math.inf
    args = one_call(logits, list(PARAMETERS.values()))
    check(args)
    assert torch.equal(cpu.sample(args)[0], reference.sample(args)[0])


def test_every_k_and_every_p():
    steps = torch.arange(1, 11)
    logits = (torch.randint(-2, 3, (10,)) / 2).expand(20, -1)
    shares = torch.cat([torch.ones(10), steps / 11]).double()
    check_kept(sampling_args(logits, top_k=torch.cat([steps, 0 * steps]), top_p=shares, temperature=2.5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_and_row_strides(dtype):
    logits = torch.randn(4, 150).to(dtype)[:, 3:132]
    per_row = {"top_k": torch.tensor([0, 1, 5, 500]), "top_p": torch.tensor([1.0, 0.5, 0.9, 0.3]).double()}
    check(sampling_args(logits, seeds=3, positions=8, **per_row))


def test_float64_is_rounded_to_float32():
    logits = torch.randn(3, 129).double()
    args = sampling_args(logits, seeds=3, top_p=0.9)
    expected = cpu.sample(args._replace(logits=logits.float()))[0]
    assert torch.equal(triton.sample(there(args))[0].cpu(), expected)


def test_zeros_are_equal_whatever_their_sign():
    logits = torch.zeros(2, 130)
    logits[:, 5], logits[:, 7] = 1.0, -0.0
    check(sampling_args(logits, top_k=9, temperature=5.0, seeds=torch.arange(2)))


def test_a_row_that_has_no_token_is_minus_one_and_harms_nobody():
    logits = torch.randn(5, 100)
    args = sampling_args(logits, top_p=0.9, seeds=1)
    good = triton.sample(there(args))[0].tolist()
    logits[0, 3], logits[2, 99], logits[3] = math.nan, math.inf, -math.inf
    assert triton.sample(there(args))[0].tolist() == [-1, good[1], -1, -1, good[4]]
    kept = triton.survivors(there(args._replace(survivors=True)))
    assert kept.any(1).tolist() == [False, True, False, False, True]


@pytest.mark.parametrize("vocab", [1, 3, 129])
def test_small_vocabularies(vocab):
    check(sampling_args(torch.randn(2, vocab), seeds=torch.arange(2), top_p=0.7, top_k=2))


def test_extreme_logits():
    check(one_call(EXTREME_LOGITS, EXTREME_PARAMETERS))


if not INTERPRETED:  # Triton's tuner wants a device

    def test_the_tuned_choice_draws_the_same_tokens(monkeypatch):
        monkeypatch.setattr(launch, "_fixed", {})
        args = there(sampling_args(torch.randn(2, 300), seeds=5, top_p=0.8, top_k=40))
        expected = triton.sample(args)[0]
        monkeypatch.setenv("FASTATTN_TRITON_AUTOTUNE", "1")
        assert torch.equal(triton.sample(args)[0], expected)
