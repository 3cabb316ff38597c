"""Sampling in plain PyTorch and float64, by a full sort: the definition of what is kept and drawn."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastattn.args import SamplingArgs

_LOW32 = 0xFFFFFFFF
_SAMPLING_DOMAIN = 0x73616D70  # csrc/rng.h


def sample(args: SamplingArgs) -> Tensor:
    """One token per row, (batch,) int64."""
    logits = args.logits.double()  # (batch, vocab)
    for problem, rows in (
        ("has NaN", logits.isnan().any(1)),
        ("has +inf", (logits == math.inf).any(1)),
        ("has no finite logit", (logits == -math.inf).all(1)),
    ):
        if bool(rows.any()):
            raise ValueError(f"logits: row {int(rows.nonzero()[0])} {problem}")
    order, log_odds, kept = survivors(args)
    noise = gumbel(args, logits.shape[1]).expand_as(logits)  # (batch, vocab), by id
    scores = torch.where(kept, log_odds + noise.gather(1, order), -math.inf)  # by rank
    by_id = torch.empty_like(scores).scatter_(1, order, scores)
    greedy = _column(args.temperature, logits) == 0
    return torch.where(greedy, order[:, :1], by_id.argmax(1, keepdim=True))[:, 0]


def survivors(args: SamplingArgs) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, log(p / p_max) and whether the token is kept; all (batch, vocab), in the total order."""
    logits = args.logits.double()
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


def gumbel(args: SamplingArgs, vocab: int) -> Tensor:
    """The noise of every (row, id), (batch or 1, vocab) float64: csrc/rng.h says how it is keyed."""
    ids = torch.arange(vocab, device=args.logits.device)
    seeds, positions = _column(args.seeds, ids), _column(args.positions, ids)
    zeros = torch.zeros_like(ids + positions + seeds)  # (batch or 1, vocab)
    counter = (
        zeros + ids // 4,
        zeros + (positions & _LOW32),
        zeros + (positions >> 32 & _LOW32),
        zeros + _SAMPLING_DOMAIN,
    )
    key = (seeds & _LOW32, seeds >> 32 & _LOW32)
    words = torch.stack(philox4x32_10(counter, key))  # (4, batch or 1, vocab)
    lane = (ids % 4).expand(1, *words.shape[1:])
    uniform = (words.gather(0, lane)[0].double() + 0.5) * 2.0**-32
    return -torch.log(-torch.log(uniform))


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
