"""speculative_sample: whatever the draft, the tokens are the target's; what it may depend on, every error."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import sampling_oracle as oracle
import torch
from scipy.stats import chi2_contingency
from torch import Tensor

import fastattn
from fastattn.sampling import speculative, speculative_sample

VOCAB, DRAWS = 6, 1_000_000
BACKENDS = ["cpu", "reference"]


def random_rows(*shape: int, seed: int, sharpness: float = 1.0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (sharpness * torch.randn(*shape, generator=g)).softmax(-1)


def drafted(rows: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
    """A chain from a model whose next token depends on the last one.

    Args:
        rows: (VOCAB + 1, VOCAB), by the token before; the last row begins.
        seeds: (batch,)

    Returns:
        The tokens before each, and the tokens; (batch, 2) each.
    """
    before = [torch.full_like(seeds, VOCAB)]
    for position in range(2):
        before.append(fastattn.sample(rows.log()[before[-1]], seeds=seeds, positions=position))
    return torch.stack(before[:2], 1), torch.stack(before[1:], 1)


@pytest.mark.parametrize("seed", [101, 102, 103])
def test_chains_have_the_target_s_distribution(seed: int) -> None:
    """Both models are Markov chains: the first two tokens together, in all their 36 combinations.

    The draft draws with the same seeds and positions: noise that is shared would show.
    """
    draft, target = random_rows(VOCAB + 1, VOCAB, seed=1), random_rows(VOCAB + 1, VOCAB, seed=2)
    draft[:, 2] = 0.0  # a token that the draft never proposes, and one that the target never takes
    target[VOCAB, 4] = target[3, 4] = 0.0
    draft, target = draft / draft.sum(1, keepdim=True), target / target.sum(1, keepdim=True)
    seeds = torch.arange(DRAWS) + seed * 2**40
    before, tokens = drafted(draft, seeds)
    contexts = torch.cat((before, tokens[:, -1:]), 1)  # (DRAWS, 3)
    made, accepted = speculative_sample(draft[before], tokens, target[contexts], seeds)

    assert set(accepted.tolist()) == {0, 1, 2}
    shares = torch.minimum(draft[VOCAB], target[VOCAB]).sum()
    assert abs(float((accepted > 0).double().mean()) - float(shares)) < 4 * 0.5 / math.sqrt(DRAWS)
    first, second = made[:, 0], made[:, 1].clone()
    alone = accepted == 0  # the chain goes on from the target itself, by other means
    assert bool((second[alone] == -1).all())
    weights = target[first[alone]].double()
    g = torch.Generator().manual_seed(seed)
    second[alone] = torch.multinomial(weights, 1, generator=g)[:, 0]
    joint = (target[VOCAB, :, None] * target[:VOCAB]).double()
    assert oracle.g_test((first * VOCAB + second).numpy(), (joint / joint.sum()).flatten().numpy()) > 0.001


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_last_and_resampled_tokens(dtype: torch.dtype) -> None:
    """Where everything is accepted the last one is the target's; rows need not sum to 1."""
    draws = 50_000
    draft, target = (random_rows(VOCAB, seed=s).to(dtype) for s in (3, 4))
    tokens = fastattn.sample(draft.log().float().expand(draws, VOCAB), seeds=torch.arange(draws))[:, None]
    rows = torch.stack((target, (draft / 3).to(dtype))).expand(draws, 2, VOCAB)
    made, accepted = speculative_sample(
        (2 * draft).expand(draws, 1, VOCAB), tokens, rows, torch.arange(draws)
    )
    exact = target.double() / target.double().sum()
    assert oracle.g_test(made[:, 0].numpy(), exact.numpy()) > 0.001
    last = made[accepted == 1, 1]
    bonus = (draft / 3).to(dtype).double()
    assert len(last) > 10_000
    assert oracle.g_test(last.numpy(), (bonus / bonus.sum()).numpy()) > 0.001


def test_same_models_accept_everything() -> None:
    probs = random_rows(500, 4, 50, seed=5)
    tokens = probs[:, :3].argmin(-1)  # whatever was drafted
    made, accepted = speculative_sample(probs[:, :3], tokens, probs, seeds=3)
    assert accepted.tolist() == [3] * 500
    assert torch.equal(made[:, :3], tokens)


def test_greedy_targets() -> None:
    """One-hot rows: the longest prefix that agrees, then the target's own token. FlashInfer's test of its kernel."""
    target = torch.zeros(4, 4, 9)
    ids = torch.tensor([[1, 2, 3, 4]]).expand(4, 4)
    target.scatter_(2, ids[..., None], 1.0)
    draft = torch.full((4, 3, 9), 1 / 9)
    tokens = torch.tensor([[1, 2, 3], [1, 2, 0], [1, 0, 3], [0, 2, 3]], dtype=torch.int32)
    made, accepted = speculative_sample(draft, tokens, target, seeds=torch.arange(4))
    assert accepted.tolist() == [3, 2, 1, 0]
    assert made.tolist() == [[1, 2, 3, 4], [1, 2, 3, -1], [1, 2, -1, -1], [1, -1, -1, -1]]
    assert made.dtype == accepted.dtype == torch.int64


def test_rejected_tokens_do_not_come_back() -> None:
    """max(p - q, 0) has nothing where the draft had too much."""
    draft, target = torch.tensor([0.9, 0.1, 0.0]), torch.tensor([0.3, 0.3, 0.4])
    made, accepted = speculative_sample(
        draft.expand(20_000, 1, 3), torch.zeros(20_000, 1, dtype=torch.int64), target.expand(20_000, 2, 3),
        torch.arange(20_000),
    )  # fmt: skip
    assert abs(int(accepted.sum()) - 20_000 / 3) < 300  # 4.5 standard deviations
    assert set(made[accepted == 0, 0].tolist()) == {1, 2}


def test_nothing_drafted() -> None:
    target = random_rows(100, 1, 30, seed=6)
    empty = torch.zeros(100, 0, 30), torch.zeros(100, 0, dtype=torch.int64)
    made, accepted = speculative_sample(*empty, target, seeds=torch.arange(100))
    assert made.shape == (100, 1)
    assert accepted.tolist() == [0] * 100
    made, accepted = speculative_sample(empty[0][:0], empty[1][:0], target[:0], seeds=1)
    assert made.shape == (0, 1)


def test_where_rounding_leaves_nothing() -> None:
    """p and q are one float apart at one token: if it is rejected, max(p - q, 0) may be all zeros."""
    q = torch.tensor([0.5, 0.5])
    p = torch.tensor([0.0, 0.5])  # renormalised: certainly 1, and never 0
    rows = torch.stack((p, p)).expand(8, 2, 2)
    made, _ = speculative_sample(
        q.expand(8, 1, 2), torch.zeros(8, 1, dtype=torch.int64), rows, torch.arange(8)
    )
    assert made[:, 0].tolist() == [1] * 8
    from unittest import mock

    refuse = mock.patch(
        "fastattn.sampling.speculative._coins", lambda chance, *_: torch.zeros_like(chance, dtype=torch.bool)
    )
    with refuse:  # a coin that chance 1 never shows: all that is left of p is p itself
        rows = torch.stack((q, q)).expand(64, 2, 2)
        made, _ = speculative_sample(
            q.expand(64, 1, 2), torch.zeros(64, 1, dtype=torch.int64), rows, torch.arange(64),
            backend="reference",
        )  # fmt: skip
    assert set(made[:, 0].tolist()) == {0, 1}


# ---- what a row may depend on


def call(batch: int, n: int = 4, vocab: int = 200) -> dict[str, Any]:
    draft = random_rows(batch, n, vocab, seed=7)
    g = torch.Generator().manual_seed(8)
    return {
        "draft_probs": draft,
        "draft_tokens": torch.multinomial(draft.flatten(0, 1), 1, generator=g).view(batch, n),
        "target_probs": (
            draft.repeat_interleave(2, 1)[:, : n + 1] + 0.3 * random_rows(batch, n + 1, vocab, seed=9)
        ),
        "seeds": torch.randint(-(2**62), 2**62, (batch,), generator=g),
        "positions": torch.randint(0, 2**62, (batch,), generator=g),
    }


def test_rows_are_independent_of_batch_and_threads(isa: str, threads: None) -> None:
    inputs = call(40)
    made, accepted = speculative_sample(**inputs)
    assert 0 < int(accepted.sum()) < 160
    shuffle = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    shuffled = speculative_sample(**{name: x[shuffle] for name, x in inputs.items()})
    assert torch.equal(shuffled.tokens, made[shuffle])
    for row in range(40):
        alone = speculative_sample(**{name: x[row : row + 1] for name, x in inputs.items()})
        assert torch.equal(alone.tokens[0], made[row])
        assert int(alone.accepted) == int(accepted[row])
    for nthreads in (1, 3):
        torch.set_num_threads(nthreads)
        assert torch.equal(speculative_sample(**inputs).tokens, made)
    reference = speculative_sample(**inputs, backend="reference")
    assert torch.equal(reference.tokens, made)


@pytest.mark.parametrize("vocab", [1, 33, 5003])
@pytest.mark.parametrize(
    ("draft", "target"),
    [
        (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16),
        (torch.float32, torch.float16), (torch.float64, torch.float32),
    ],
)  # fmt: skip
def test_the_kernel_does_what_the_definition_says(
    isa: str, vocab: int, draft: torch.dtype, target: torch.dtype
) -> None:
    inputs = call(12, n=3, vocab=vocab)
    inputs["draft_probs"] = (3 * inputs["draft_probs"]).to(draft)
    inputs["target_probs"] = inputs["target_probs"].to(target)
    for name, share in (("draft_probs", 3.0), ("target_probs", 0.7)):  # accepted or not, by chance
        inputs[name][:, :3].scatter_(2, inputs["draft_tokens"][..., None], share)
    inputs["target_probs"][:, :, ::2] *= 0.5
    expected = speculative._composed(**inputs, backend="cpu")
    assert vocab == 1 or len(expected.accepted.unique()) > 2
    strided = {  # rows apart, the vocabulary apart, a tensor that repeats
        "draft_probs": inputs["draft_probs"].repeat(1, 1, 2)[:, :, :vocab],
        "target_probs": inputs["target_probs"].transpose(1, 2).contiguous().transpose(1, 2),
        "draft_tokens": inputs["draft_tokens"].int().t().contiguous().t(),
    }
    for changes in ({}, strided):
        made = speculative_sample(**(inputs | changes))
        assert torch.equal(made.tokens, expected.tokens)
        assert torch.equal(made.accepted, expected.accepted)


def test_numbers_stand_for_every_row() -> None:
    inputs = call(5) | {"seeds": 9, "positions": 3}
    same = inputs | {"seeds": torch.full((5,), 9), "positions": torch.full((5,), 3)}
    assert torch.equal(speculative_sample(**inputs).tokens, speculative_sample(**same).tokens)


@pytest.mark.parametrize("by", ["seeds", "positions"])
def test_neighbouring_calls_are_independent(by: str) -> None:
    """Of two draws in a row, whether the token was accepted, and which came."""
    draws = 200_000
    draft, target = (random_rows(5, seed=s) for s in (10, 11))
    stream = {"seeds": torch.full((draws,), 5), "positions": 0} | {by: torch.arange(draws)}
    tokens = torch.multinomial(draft, draws, replacement=True, generator=torch.Generator().manual_seed(1))[
        :, None
    ]
    made, accepted = speculative_sample(
        draft.expand(draws, 1, 5), tokens, target.expand(draws, 2, 5), stream["seeds"], stream["positions"]
    )
    outcome = (made[:, 0] + 5 * accepted).numpy()
    _, outcome = np.unique(outcome, return_inverse=True)
    kinds = int(outcome.max()) + 1
    assert kinds > 5
    for lag in (1, 2):
        pairs = np.zeros((kinds, kinds))
        np.add.at(pairs, (outcome[:-lag], outcome[lag:]), 1)
        assert chi2_contingency(pairs).pvalue > 0.001, lag


# ---- errors


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"draft_probs": torch.ones(2, 9)}, ValueError, r"draft_probs: expected \(batch, n, vocab\), got \(2, 9\)"),
        ({"draft_tokens": torch.zeros(2, 3).long()}, ValueError, r"draft_tokens: expected \(batch=2, n=4\), got \(2, 3\)"),
        ({"target_probs": torch.ones(2, 4, 9)}, ValueError, r"target_probs: expected \(batch=2, places=5, vocab=9\)"),
        ({"draft_tokens": torch.full((2, 4), 9)}, ValueError, r"draft_tokens: row 0, token 0: .*\[0, 9\), got 9"),
        ({"draft_tokens": torch.tensor([[0] * 4, [0, 0, -1, 0]])}, ValueError, "draft_tokens: row 1, token 2: .* got -1"),
        ({"draft_tokens": torch.zeros(2, 4)}, TypeError, "draft_tokens: expected dtype int32, int64, got float32"),
        ({"draft_probs": torch.ones(2, 4, 9).long()}, TypeError, "draft_probs: expected dtype float32"),
        ({"target_probs": torch.ones(2, 5, 9).long()}, TypeError, "target_probs: expected dtype float32"),
        ({"draft_probs": torch.ones(2, 4, 0), "target_probs": torch.ones(2, 5, 0)}, ValueError, "target_probs: expected at least"),
        ({"seeds": 2**63}, ValueError, "seeds: expected an integer"),
        ({"seeds": torch.arange(3)}, ValueError, r"seeds: expected \(batch=2\), got \(3,\)"),
        ({"positions": -1}, ValueError, "positions: expected an integer"),
        ({"backend": "abacus"}, ValueError, "backend: expected one of"),
        ({"draft_tokens": torch.zeros(2, 4, device="meta").long()}, ValueError, "draft_tokens: expected the device of"),
    ],
)  # fmt: skip
def test_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    inputs: dict[str, Any] = {
        "draft_probs": torch.ones(2, 4, 9), "draft_tokens": torch.zeros(2, 4).long(),
        "target_probs": torch.ones(2, 5, 9), "seeds": 0,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        speculative_sample(**(inputs | changes))


@pytest.mark.parametrize("name", ["draft_probs", "target_probs"])
@pytest.mark.parametrize(
    ("value", "problem"),
    [(math.nan, "has NaN"), (-1.0, "has a negative value, -1.0"), (math.inf, r"has \+inf")],
)
def test_bad_rows(name: str, value: float, problem: str) -> None:
    inputs = call(3)
    inputs[name][2, 1, 5] = value
    with pytest.raises(ValueError, match=f"{name}: row 2, token 1 {problem}"):
        speculative_sample(**inputs)
    inputs[name][2, 1] = 0.0
    with pytest.raises(ValueError, match=f"{name}: row 2, token 1 has nothing positive"):
        speculative_sample(**inputs)


def test_a_token_that_cannot_have_been_drafted() -> None:
    inputs = call(3)
    inputs["draft_probs"][1, 2, inputs["draft_tokens"][1, 2]] = 0.0
    with pytest.raises(
        ValueError, match="draft_tokens: row 1, token 2: expected a token that its draft gives"
    ):
        speculative_sample(**inputs)
