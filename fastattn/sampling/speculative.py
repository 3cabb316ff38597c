"""Exact speculative sampling of a chain of drafted tokens (Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023,
arXiv 2302.01318)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.args import SamplingArgs
from fastattn.backends import cpu, resolve
from fastattn.checks import Shapes, check_dtype
from fastattn.sampling.draw import DTYPES, sample
from fastattn.sampling.probs import checked_totals
from fastattn.sampling.streams import mix64
from fastattn.sampling_checks import INT64_MIN, integer

# Streams of a row's seed, as in csrc/cpu/speculative.h: neither may be the one that `sample` drew the drafted tokens
# from.
_COINS, _RESAMPLING = 0x636F696E, 0x72657361


class SpeculativeTokens(NamedTuple):
    """What ``speculative_sample`` returns."""

    tokens: Tensor  # (batch, n + 1) int64: the accepted tokens, one more, then -1
    accepted: Tensor  # (batch,) int64, 0 to n


def speculative_sample(
    draft_probs: Tensor,
    draft_tokens: Tensor,
    target_probs: Tensor,
    seeds: int | Tensor,
    positions: int | Tensor = 0,
    *,
    backend: str = "auto",
) -> SpeculativeTokens:
    """Accept the drafted tokens that the target model would have drawn, and draw the first that it would not.

    Token i is accepted with probability ``min(1, p(x) / q(x))``; the first that is not is replaced by one drawn from
    ``max(p - q, 0)``, renormalised; if all are accepted, one more is drawn from the target's last row. So the tokens
    have exactly the target's distribution, whatever the draft's is, if each was drawn from its row of draft_probs.

    The draft may have been drawn with ``sample`` at the same seeds and positions: the noise here is of other streams.

    Args:
        draft_probs: (batch, n, vocab), q: what each drafted token was drawn from, filters included; any float dtype.
        draft_tokens: (batch, n) int32 or int64.
        target_probs: (batch, n + 1, vocab), p: the target's rows for the same places and the one after.
        seeds: integer or (batch,), 64 bits.
        positions: integer or (batch,), >= 0: of the first drafted token in its own sequence.
        backend: "auto", or a name of ``available_backends()``.

    Rows are renormalised, in float64. Where rounding leaves nothing of ``max(p - q, 0)``, p and q are the same to
    rounding, and the token is drawn from p.

    Returns:
        ``tokens`` (batch, n + 1) int64: the accepted tokens, then the one drawn here, then -1; and ``accepted``
        (batch,) int64, how many of the drafted ones there are.

    Raises:
        ValueError: shapes that do not fit; a row with NaN, a negative or infinite value or nothing positive; a token
            out of range, or one that its draft gives no probability. Names the row and the token's index.
        TypeError: a wrong dtype.
    """
    _check(draft_probs, draft_tokens, target_probs)
    first = integer("positions", positions, target_probs, 0)
    seeds = integer("seeds", seeds, target_probs, INT64_MIN)
    last = SamplingArgs(target_probs[:, -1], 1.0, 0, 1.0, min_p=0.0, seeds=seeds, positions=first)
    if resolve(backend, last).NAME == cpu.NAME:
        done = cpu.speculative_sample(draft_probs, draft_tokens, target_probs, seeds, first)
        if done is not None:
            return SpeculativeTokens(*done)
    return _composed(draft_probs, draft_tokens, target_probs, seeds, first, backend)


def _composed(
    draft_probs: Tensor,
    draft_tokens: Tensor,
    target_probs: Tensor,
    seeds: int | Tensor,
    positions: int | Tensor,
    backend: str,
) -> SpeculativeTokens:
    """The definition, out of two calls of ``sample``: for backends without a kernel of their own, and for errors."""
    batch, n = draft_tokens.shape
    device, vocab = target_probs.device, target_probs.shape[2]
    outside = (draft_tokens < 0) | (draft_tokens >= vocab)
    _refuse(outside, draft_tokens, f"an id in [0, {vocab})")
    first = torch.as_tensor(positions, device=device)
    seeds = torch.as_tensor(seeds, device=device)
    q_total = checked_totals("draft_probs", draft_probs)  # (batch, n)
    p_total = checked_totals("target_probs", target_probs)  # (batch, n + 1)
    drafted = draft_tokens.long()  # (batch, n)
    q = draft_probs.gather(2, drafted[..., None])[..., 0].double() / q_total  # (batch, n)
    p = target_probs[:, :n].gather(2, drafted[..., None])[..., 0].double() / p_total[:, :n]
    _refuse(q == 0, drafted, "a token that its draft gives some probability")

    places = first.expand(batch)[:, None] + torch.arange(n, device=device)  # (batch, n)
    coins = _coins(
        (p / q).clamp(max=1.0), _stream(seeds, _COINS).expand(batch), places, backend
    )  # (batch, n)
    accepted = coins.long().cumprod(1).sum(1)  # (batch,)

    row = torch.arange(batch, device=device)
    left = target_probs[row, accepted].double() / p_total[row, accepted, None]  # (batch, vocab)
    if n:
        last = accepted.clamp(max=n - 1)  # where all were accepted nothing is taken off
        drafts = draft_probs[row, last].double() / q_total[row, last, None]
        rest = (left - torch.where((accepted < n)[:, None], drafts, 0.0)).clamp(min=0.0)
        left = torch.where(rest.sum(1, keepdim=True) > 0, rest, left)
    odds = left.log() if target_probs.dtype == torch.float64 else left.log().float()
    drawn = sample(
        odds, seeds=_stream(seeds, _RESAMPLING).expand(batch), positions=first + accepted, backend=backend
    )

    index = torch.arange(n + 1, device=device)  # (n + 1,)
    chain = torch.cat((drafted, drawn[:, None]), dim=1)  # (batch, n + 1)
    tokens = torch.where(index < accepted[:, None], chain, -1)
    return SpeculativeTokens(torch.where(index == accepted[:, None], drawn[:, None], tokens), accepted)


def _coins(chance: Tensor, seeds: Tensor, positions: Tensor, backend: str) -> Tensor:
    """True with probability ``chance``, (batch, n) each: a draw between two tokens, of which heads has id 0."""
    batch, n = chance.shape
    odds = torch.stack((chance.log(), torch.log1p(-chance)), dim=-1).float()  # (batch, n, 2)
    tokens: Tensor = sample(
        odds.reshape(batch * n, 2), seeds=seeds[:, None].expand(batch, n).reshape(-1),
        positions=positions.reshape(-1), backend=backend,
    )  # fmt: skip
    return tokens.reshape(batch, n) == 0


def _stream(seeds: Tensor, domain: int) -> Tensor:
    return mix64(mix64(seeds) ^ domain)


def _check(draft_probs: Tensor, draft_tokens: Tensor, target_probs: Tensor) -> None:
    shapes = Shapes()
    shapes.match("draft_probs", draft_probs, "batch n vocab")
    shapes.match("draft_tokens", draft_tokens, "batch n")
    batch, n, vocab = (shapes[name] for name in ("batch", "n", "vocab"))
    Shapes(batch=batch, places=n + 1, vocab=vocab).match("target_probs", target_probs, "batch places vocab")
    check_dtype("draft_probs", draft_probs, DTYPES)
    check_dtype("target_probs", target_probs, DTYPES)
    check_dtype("draft_tokens", draft_tokens, (torch.int32, torch.int64))
    for name, tensor in (("draft_probs", draft_probs), ("draft_tokens", draft_tokens)):
        if tensor.device != target_probs.device:
            raise ValueError(
                f"{name}: expected the device of target_probs, {target_probs.device}, got {tensor.device}"
            )
    if vocab == 0:
        raise ValueError(f"target_probs: expected at least one column, got {tuple(target_probs.shape)}")


def _refuse(wrong: Tensor, tokens: Tensor, expected: str) -> None:
    for row, i in wrong.nonzero()[:1].tolist():
        raise ValueError(
            f"draft_tokens: row {row}, token {i}: expected {expected}, got {int(tokens[row, i])}"
        )
