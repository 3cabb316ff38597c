"""Public sampling: from logits to one token per row in one call."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from fastattn.args import SamplingArgs
from fastattn.backends import resolve
from fastattn.checks import Shapes, check_dtype

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_INT64_MIN, _INT64_MAX = -(2**63), 2**63 - 1

# Not built yet: named, so that a call that needs one is refused by name and never ignored.
_LATER: dict[str, Any] = {
    "logit_bias": None,
    "allowed": None,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "token_counts": None,
    "prompt_mask": None,
    "return_logprobs": 0,
}


def sample(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    seeds: int | Tensor | None = None,
    positions: int | Tensor | None = None,
    backend: str = "auto",
    **later: Any,
) -> Tensor:
    """Draw one token per row: temperature, then top_k, top_p, min_p, then ``argmax(log p + Gumbel)``.

    Each filter acts on the renormalised survivors of the one before, in one total order: larger logit
    first, then lower id. The noise is Philox4x32-10 (Salmon et al., SC 2011) keyed by (seed, position) and
    indexed by the vocabulary id: a token depends only on its own row, seed and position.

    Args:
        logits: (batch, vocab) float32, bfloat16, float16 or float64; any row stride. -inf is never drawn.
        temperature: number or (batch,) tensor, >= 0; 0 is greedy (lowest id among equal maxima), inf uniform.
        top_k: integer or (batch,); keep exactly min(top_k, finite) tokens; 0 and -1 = off.
        top_p: number or (batch,), in [0, 1]; keep the shortest prefix whose mass is >= top_p; 1 = off.
        min_p: number or (batch,), in [0, 1]; keep tokens with p >= min_p * max p; 0 = off.
        seeds: integer or (batch,), 64 bits; rows that share seed and position share their noise. None
            draws fresh seeds from torch's global generator.
        positions: integer or (batch,), the index of the token being drawn in its own sequence; default 0.
        backend: "auto", or a name of ``available_backends()``, which then does it or raises.
        later: keywords that no backend has yet; a value other than the default is refused by name.

    Returns:
        (batch,) int64 token ids on the device of logits.

    Raises:
        ValueError: a parameter out of range, or a row with NaN, +inf or no finite logit; names the row.
        TypeError: a wrong dtype.
        NotImplementedError: the forced backend, or every backend, lacks a feature of this call.
    """
    Shapes().match("logits", logits, "batch vocab")
    check_dtype("logits", logits, DTYPES)
    vocab = logits.shape[1]
    if vocab == 0:
        raise ValueError(f"logits: expected at least one column, got {tuple(logits.shape)}")
    args = SamplingArgs(
        logits=logits if logits.stride(1) == 1 or vocab == 1 else logits.contiguous(),
        temperature=_real("temperature", temperature, logits, math.inf),
        top_k=_integer("top_k", top_k, logits, -1),
        top_p=_real("top_p", top_p, logits, 1.0),
        min_p=_real("min_p", min_p, logits, 1.0),
        seeds=_fresh_seeds(logits) if seeds is None else _integer("seeds", seeds, logits, _INT64_MIN),
        positions=0 if positions is None else _integer("positions", positions, logits, 0),
        extra_features=_extra_features(later) if later else frozenset(),
    )
    tokens: Tensor = resolve(backend, args).sample(args)
    return tokens


def _fresh_seeds(logits: Tensor) -> Tensor:
    return torch.empty(logits.shape[0], dtype=torch.int64).random_(_INT64_MIN, None).to(logits.device)


def _real(name: str, value: float | Tensor, logits: Tensor, high: float) -> float | Tensor:
    """``value`` in [0, high] as a float or a contiguous (batch,) float64 tensor."""
    if isinstance(value, Tensor):
        return _per_row(name, value, logits, torch.float64, 0.0, high)
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, Real)):
        raise TypeError(f"{name}: expected a number or a (batch,) tensor, got {type(value).__name__}")
    if not 0.0 <= value <= high:
        raise ValueError(f"{name}: expected a number in [0.0, {high}], got {value}")
    return float(value)


def _integer(name: str, value: int | Tensor, logits: Tensor, low: int) -> int | Tensor:
    """``value`` in [low, 2^63 - 1] as an int or a contiguous (batch,) int64 tensor."""
    if isinstance(value, Tensor):
        return _per_row(name, value, logits, torch.int64, low, _INT64_MAX)
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, Integral)):
        raise TypeError(f"{name}: expected an integer or a (batch,) tensor, got {type(value).__name__}")
    if not low <= value <= _INT64_MAX:
        raise ValueError(f"{name}: expected an integer in [{low}, {_INT64_MAX}], got {value}")
    return int(value)


def _per_row(name: str, value: Tensor, logits: Tensor, dtype: torch.dtype, low: float, high: float) -> Tensor:
    """``value`` as a contiguous (batch,) tensor, checked against [low, high]."""
    Shapes(batch=logits.shape[0]).match(name, value, "batch")
    if value.device != logits.device:
        raise ValueError(f"{name}: expected the device of logits, {logits.device}, got {value.device}")
    if value.dtype == torch.bool or (not dtype.is_floating_point and value.is_floating_point()):
        expected = "a number" if dtype.is_floating_point else "an integer"
        raise TypeError(f"{name}: expected {expected} dtype, got {value.dtype}")
    outside = ~((value >= low) & (value <= high))  # (batch,); NaN is outside
    if bool(outside.any()):
        row = int(outside.nonzero()[0])
        raise ValueError(f"{name}: expected values in [{low}, {high}], got {value[row].item()} in row {row}")
    return value.to(dtype).contiguous()


def _extra_features(later: dict[str, Any]) -> frozenset[str]:
    unknown = [name for name in later if name not in _LATER]
    if unknown:
        raise TypeError(f"sample() got an unexpected keyword argument {unknown[0]!r}")
    return frozenset(n for n, value in later.items() if value is not _LATER[n] and value != _LATER[n])
