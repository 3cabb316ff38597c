"""Sampling's building blocks under FlashInfer's names and signatures, with our tie rule.

Every cut is a prefix of one total order, larger value first, then lower id: exactly k tokens, whatever is equal. The
cuts come from the backends' kernels; probabilities are never rounded before they are compared. What FlashInfer means
by ``deterministic`` is always so here, and NaN is always looked for.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastattn.args import SamplingArgs
from fastattn.backends import resolve
from fastattn.checks import Shapes, check_dtype
from fastattn.sampling.draw import DTYPES, sample
from fastattn.sampling.probs import checked_totals, totals, unusable
from fastattn.sampling.streams import row_seeds
from fastattn.sampling_checks import INT64_MIN, integer, real

# Two prefixes whose masses differ by less than this share of the row's are equal, as in the kernels.
_MASS_ROUNDING = 2.0**-40


def top_k_top_p_sampling_from_logits(
    logits: Tensor,
    top_k: int | Tensor,
    top_p: float | Tensor,
    indices: Tensor | None = None,
    filter_apply_order: str = "top_k_first",
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Draw one token per row among the top_k best and the shortest prefix of mass top_p.

    Args:
        logits: (batch, vocab), or (rows, vocab) with ``indices``; float32, bfloat16, float16 or float64.
        top_k: integer or (batch,); 0 and -1 = off.
        top_p: number or (batch,), in [0, 1]; 1 = off.
        indices: (batch,) int32 or int64, the row of logits that each token is drawn from; None = its own.
        filter_apply_order: "top_k_first" (top_p of what top_k kept) or "joint" (both of the whole row).
        deterministic: accepted; a draw is always deterministic.
        generator: where fresh seeds come from; None = torch's global one. Not with ``seed``.
        check_nan: accepted; NaN is always an error.
        seed: (batch,): each row's own, by which its token depends on nothing else in the batch; an integer, or (1,)
            for several rows: each row gets a stream by its place in the batch. None = fresh ones.
        offset: integer, (1,) or (batch,): the position in that stream, default 0.
        backend: "auto", or a name of ``available_backends()``, which then does it or raises.

    Returns:
        (batch,) int64 token ids.

    Raises:
        ValueError: a parameter out of range, or a row with NaN, +inf or no finite logit; names the row.
    """
    if filter_apply_order not in ("top_k_first", "joint"):
        raise ValueError(f"filter_apply_order: expected 'top_k_first' or 'joint', got {filter_apply_order!r}")
    _check_rows("logits", logits)
    logits = _select(logits, indices)  # (batch, vocab)
    if filter_apply_order == "joint":
        # Both cuts are prefixes of one order, so their intersection is the shorter one.
        top_p = real("top_p", top_p, logits, 0.0, 1.0)
        within = _survivors(logits, backend, top_p=top_p).sum(1)  # (batch,)
        limit = torch.as_tensor(integer("top_k", top_k, logits, -1), device=logits.device)
        top_k, top_p = torch.where(limit > 0, torch.minimum(limit, within), within), 1.0
    seeds, positions = _streams(logits, generator, seed, offset)
    tokens: Tensor = sample(
        logits, top_k=top_k, top_p=top_p, seeds=seeds, positions=positions, backend=backend
    )
    return tokens


def min_p_sampling_from_probs(
    probs: Tensor,
    min_p: float | Tensor,
    indices: Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
    return_valid: bool = False,
    *,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Draw one token per row among those with ``p >= min_p * max p`` (Nguyen et al. 2024, arXiv 2407.01082).

    Args:
        probs: (batch, vocab), or (rows, vocab) with ``indices``; any float dtype; need not sum to 1.
        min_p: number or (batch,), in [0, 1]; 0 = off.
        indices, deterministic, generator, check_nan, seed, offset, backend: see
            ``top_k_top_p_sampling_from_logits``.
        return_valid: do not raise for rows that cannot be drawn from, but say which they are.

    Returns:
        (batch,) int64 token ids; with ``return_valid`` also (batch,) bool, False (and token 0) for rows with NaN, a
        negative or infinite value, or nothing positive.

    Raises:
        ValueError: a parameter out of range, or such a row without ``return_valid``; names the row.
    """
    _check_rows("probs", probs)
    probs = _select(probs, indices)  # (batch, vocab)
    least = real("min_p", min_p, probs, 0.0, 1.0)
    if return_valid:
        valid = unusable(probs, totals(probs)) == 0  # (batch,)
        first = torch.arange(probs.shape[1], device=probs.device) == 0
        probs = torch.where(valid[:, None], probs, first.to(probs.dtype))
    else:
        checked_totals("probs", probs)
    seeds, positions = _streams(probs, generator, seed, offset)
    # In float64 a product of two float32 is exact, and so is the comparison.
    bound = torch.as_tensor(least, dtype=torch.float64, device=probs.device) * probs.amax(1)  # (batch,)
    kept = probs >= bound[:, None]
    logs = torch.where(kept, _log(probs), -math.inf)
    tokens = sample(logs, seeds=seeds, positions=positions, backend=backend)
    return (tokens, valid) if return_valid else tokens


def top_p_renorm_probs(
    probs: Tensor, top_p: float | Tensor, is_deterministic: bool = False, *, backend: str = "auto"
) -> Tensor:
    """The shortest prefix whose mass is at least ``top_p`` of the row's, renormalised; zero elsewhere.

    Args:
        probs: (batch, vocab) float32, bfloat16, float16 or float64; need not sum to 1.
        top_p: number or (batch,), in [0, 1]; the crossing token stays, at least one token always; 1 = off.
        is_deterministic: accepted; the result is always deterministic.
        backend: "auto", or a name of ``available_backends()``.

    Returns:
        (batch, vocab), probs' dtype; each row sums to 1.

    Raises:
        ValueError: top_p out of range, or a row with NaN, a negative or infinite value or nothing positive.
    """
    _check_rows("probs", probs)
    checked_totals("probs", probs)
    top_p = real("top_p", top_p, probs, 0.0, 1.0)
    return _renormalize(probs, _within_mass(probs, top_p, backend))


def top_k_renorm_probs(probs: Tensor, top_k: int | Tensor, *, backend: str = "auto") -> Tensor:
    """The ``top_k`` largest probabilities, renormalised; zero elsewhere.

    Args:
        probs: (batch, vocab) float32, bfloat16, float16 or float64; need not sum to 1.
        top_k: integer or (batch,): exactly min(top_k, vocab) are kept; 0 and -1 = off.
        backend: "auto", or a name of ``available_backends()``.

    Returns:
        (batch, vocab), probs' dtype; each row sums to 1.

    Raises:
        ValueError: top_k out of range, or a row with NaN, a negative or infinite value or nothing positive.
    """
    _check_rows("probs", probs)
    checked_totals("probs", probs)
    return _renormalize(probs, _survivors(probs, backend, top_k=integer("top_k", top_k, probs, -1)))


def top_k_mask_logits(logits: Tensor, top_k: int | Tensor, *, backend: str = "auto") -> Tensor:
    """The ``top_k`` largest logits as they are; -inf elsewhere.

    Args:
        logits: (batch, vocab) float32, bfloat16, float16 or float64; -inf is never kept.
        top_k: integer or (batch,): exactly min(top_k, finite) are kept; 0 and -1 = off.
        backend: "auto", or a name of ``available_backends()``.

    Returns:
        (batch, vocab), logits' dtype.

    Raises:
        ValueError: top_k out of range, or a row with NaN, +inf or no finite logit; names the row.
    """
    _check_rows("logits", logits)
    kept = _survivors(logits, backend, top_k=integer("top_k", top_k, logits, -1))
    return torch.where(kept, logits, -math.inf)


# ---- what they share


def _survivors(values: Tensor, backend: str, top_k: int | Tensor = 0, top_p: float | Tensor = 1.0) -> Tensor:
    """What the filters keep of values taken as logits, (batch, vocab) bool."""
    if values.stride(1) != 1 and values.shape[1] > 1:
        values = values.contiguous()
    args = SamplingArgs(values, 1.0, top_k, top_p, min_p=0.0, seeds=0, positions=0, survivors=True)
    kept: Tensor = resolve(backend, args).survivors(args)
    return kept


def _within_mass(probs: Tensor, top_p: float | Tensor, backend: str) -> Tensor:
    """The shortest prefix with ``top_p`` of the mass, (batch, vocab) bool.

    The kernel finds it among the logarithms, whose rounding may merge neighbours and shift the end by a token. So
    that is only where the search for the length begins: prefixes of a length are exact (``top_k`` of the
    probabilities themselves), and so are their masses.
    """
    total = totals(probs)  # (batch,)
    share = torch.as_tensor(top_p, dtype=torch.float64, device=probs.device).expand_as(total)
    target = share * total * (1.0 - _MASS_ROUNDING)
    shortest, longest = torch.ones_like(total, dtype=torch.int64), (probs > 0).sum(1)  # (batch,)
    shortest = torch.where(share < 1.0, shortest, longest)  # off: whatever is positive
    length = _survivors(_log(probs), backend, top_p=top_p).sum(1).clamp(shortest, longest)
    newton = True
    while True:
        kept = _survivors(probs, backend, top_k=length)
        mass = totals(torch.where(kept, probs, 0.0))
        last = torch.where(kept, probs, math.inf).amin(1).double()  # (batch,), the smallest kept
        # Tokens inside the prefix weigh at least `last`, those behind it at most: no shorter prefix than this will do.
        spare = ((mass - target) / last).clamp(-(2.0**40), 2.0**40)
        enough = spare >= 0
        longest = torch.where(enough, torch.minimum(length, longest), longest)
        bound = torch.where(enough, length - spare.floor().long(), length + (-spare).ceil().long())
        shortest = bound.clamp(shortest, longest)
        middle = (shortest + longest) // 2
        tried, length = length, torch.where(enough, shortest, middle) if newton else middle
        if torch.equal(tried, length):
            return kept
        newton = not newton


def _renormalize(probs: Tensor, kept: Tensor) -> Tensor:
    chosen = torch.where(kept, probs, 0.0)  # (batch, vocab)
    wide = torch.promote_types(probs.dtype, torch.float32)
    return (chosen.to(wide) / totals(chosen)[:, None].to(wide)).to(probs.dtype)


def _log(probs: Tensor) -> Tensor:
    return probs.to(torch.promote_types(probs.dtype, torch.float32)).log()


def _check_rows(name: str, x: Tensor) -> None:
    Shapes().match(name, x, "batch vocab")
    check_dtype(name, x, DTYPES)
    if x.shape[1] == 0:
        raise ValueError(f"{name}: expected at least one column, got {tuple(x.shape)}")


def _select(x: Tensor, indices: Tensor | None) -> Tensor:
    """The rows to draw from, (batch, vocab)."""
    if indices is None:
        return x
    Shapes().match("indices", indices, "batch")
    check_dtype("indices", indices, (torch.int32, torch.int64))
    outside = (indices < 0) | (indices >= x.shape[0])
    if bool(outside.any()):
        row = int(outside.nonzero()[0])
        raise ValueError(f"indices: expected rows in [0, {x.shape[0]}), got {int(indices[row])} in row {row}")
    if x.shape[0] == 1:
        return x.expand(indices.shape[0], -1)  # nothing is copied
    return x.index_select(0, indices)


def _streams(
    x: Tensor, generator: torch.Generator | None, seed: int | Tensor | None, offset: int | Tensor | None
) -> tuple[Tensor | None, int | Tensor]:
    """Seeds and positions of each row, from FlashInfer's seed, offset and generator."""
    batch = x.shape[0]
    if isinstance(offset, Tensor) and offset.numel() == 1:
        offset = int(offset)
    position = 0 if offset is None else integer("offset", offset, x, 0)
    if isinstance(seed, Tensor) and seed.numel() == 1 and batch != 1:
        seed = int(seed)
    if seed is not None and generator is not None:
        raise ValueError("generator: expected None with a seed, got both")
    if isinstance(seed, int):
        return row_seeds(int(integer("seed", seed, x, INT64_MIN)), batch).to(x.device), position
    if seed is not None:
        seeds = integer("seed", seed, x, INT64_MIN)
        assert isinstance(seeds, Tensor)
        return seeds, position
    if generator is None:
        return None, position
    return torch.empty(batch, dtype=torch.int64, device=generator.device).random_(
        INT64_MIN, None, generator=generator
    ).to(x.device), position
