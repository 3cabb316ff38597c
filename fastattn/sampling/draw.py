"""Public sampling: from logits to one token per row in one call."""

from __future__ import annotations

import math
import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn import ops
from fastattn import sampling_checks as checks
from fastattn.args import LogitBias, SamplingArgs
from fastattn.backends import resolve
from fastattn.backends.cpu import plain_sample
from fastattn.checks import Shapes, check_dtype
from fastattn.sampling_checks import INT64_MIN
from fastattn.token_counts import TokenCounts

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


_NO_PENALTIES = (1.0, 0.0, 0.0)  # repetition, presence, frequency


class SampledTokens(NamedTuple):
    """Drawn tokens with log-probabilities: natural logarithms of softmax(logits), as the model gave them."""

    tokens: Tensor  # (batch,) int64
    logprobs: Tensor  # (batch,) float32, of the drawn tokens
    top_ids: Tensor  # (batch, n) int64, the n most likely tokens, the best first
    top_logprobs: Tensor  # (batch, n) float32


def sample(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    logit_bias: LogitBias | None = None,
    allowed: Tensor | None = None,
    repetition_penalty: float | Tensor = _NO_PENALTIES[0],
    presence_penalty: float | Tensor = _NO_PENALTIES[1],
    frequency_penalty: float | Tensor = _NO_PENALTIES[2],
    token_counts: Tensor | TokenCounts | None = None,
    prompt_mask: Tensor | None = None,
    seeds: int | Tensor | None = None,
    positions: int | Tensor | None = None,
    return_logprobs: int = 0,
    backend: str = "auto",
) -> Any:
    """Draw one token per row: edit the logits, temperature, top_k, top_p, min_p, then ``argmax(log p + Gumbel)``.

    The edits, in this order, computed in double and rounded once to float32 (float64 logits: not rounded)::

        x = x * (1 / repetition_penalty if x > 0 else repetition_penalty)    of tokens read or written
        x = x - frequency_penalty * count - presence_penalty                 of tokens written, count times
        x = x + logit_bias
        x = -inf                                                             unless allowed

    Each filter acts on the renormalised survivors of the one before, in one total order: larger logit
    first, then lower id. The noise is Philox4x32-10 (Salmon et al., SC 2011) keyed by (seed, position) and
    indexed by the vocabulary id: a token depends only on its own row, seed and position.

    Args:
        logits: (batch, vocab) float32, bfloat16, float16 or float64; any row stride. -inf is never drawn.
        temperature: number or (batch,) tensor, >= 0; 0 is greedy (lowest id among equal maxima), inf uniform.
        top_k: integer or (batch,); keep exactly min(top_k, finite) tokens; 0 and -1 = off.
        top_p: number or (batch,), in [0, 1]; keep the shortest prefix whose mass is >= top_p; 1 = off.
        min_p: number or (batch,), in [0, 1]; keep tokens with p >= min_p * max p; 0 = off.
        logit_bias: (vocab,) or (batch, vocab) float; or (ids, values), each (n,) or (batch, n): values of one id add
            up, id -1 is padding. -inf bans a token.
        allowed: which tokens may be drawn, (vocab,) or (batch, vocab) bool; or int32 words, (ceil(vocab / 32),) or
            (batch, ceil(vocab / 32)), whose bit id % 32 of word id // 32 is token id's (as grammar engines have it).
        repetition_penalty: number or (batch,), > 0; 1 = off (Keskar et al., arXiv 1909.05858).
        presence_penalty: number or (batch,); 0 = off.
        frequency_penalty: number or (batch,); 0 = off.
        token_counts: how often each row has drawn each token: ``TokenCounts``, whose cost is that of the tokens seen,
            or (batch, vocab) integers, which are read in full.
        prompt_mask: (batch, vocab) bool, the tokens of each prompt, beside dense counts.
        seeds: integer or (batch,), 64 bits; rows that share seed and position share their noise. None
            draws fresh seeds from torch's global generator.
        positions: integer or (batch,), the index of the token being drawn in its own sequence; default 0.
        return_logprobs: n > 0 also returns the log-probability of the drawn token and the n best tokens with theirs,
            under softmax(logits): before the edits, temperature and filters.
        backend: "auto", or a name of ``available_backends()``, which then does it or raises.

    Returns:
        (batch,) int64 token ids on the device of logits; with return_logprobs, ``SampledTokens``.

    Raises:
        ValueError: a parameter out of range, a row with NaN, with +inf where it could be drawn, or of which nothing
            finite is left; names the row.
        TypeError: a wrong dtype.
        NotImplementedError: the forced backend, or every backend, lacks a feature of this call.
    """
    if plain_sample is not None and backend in ("auto", "cpu") and not ops.is_watched():
        seen: Any = token_counts
        if type(seen) is TokenCounts:
            seen = (seen.vocab, seen.ids, seen.counts, seen.lengths, seen.unseen)
        quick = plain_sample(
            logits, temperature, top_k, top_p, min_p, seeds, 0 if positions is None else positions,
            repetition_penalty, presence_penalty, frequency_penalty, seen, prompt_mask, logit_bias, allowed,
            return_logprobs, torch.get_num_threads(),
        )  # fmt: skip
        if quick is not None:
            return SampledTokens(*quick) if return_logprobs else quick
    if type(logits) is not Tensor or logits.dim() != 2:
        Shapes().match("logits", logits, "batch vocab")
    check_dtype("logits", logits, DTYPES)
    vocab = logits.shape[1]
    if vocab == 0:
        raise ValueError(f"logits: expected at least one column, got {tuple(logits.shape)}")
    edits = None
    penalties = (repetition_penalty, presence_penalty, frequency_penalty)
    # No tensors are compared: `is` comes first, and the defaults are what the signature has.
    if not (
        logit_bias is allowed is token_counts is prompt_mask is None
        and all(map(operator.is_, penalties, _NO_PENALTIES))
    ):
        edits = checks.logit_edits(logits, logit_bias, allowed, penalties, token_counts, prompt_mask)
    args = SamplingArgs(
        logits if logits.stride(1) == 1 or vocab == 1 else logits.contiguous(),
        checks.real("temperature", temperature, logits, 0.0, math.inf),
        checks.integer("top_k", top_k, logits, -1),
        checks.real("top_p", top_p, logits, 0.0, 1.0),
        checks.real("min_p", min_p, logits, 0.0, 1.0),
        _fresh_seeds(logits) if seeds is None else checks.integer("seeds", seeds, logits, INT64_MIN),
        0 if positions is None else checks.integer("positions", positions, logits, 0),
        edits,
        checks.logprobs(return_logprobs, vocab) if return_logprobs else 0,
    )
    tokens, logprobs = resolve(backend, args).sample(args)
    return tokens if logprobs is None else SampledTokens(tokens, *logprobs)


def _fresh_seeds(logits: Tensor) -> Tensor:
    return torch.empty(logits.shape[0], dtype=torch.int64).random_(INT64_MIN, None).to(logits.device)
