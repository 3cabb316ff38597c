"""Sampling in plain PyTorch and float64, by a full sort: the definition of what is kept and drawn."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastattn.args import SamplingArgs

_LOW32 = 0xFFFFFFFF
_GROUP_DOMAIN, _TOKEN_DOMAIN = 0x73616D70, 0x746F6B6E  # csrc/rng.h
_Logprobs = tuple[Tensor, Tensor, Tensor]


def sample(args: SamplingArgs) -> tuple[Tensor, _Logprobs | None]:
    """One token per row, (batch,) int64; and log-probabilities (batch,), the best ids (batch, n) and theirs."""
    logits = _checked(args)  # (batch, vocab)
    order, log_odds, kept = survivors(args, logits)
    noise = gumbel(args, logits.shape[1]).expand_as(logits)  # (batch, vocab), by id
    scores = torch.where(kept, log_odds + noise.gather(1, order), -math.inf)  # by rank
    by_id = torch.empty_like(scores).scatter_(1, order, scores)
    greedy = _column(args.temperature, logits) == 0
    tokens = torch.where(greedy, order[:, :1], by_id.argmax(1, keepdim=True))[:, 0]
    return tokens, logprobs(args, tokens) if args.logprobs else None


def survivors_by_id(args: SamplingArgs) -> Tensor:
    """Which tokens the filters keep, (batch, vocab) bool; a greedy row keeps one."""
    logits = _checked(args)  # (batch, vocab)
    order, _, kept = survivors(args, logits)
    first = torch.arange(logits.shape[1], device=logits.device) == 0
    kept = torch.where(_column(args.temperature, logits) == 0, first, kept)
    return torch.zeros_like(kept).scatter_(1, order, kept)


def _checked(args: SamplingArgs) -> Tensor:
    """The edited logits, once every row can be drawn from.

    What is wrong with a row as it came is said first; +inf is wrong where it could be drawn, or is part of a norm.
    """
    raw, logits = args.logits.double(), edited(args)  # each (batch, vocab)
    has_inf = (raw == math.inf).any(1)  # (batch,)
    broken = logits.isnan().any(1) | (logits == math.inf).any(1) | (logits == -math.inf).all(1)
    for rows, problem in (
        (raw.isnan().any(1), "has NaN"),
        (has_inf & (broken | (args.logprobs > 0)), "has +inf"),
        ((raw == -math.inf).all(1), "has no finite logit"),
        (logits.isnan().any(1), "has NaN after penalties, logit_bias and allowed"),
        ((logits == math.inf).any(1), "has +inf after penalties, logit_bias and allowed"),
        ((logits == -math.inf).all(1), "has no finite logit after penalties, logit_bias and allowed"),
    ):
        if bool(rows.any()):
            raise ValueError(f"logits: row {int(rows.nonzero()[0])} {problem}")
    return logits


def edited(args: SamplingArgs) -> Tensor:
    """Logits after penalties, bias and mask, (batch, vocab) float64: in double, rounded once to float32."""
    x, edits = args.logits.double(), args.edits
    if edits is None:
        return x
    if edits.has_penalties:
        seen, counts = _seen(args)  # each (batch, vocab)
        repetition = _column(edits.repetition_penalty, x)
        x = torch.where(seen, x * torch.where(x > 0, 1.0 / repetition, repetition), x)
        penalised = x - _column(edits.frequency_penalty, x) * counts - _column(edits.presence_penalty, x)
        x = torch.where(counts > 0, penalised, x)
    if isinstance(edits.logit_bias, Tensor):
        x = x + edits.logit_bias.double()
    elif edits.logit_bias is not None:
        ids, values = edits.logit_bias  # each (batch, n)
        wrong = ((ids < -1) | (ids >= x.shape[1])).nonzero()
        if len(wrong):
            row, at = wrong[0].tolist()
            raise ValueError(
                f"logit_bias: expected ids in [-1, {x.shape[1]}), got {ids[row, at]} in row {row}"
            )
        in_use = ids >= 0
        bias = torch.zeros_like(x)
        x = x + bias.scatter_add_(1, torch.where(in_use, ids, 0), torch.where(in_use, values.double(), 0.0))
    if args.logits.dtype != torch.float64:
        x = x.float().double()
    return x if edits.allowed is None else torch.where(_allowed_mask(edits.allowed, x.shape[1]), x, -math.inf)


def _seen(args: SamplingArgs) -> tuple[Tensor, Tensor]:
    """Which tokens a row has read or written, and how often it has written each; (batch, vocab)."""
    assert args.edits is not None
    counts, prompt = args.edits.token_counts, args.edits.prompt_mask
    if counts is None:
        assert prompt is not None
        return prompt, torch.zeros_like(prompt, dtype=torch.int32)
    if not isinstance(counts, Tensor):
        counts, seen = counts.dense()
        return seen, counts
    return (counts > 0 if prompt is None else prompt | (counts > 0)), counts


def _allowed_mask(allowed: Tensor, vocab: int) -> Tensor:
    """(batch, vocab) bool of a mask that may be packed."""
    if allowed.dtype == torch.bool:
        return allowed
    bits = torch.arange(32, device=allowed.device, dtype=torch.int32)
    return (allowed[:, :, None] >> bits & 1).flatten(1)[:, :vocab] != 0


def survivors(args: SamplingArgs, logits: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, log(p / p_max) and whether the token is kept; all (batch, vocab), in the total order."""
    logits = edited(args) if logits is None else logits
    order = torch.sort(logits, dim=1, descending=True, stable=True).indices  # equal logits: lower id first
    x = logits.gather(1, order)
    temperature = _column(args.temperature, logits)
    temperature = torch.where(temperature > 0, temperature, 1.0)  # a greedy row's odds are never used
    finite = x > -math.inf
    log_odds = torch.where(finite, (x - x[:, :1]) / temperature, -math.inf)

    rank = torch.arange(x.shape[1], device=x.device)
    top_k = _column(args.top_k, rank)
    kept = finite & ((top_k <= 0) | (rank < top_k))

    top_p = _column(args.top_p, logits)
    mass = log_odds.exp() * kept
    before = mass.cumsum(1).roll(1, 1)  # mass of the tokens ahead in the order
    before[:, :1] = 0.0
    kept &= (top_p >= 1) | (before < top_p * mass.sum(1, keepdim=True)) | (rank == 0)

    min_p = _column(args.min_p, logits)
    kept &= (min_p <= 0) | (log_odds >= min_p.log())
    return order, log_odds, kept


def logprobs(args: SamplingArgs, tokens: Tensor) -> _Logprobs:
    """log softmax(logits) of the tokens (batch,), and the best ids (batch, n) with theirs."""
    logits = args.logits.double()
    every = torch.log_softmax(logits, 1)  # (batch, vocab)
    ids = torch.sort(logits, dim=1, descending=True, stable=True).indices[:, : args.logprobs]
    return every.gather(1, tokens[:, None])[:, 0].float(), ids, every.gather(1, ids).float()


def gumbel(args: SamplingArgs, vocab: int) -> Tensor:
    """The noise of every (row, id), (batch or 1, vocab) float64: csrc/rng.h says how it is keyed."""
    ids = torch.arange(vocab, device=args.logits.device)
    seeds, positions = _column(args.seeds, ids), _column(args.positions, ids)
    zeros = torch.zeros_like(ids + positions + seeds)  # (batch or 1, vocab)
    key = (seeds & _LOW32, seeds >> 32 & _LOW32)

    def words(counter: Tensor, domain: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        low, high = zeros + (positions & _LOW32), zeros + (positions >> 32 & _LOW32)
        return philox4x32_10((zeros + counter, low, high, zeros + domain), key)

    def exponential(block: tuple[Tensor, ...]) -> Tensor:
        return -torch.log(((block[0] << 20 | block[1] >> 12).double() + 0.5) * 2.0**-52)

    group, own = words(ids // 256 * 4 + ids % 4, _GROUP_DOMAIN), words(ids, _TOKEN_DOMAIN)
    is_first = ids // 4 % 64 == group[2] % 64  # the least of the group's clocks
    clock = exponential(group) / 64 + torch.where(is_first, 0.0, exponential(own))
    return -torch.log(clock)


def philox4x32_10(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al., SC 2011): 32-bit words in int64, whose products wrap modulo 2^64."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = b >> 32 & _LOW32 ^ c1 ^ k0, b & _LOW32, a >> 32 & _LOW32 ^ c3 ^ k1, a & _LOW32
        k0, k1 = k0 + 0x9E3779B9 & _LOW32, k1 + 0xBB67AE85 & _LOW32
    return c0, c1, c2, c3


def _column(value: float | Tensor, like: Tensor) -> Tensor:
    """A parameter as (batch or 1, 1), of the dtype and on the device of ``like``."""
    return torch.as_tensor(value, dtype=like.dtype, device=like.device).reshape(-1, 1)
