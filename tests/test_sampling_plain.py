"""fastattn.sample's quick way in, csrc/plain_sampling.cpp: it draws what the long way draws, or leaves the call to it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import TokenCounts

DRAW = sys.modules["fastattn.sampling.draw"]
BATCH, VOCAB = 20, 301  # more rows than the quick way has room for without asking for memory
g = torch.Generator().manual_seed(0)
LOGITS = 3 * torch.randn(BATCH, VOCAB, generator=g)
COUNTS = torch.poisson(0.1 * torch.ones(BATCH, VOCAB), generator=g).int()
PROMPT = torch.rand(BATCH, VOCAB, generator=g) < 0.1
IDS, VALUES = torch.randint(-1, VOCAB, (BATCH, 9), generator=g), torch.randn(BATCH, 9, generator=g)
WORDS = torch.randint(-(2**31), 2**31, (BATCH, 10), generator=g).int()


def uniform(low: float, high: float) -> Tensor:
    return low + (high - low) * torch.rand(BATCH, generator=g)


def seen() -> TokenCounts:
    counts = TokenCounts([row.nonzero()[:, 0].tolist() for row in PROMPT], VOCAB)
    for row in torch.randint(0, VOCAB, (40, BATCH), generator=torch.Generator().manual_seed(1)):
        counts.add(row)
    return counts


PENALTIES = {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2}
PLAIN: dict[str, dict[str, Any]] = {
    "nothing": {},
    "numbers": {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "positions": 2**62},
    "integers": {"temperature": 1, "top_p": 1, "min_p": 0},
    "greedy": {"temperature": 0},
    "tensors": {
        "temperature": uniform(0.5, 2).double(), "top_k": torch.randint(-1, 50, (BATCH,), generator=g),
        "top_p": uniform(0.5, 1).double(), "min_p": uniform(0, 0.1).double(),
        "seeds": torch.randint(-(2**62), 2**62, (BATCH,), generator=g), "positions": torch.arange(BATCH),
    },
    "narrow tensors": {
        "temperature": uniform(0.5, 2), "top_k": torch.randint(-1, 50, (BATCH,), generator=g).int(),
        "top_p": uniform(0.5, 1), "min_p": uniform(0, 0.1), "seeds": torch.arange(BATCH).int() - 9,
        "positions": torch.arange(BATCH).int(),
    },
    "token counts": {**PENALTIES, "token_counts": seen()},
    "dense counts": {**PENALTIES, "token_counts": COUNTS, "prompt_mask": PROMPT},
    "shared counts": {"frequency_penalty": 0.2, "token_counts": COUNTS[0]},
    "prompt alone": {"repetition_penalty": uniform(0.5, 2), "prompt_mask": PROMPT},
    "dense bias": {"logit_bias": torch.randn(BATCH, VOCAB, generator=g)},
    "shared bias": {"logit_bias": torch.randn(VOCAB, generator=g)},
    "listed bias": {"logit_bias": (IDS, VALUES)},
    "shared list": {"logit_bias": (IDS[0], VALUES[0])},
    "allowed": {"allowed": torch.rand(BATCH, VOCAB, generator=g) < 0.5},
    "shared mask": {"allowed": torch.rand(VOCAB, generator=g) < 0.5},
    "packed mask": {"allowed": WORDS},
    "log-probabilities": {"return_logprobs": 5, "top_p": 0.9},
    "all log-probabilities": {"return_logprobs": VOCAB, "logit_bias": (IDS, VALUES)},
    "everything": {**PENALTIES, "token_counts": seen(), "logit_bias": (IDS, VALUES), "allowed": WORDS, "top_p": 0.9},
}  # fmt: skip
LONG: dict[str, dict[str, Any]] = {
    "half temperatures": {"temperature": uniform(0.5, 2).half()},
    "strided temperatures": {"temperature": uniform(0.5, 2).double().repeat_interleave(2)[::2]},
    "long counts": {**PENALTIES, "token_counts": COUNTS.long(), "prompt_mask": PROMPT},
    "strided mask": {"allowed": (torch.rand(VOCAB, BATCH, generator=g) < 0.5).t()},
    "double bias": {"logit_bias": torch.randn(VOCAB, generator=g).double()},
    "penalties that are off": {"repetition_penalty": 1, "token_counts": COUNTS},
}


def answers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the quick way says from now on."""
    said: list[Any] = []
    inner: Callable[..., Any] = DRAW.plain_sample

    def listening(*args: Any) -> Any:
        said.append(inner(*args))
        return said[-1]

    monkeypatch.setattr(DRAW, "plain_sample", listening)
    return said


@pytest.mark.parametrize("name", [*PLAIN, *LONG])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_both_ways_draw_the_same(monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype) -> None:
    call = {"seeds": 3} | (PLAIN | LONG)[name]
    for logits in (LOGITS.to(dtype), LOGITS.to(dtype)[:1].expand(BATCH, VOCAB)):
        with monkeypatch.context() as patch:
            said = answers(patch)
            quick = fastattn.sample(logits, **call)
            assert [x is not None for x in said] == [name in PLAIN]
            patch.setattr(DRAW, "plain_sample", None)
            slow = fastattn.sample(logits, **call)
        assert type(quick) is type(slow)
        for ours, theirs in zip(quick, slow) if isinstance(quick, tuple) else [(quick, slow)]:
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)


def test_fresh_seeds_are_the_same_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    quick = [fastattn.sample(LOGITS[:n]) for n in (BATCH, 1, BATCH)]
    assert not torch.equal(quick[0], quick[2])
    monkeypatch.setattr(DRAW, "plain_sample", None)
    torch.manual_seed(5)
    for n, tokens in zip((BATCH, 1, BATCH), quick):
        assert torch.equal(fastattn.sample(LOGITS[:n]), tokens)


def test_results_are_fresh() -> None:
    first = fastattn.sample(LOGITS, seeds=1)
    kept = first.clone()
    fastattn.sample(LOGITS, seeds=2)
    assert torch.equal(first, kept)
    with torch.inference_mode():
        assert fastattn.sample(LOGITS[:7], seeds=1).is_inference()
    assert not fastattn.sample(LOGITS[:7], seeds=1).is_inference()


@pytest.mark.parametrize(
    "call",
    [
        {"temperature": True}, {"temperature": -1.0}, {"top_p": float("nan")}, {"top_k": 2.0}, {"seeds": 2**63},
        {"min_p": torch.full((BATCH,), 2.0)}, {"positions": torch.full((BATCH,), -1)}, {"top_k": torch.ones(3).int()},
        {"frequency_penalty": 0.1}, {"repetition_penalty": 0.0, "token_counts": COUNTS},
        {"presence_penalty": 0.1, "token_counts": TokenCounts(BATCH, VOCAB + 1)},
        {"presence_penalty": 0.1, "token_counts": (VOCAB,)}, {"prompt_mask": PROMPT, "presence_penalty": 1.0},
        {"presence_penalty": 0.1, "token_counts": TokenCounts(BATCH, VOCAB), "prompt_mask": PROMPT},
        {"logit_bias": (IDS, VALUES[:, :3])}, {"logit_bias": (IDS + VOCAB, VALUES)}, {"logit_bias": (IDS,)},
        {"allowed": WORDS[:, :9]}, {"allowed": torch.zeros(VOCAB, dtype=torch.bool)},
        {"token_counts": COUNTS[:3], "presence_penalty": 0.1}, {"return_logprobs": VOCAB + 1},
        {"return_logprobs": True}, {"return_logprobs": -1}, {"return_logprobs": 2.0},
    ],
)  # fmt: skip
def test_wrong_calls_are_left_to_the_long_way(monkeypatch: pytest.MonkeyPatch, call: dict[str, Any]) -> None:
    said = answers(monkeypatch)
    with pytest.raises((ValueError, TypeError)):
        fastattn.sample(LOGITS, **call)
    assert said == [None]


def test_who_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    said = answers(monkeypatch)
    fastattn.sample(LOGITS, backend="reference")
    assert said == []
    monkeypatch.setenv("FASTATTN_BACKEND", "reference")
    fastattn.sample(LOGITS)
    monkeypatch.delenv("FASTATTN_BACKEND")
    fastattn.sample(LOGITS.clone().requires_grad_())
    fastattn.sample(LOGITS.double())
    fastattn.sample(LOGITS[:0])
    assert said == [None] * 4
    fastattn.sample(LOGITS, backend="cpu")
    assert said[4] is not None
