"""Triton's sampling: what is kept and drawn is what the definition keeps and draws, token for token."""

from __future__ import annotations

import math

import pytest
import torch
from device import DTYPES, INTERPRETED, there

from fastattn import sample
from fastattn.kernels import launch
from fastattn.kernels.launch import fixed_blocks

PARAMETERS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "greedy": {"temperature": 0.0},
    "uniform": {"temperature": math.inf},
    "cold": {"temperature": 1e-30},
    "top_k": {"top_k": 7},
    "top_k 1": {"top_k": 1},
    "top_p": {"top_p": 0.8},
    "top_p 0": {"top_p": 0.0},
    "min_p": {"min_p": 0.2},
    "all": {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
}


@pytest.fixture(autouse=True)
def small_blocks():
    with fixed_blocks(BLOCK=64):
        yield


def check(logits, **call):
    expected = sample(logits, backend="reference", **call)
    tokens = sample(there(logits), backend="triton", **there(call)).cpu()
    assert torch.equal(tokens, expected), f"{tokens} {expected}"


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_tokens_of_the_definition(name):
    logits = torch.randn(6, 203) * 2
    logits[1, ::3] = -math.inf
    logits[2] = logits[2].round()  # ties
    check(logits, seeds=torch.arange(6) * 2**40 - 5, positions=torch.arange(6) * 2**33, **PARAMETERS[name])


@pytest.mark.parametrize("name", ["top_k", "top_p", "min_p"])
def test_the_kept_sets(name):
    """Eight tokens of almost the same weight: one kept too many, or too few, is soon drawn or missed."""
    rows = 32
    logits = torch.randn(rows, 8) * 0.2
    value = (
        torch.arange(rows) % 8 + 1
        if name == "top_k"
        else torch.linspace(0.05, 0.99, rows, dtype=torch.float64)
    )
    check(logits, seeds=torch.arange(rows), **{name: value})


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_dtypes_and_row_strides(dtype):
    logits = torch.randn(4, 150).to(dtype)
    logits = logits.float().to(dtype)[:, :129]
    check(
        logits,
        seeds=3,
        positions=8,
        top_k=torch.tensor([0, 1, 5, 500]),
        top_p=torch.tensor([1.0, 0.5, 0.9, 0.3]),
    )


def test_top_k_keeps_the_lower_ids_of_ties():
    logits = torch.zeros(200, 130)
    logits[:, 5] = 1.0
    logits[:, 7] = -0.0
    tokens = sample(
        there(logits[:24]), top_k=4, seeds=there(torch.arange(24)), temperature=5.0, backend="triton"
    )
    assert set(tokens.tolist()) <= {0, 1, 2, 5}
    check(logits[:24], top_k=4, seeds=torch.arange(24), temperature=5.0)


def test_a_row_that_has_no_token_is_minus_one_and_harms_nobody():
    logits = torch.randn(5, 100)
    good = sample(there(logits), seeds=1, top_p=0.9, backend="triton").tolist()
    logits[0, 3], logits[2, 99], logits[3] = math.nan, math.inf, -math.inf
    tokens = sample(there(logits), seeds=1, top_p=0.9, backend="triton").tolist()
    assert tokens == [-1, good[1], -1, -1, good[4]]


@pytest.mark.parametrize("vocab", [1, 3, 64, 65])
def test_small_vocabularies(vocab):
    check(torch.randn(3, vocab), seeds=torch.arange(3), top_p=0.7, top_k=2)


def test_extreme_logits():
    logits = torch.tensor([[3.4e38, -3.4e38, 1.0], [-3.4e38, -3.4e38, -3.3e38], [1e-45, 0.0, -1e-45]])
    for call in (
        {},
        {"top_p": 0.5},
        {"min_p": 0.5},
        {"temperature": 1e-38},
        {"temperature": 1e30, "top_k": 2},
    ):
        check(logits, seeds=4, **call)


if not INTERPRETED:  # Triton's tuner wants a device

    def test_the_tuned_choice_draws_the_same_tokens(monkeypatch):
        monkeypatch.setattr(launch, "_fixed", {})
        logits = torch.randn(2, 300)
        expected = sample(there(logits), seeds=5, top_p=0.8, top_k=40, backend="triton")
        monkeypatch.setenv("FASTATTN_TRITON_AUTOTUNE", "1")
        assert torch.equal(sample(there(logits), seeds=5, top_p=0.8, top_k=40, backend="triton"), expected)
