"""The checks of sampling's parameters: numbers, one value per row, and what is given per token."""

from __future__ import annotations

from numbers import Integral, Real

import torch
from torch import Tensor

from fastattn.args import LogitBias, LogitEdits
from fastattn.checks import Shapes, check_range
from fastattn.token_counts import TokenCounts

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
FLOAT_MAX = torch.finfo(torch.float32).max
FLOAT_TINY = torch.finfo(torch.float32).tiny


def real(name: str, value: float | Tensor, logits: Tensor, low: float, high: float) -> float | Tensor:
    """``value`` in [low, high] as a float or a contiguous (batch,) float64 tensor."""
    if isinstance(value, Tensor):
        return _per_row(name, value, logits, torch.float64, low, high)
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, Real)):
        raise TypeError(f"{name}: expected a number or a (batch,) tensor, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name}: expected a number in [{low}, {high}], got {value}")
    return float(value)


def integer(name: str, value: int | Tensor, logits: Tensor, low: int) -> int | Tensor:
    """``value`` in [low, 2^63 - 1] as an int or a contiguous (batch,) int64 tensor."""
    if isinstance(value, Tensor):
        return _per_row(name, value, logits, torch.int64, low, INT64_MAX)
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, Integral)):
        raise TypeError(f"{name}: expected an integer or a (batch,) tensor, got {type(value).__name__}")
    if not low <= value <= INT64_MAX:
        raise ValueError(f"{name}: expected an integer in [{low}, {INT64_MAX}], got {value}")
    return int(value)


def _per_row(name: str, value: Tensor, logits: Tensor, dtype: torch.dtype, low: float, high: float) -> Tensor:
    """``value`` as a contiguous (batch,) tensor, checked against [low, high]."""
    if value.shape != logits.shape[:1]:
        Shapes(batch=logits.shape[0]).match(name, value, "batch")
    _check_device(name, value, logits)
    given = value.dtype
    if given == torch.bool or (not dtype.is_floating_point and value.is_floating_point()):
        expected = "a number" if dtype.is_floating_point else "an integer"
        raise TypeError(f"{name}: expected {expected} dtype, got {given}")
    if value.numel() and (low, high) != (INT64_MIN, INT64_MAX):
        least, most = torch.aminmax(value)  # NaN if there is one
        if not low <= least.item() <= most.item() <= high:
            row = int((~((value >= low) & (value <= high))).nonzero()[0])
            raise ValueError(
                f"{name}: expected values in [{low}, {high}], got {value[row].item()} in row {row}"
            )
    return value.to(dtype).contiguous()


def logprobs(n: int, vocab: int) -> int:
    """How many of the best tokens are wanted, in [0, vocab]."""
    if isinstance(n, bool) or not isinstance(n, Integral):
        raise TypeError(f"return_logprobs: expected an integer, got {type(n).__name__}")
    check_range("return_logprobs", n, 0, vocab)
    return int(n)


def logit_edits(
    logits: Tensor,
    logit_bias: LogitBias | None,
    allowed: Tensor | None,
    penalties: tuple[float | Tensor, float | Tensor, float | Tensor],
    token_counts: Tensor | TokenCounts | None,
    prompt_mask: Tensor | None,
) -> LogitEdits | None:
    """The edits as backends take them; None where they do nothing. Penalties: repetition, presence, frequency."""
    repetition = real("repetition_penalty", penalties[0], logits, FLOAT_TINY, FLOAT_MAX)
    presence = real("presence_penalty", penalties[1], logits, -FLOAT_MAX, FLOAT_MAX)
    frequency = real("frequency_penalty", penalties[2], logits, -FLOAT_MAX, FLOAT_MAX)
    token_counts, prompt_mask = _seen_tokens(token_counts, prompt_mask, logits)
    repeats = isinstance(repetition, Tensor) or repetition != 1.0
    counted = [
        name
        for name, value in (("presence_penalty", presence), ("frequency_penalty", frequency))
        if isinstance(value, Tensor) or value != 0.0
    ]
    if not repeats and not counted:
        token_counts = prompt_mask = None
    elif token_counts is None and counted:
        raise ValueError(f"{counted[0]}: expected token_counts beside it, got None")
    elif token_counts is None and prompt_mask is None:
        raise ValueError("repetition_penalty: expected token_counts or prompt_mask beside it, got None")
    bias = None if logit_bias is None else _logit_bias(logit_bias, logits)
    mask = None if allowed is None else _allowed(allowed, logits)
    if token_counts is prompt_mask is bias is mask is None:
        return None
    return LogitEdits(bias, mask, repetition, presence, frequency, token_counts, prompt_mask)


def _logit_bias(value: LogitBias, logits: Tensor) -> LogitBias:
    """A dense bias as (batch, vocab), or ids (batch, n) int64 and their values (batch, n).

    Values are float32, float64 for float64 logits; unit stride along the last dimension.
    """
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise TypeError(f"logit_bias: expected a floating dtype, got {value.dtype}")
        return _per_token("logit_bias", value, logits, "vocab", logits.shape[1]).to(dtype)
    if not (isinstance(value, tuple) and len(value) == 2 and all(isinstance(x, Tensor) for x in value)):
        raise TypeError(f"logit_bias: expected a tensor or a tuple (ids, values), got {type(value).__name__}")
    ids, values = value
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise TypeError(f"logit_bias: expected ids of an integer dtype, got {ids.dtype}")
    if not values.is_floating_point():
        raise TypeError(f"logit_bias: expected values of a floating dtype, got {values.dtype}")
    if ids.shape != values.shape:
        raise ValueError(
            f"logit_bias: expected values of the shape of ids, {tuple(ids.shape)}, got {tuple(values.shape)}"
        )
    n = ids.shape[-1] if ids.dim() else 0
    ids, values = (_per_token("logit_bias", x, logits, "n", n) for x in (ids, values))
    return ids.to(torch.int64), values.to(dtype)


def _allowed(value: Tensor, logits: Tensor) -> Tensor:
    """(batch, vocab) bool, or (batch, ceil(vocab / 32)) int32 words whose bit id % 32 is token id's."""
    if not isinstance(value, Tensor):
        raise TypeError(f"allowed: expected a torch.Tensor, got {type(value).__name__}")
    vocab = logits.shape[1]
    if value.dtype == torch.bool:
        return _per_token("allowed", value, logits, "vocab", vocab)
    if value.dtype == torch.int32:
        return _per_token("allowed", value, logits, "ceil(vocab/32)", -(-vocab // 32))
    raise TypeError(f"allowed: expected dtype bool, or int32 for packed bits, got {value.dtype}")


def _seen_tokens(
    counts: Tensor | TokenCounts | None, prompt_mask: Tensor | None, logits: Tensor
) -> tuple[Tensor | TokenCounts | None, Tensor | None]:
    """``token_counts`` as it is or as (batch, vocab) int32, and ``prompt_mask`` (batch, vocab) bool."""
    vocab = logits.shape[1]
    if prompt_mask is not None:
        if isinstance(counts, TokenCounts):
            raise ValueError("prompt_mask: expected None beside TokenCounts, which know the prompts")
        if not isinstance(prompt_mask, Tensor) or prompt_mask.dtype != torch.bool:
            got = getattr(prompt_mask, "dtype", type(prompt_mask).__name__)
            raise TypeError(f"prompt_mask: expected a bool tensor, got {got}")
        prompt_mask = _per_token("prompt_mask", prompt_mask, logits, "vocab", vocab)
    if isinstance(counts, TokenCounts):
        if (counts.batch, counts.vocab) != logits.shape:
            expected, got = tuple(logits.shape), (counts.batch, counts.vocab)
            raise ValueError(f"token_counts: expected (batch, vocab) = {expected}, got {got}")
        _check_device("token_counts", counts.ids, logits)
    elif counts is not None:
        if not isinstance(counts, Tensor):
            raise TypeError(f"token_counts: expected a tensor or TokenCounts, got {type(counts).__name__}")
        if counts.is_floating_point() or counts.dtype == torch.bool:
            raise TypeError(f"token_counts: expected an integer dtype, got {counts.dtype}")
        counts = _per_token("token_counts", counts, logits, "vocab", vocab).to(torch.int32)
    return counts, prompt_mask


def _per_token(name: str, value: Tensor, logits: Tensor, size_name: str, size: int) -> Tensor:
    """(size,) or (batch, size) as (batch, size) with unit stride along it."""
    batch = logits.shape[0]
    if value.shape != (size,) and value.shape != (batch, size):
        wanted = f"({size_name}={size},) or (batch={batch}, {size_name}={size})"
        raise ValueError(f"{name}: expected {wanted}, got {tuple(value.shape)}")
    _check_device(name, value, logits)
    if value.stride(-1) != 1 and size != 1:
        value = value.contiguous()
    return value.expand(batch, size)


def _check_device(name: str, value: Tensor, logits: Tensor) -> None:
    if value.device != logits.device:
        raise ValueError(f"{name}: expected the device of logits, {logits.device}, got {value.device}")
