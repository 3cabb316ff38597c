"""How well a model expects a text: perplexity over windows that overlap."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch.nn.functional import cross_entropy

from fastattn.checks import check_integer
from fastattn.generate import LLM

DEFAULT_CONTEXT = 1024


class Perplexity(NamedTuple):
    """What ``perplexity`` finds. Logarithms are natural."""

    perplexity: float  # exp of the mean negative log-likelihood per token
    standard_error: float  # of the perplexity, as if tokens were independent
    bits_per_byte: float  # of the text's UTF-8 bytes: comparable between tokenizers
    negative_log_likelihood: float  # summed over the tokens
    tokens: int  # that were expected: all but the first, where nothing stands before it
    bytes: int  # that these tokens stand for
    context: int
    stride: int


def perplexity(
    llm: LLM,
    text: str,
    *,
    context: int | None = None,
    stride: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Perplexity of ``text`` under ``llm``.

    The text goes through the model in windows of ``context`` tokens, each beginning ``stride`` tokens after the last
    one; a token counts once, in the first window that holds it. So each but those of the first window is expected from
    at least ``context - stride`` tokens before it.

    Args:
        llm: a model with its tokenizer.
        text: two tokens or more. It starts with the model's own start token, where it has one.
        context: tokens in a window, from 2; default: the model's context, but at most 1024.
        stride: from 1 to ``context - 1``; default: half of it.
        progress: called with (done, total) tokens after every window.

    Raises:
        ValueError, TypeError: a number out of range, or a text of fewer tokens.
    """
    longest = llm.config.max_seqlen
    context = min(longest, DEFAULT_CONTEXT) if context is None else context
    check_integer("context", context, 2, longest)
    stride = context // 2 if stride is None else stride
    check_integer("stride", stride, 1, context - 1)
    ids = llm.tokenizer.encode(text, special=False)
    if len(ids) < 2:
        raise ValueError(f"text: expected at least 2 tokens, got {len(ids)}")
    losses = []
    for begin, first, end in _windows(len(ids), context, stride):
        # Row i of the logits speaks of token begin + i + 1.
        logits = llm.logits(ids[begin : end - 1])[first - begin - 1 :]  # (end - first, vocab)
        losses.append(cross_entropy(logits, torch.tensor(ids[first:end]), reduction="none").double())
        if progress is not None:
            progress(end, len(ids))
    loss = torch.cat(losses)  # (tokens,)
    given = llm.tokenizer.decode(ids[:1], skip_special=True)
    nbytes = len(text.encode()) - len(given.encode())
    mean, total = loss.mean().item(), loss.sum().item()
    deviation = loss.std().item() if len(loss) > 1 else 0.0
    value = math.exp(mean)
    return Perplexity(
        value, value * deviation / math.sqrt(len(loss)), total / math.log(2) / max(nbytes, 1), total, len(loss), nbytes,
        context, stride,
    )  # fmt: skip


def _windows(length: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Where a window begins, the first token that counts in it, and where it ends."""
    first, begin = 1, 0
    while True:
        end = min(begin + context, length)
        yield begin, first, end
        if end == length:
            return
        first, begin = end, begin + stride
