"""Rotary position embedding (RoFormer, arXiv 2104.09864): what the files say about it, and its tables."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastattn.model.config import MAX_INT, Fields, RopeConfig, RopeScaling, read_rotary_dim, shown

MIN_ROWS = 512  # the first size of the tables; they grow with the longest sequence seen
HF_KINDS = ("default", "linear", "dynamic", "yarn", "llama3")
GGUF_KINDS = ("none", "linear", "yarn")


class Rotary:
    """cos and sin of every position's angles, float32, computed up to the longest sequence seen so far.

    The tables grow on demand: a file's ``max_seqlen`` is a claim that nothing else in the file pays for.

    Args:
        config: base, rotary_dim and scaling.
        factors: (rotary_dim / 2,) float32 divisors of the frequencies (GGUF's rope_freqs), or None.

    Attributes:
        prompt_limit: tokens after which others can only come one at a time.
    """

    def __init__(self, config: RopeConfig, factors: Tensor | None = None) -> None:
        self.config = config
        self.factors = None if factors is None else factors.double()  # (rotary_dim / 2,)
        self.cos = self.sin = torch.empty(0, config.rotary_dim // 2)  # (positions, rotary_dim / 2)
        # transformers turns all of a longer prompt by its whole length: text would depend on how it came in pieces.
        scaling = config.scaling
        self.prompt_limit = MAX_INT
        if scaling is not None and scaling.kind == "dynamic":
            self.prompt_limit = scaling.original_max_seqlen

    def reserve(self, seqlen: int) -> None:
        """Tables for at least ``seqlen`` positions."""
        if seqlen <= self.cos.shape[0]:
            return
        rows = max(seqlen, 2 * self.cos.shape[0], MIN_ROWS)
        positions = torch.arange(rows, dtype=torch.float64)[:, None]  # (rows, 1)
        inv_freq = frequencies(self.config, positions)  # (1 or rows, rotary_dim / 2)
        if self.factors is not None:
            inv_freq = inv_freq / self.factors
        # float64 until after cos and sin: a float32 angle of thousands of radians has lost its last digits.
        angles = positions * inv_freq  # (rows, rotary_dim / 2)
        scaling = self.config.scaling
        factor = 1.0 if scaling is None else scaling.attention_factor
        self.cos = (angles.cos() * factor).float()  # (rows, rotary_dim / 2)
        self.sin = (angles.sin() * factor).float()  # (rows, rotary_dim / 2)


def frequencies(config: RopeConfig, positions: Tensor) -> Tensor:
    """Radians per position of each rotated pair, float64.

    ``linear`` (arXiv 2306.15595) divides every frequency by ``factor``. ``llama3`` and ``yarn`` (arXiv
    2309.00071) divide the low ones, keep the high ones and blend in between. The borders of llama3 are pairs
    that make ``low_freq_factor`` and ``high_freq_factor`` full turns within ``original_max_seqlen`` positions;
    those of yarn the places of pairs that make ``beta_slow`` and ``beta_fast``, whole ones with ``truncate``.
    ``dynamic`` raises the base with the length, once that is more than ``original_max_seqlen``: every
    position turns as it does where it is the last one, which is what decoding with a cache computes.

    Args:
        config: base, rotary_dim and scaling.
        positions: (rows, 1) float64.

    Returns:
        (1, rotary_dim / 2), or (rows, rotary_dim / 2) where they depend on the position.
    """
    dim, scaling = config.rotary_dim, config.scaling
    exponents = torch.arange(0, dim, 2, dtype=torch.float64)[None] / dim  # (1, rotary_dim / 2)
    inv_freq = config.base**-exponents  # (1, rotary_dim / 2)
    if scaling is None:
        return inv_freq
    factor, original = scaling.factor, scaling.original_max_seqlen
    if scaling.kind == "linear":
        return inv_freq / factor
    if scaling.kind == "dynamic":
        stretch = factor * (positions + 1).clamp(min=original) / original - (factor - 1)  # (rows, 1)
        return (config.base * stretch ** (dim / (dim - 2))) ** -exponents  # (rows, rotary_dim / 2)
    if scaling.kind == "llama3":
        turns = original * inv_freq / (2 * math.pi)  # (1, rotary_dim / 2)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # (1, rotary_dim / 2)
    else:
        places = [
            dim * math.log(original / (2 * math.pi * turns)) / (2 * math.log(config.base))
            for turns in (scaling.beta_fast, scaling.beta_slow)
        ]
        first = max(math.floor(places[0]) if scaling.truncate else places[0], 0)
        last = min(math.ceil(places[1]) if scaling.truncate else places[1], dim - 1)
        width = last - first or 0.001
        keep = 1 - ((exponents * dim / 2 - first) / width).clamp(0, 1)  # (1, rotary_dim / 2)
    return inv_freq * (keep + (1 - keep) / factor)


def read_hf_rope(
    fields: Fields,
    headdim: int,
    *,
    base_key: str = "rope_theta",
    partial_key: str = "partial_rotary_factor",
    partial: float | None = None,
) -> RopeConfig:
    """``rope_parameters`` (transformers 5), or ``rope_scaling`` and keys of config.json itself (before).

    Args:
        fields: config.json.
        headdim: of q and k.
        base_key: of the base in config.json.
        partial_key: of the share of headdim that turns, in config.json.
        partial: that share where the file does not say; None where all of headdim always turns.
    """
    rope = fields.nested(fields.first("rope_parameters", "rope_scaling"))
    base = rope.number("rope_theta") if rope.has("rope_theta") else fields.number(base_key, 10000.0)
    if partial is not None:
        return hf_rope(fields, rope, base, _partial_rotary_dim(fields, rope, headdim, partial_key, partial))
    for where in (fields, rope):
        where.require("partial_rotary_factor", 1.0, default=1.0)
    return hf_rope(fields, rope, base, headdim)


def hf_rope(fields: Fields, rope: Fields, base: float, rotary_dim: int) -> RopeConfig:
    """From one object of rotary parameters, ``rope``, in config.json, ``fields``."""
    if rotary_dim % 2:
        fields.fail("head_dim", f"expected an even number for rotary embedding, got {rotary_dim}")
    kind_key = rope.first("rope_type", "type")
    kind = rope.text(kind_key, "default")
    if kind not in HF_KINDS:
        problem = f"rotary scaling {shown(kind)} is not supported; {', '.join(HF_KINDS)} are"
        rope.fail(kind_key, problem)
    if kind == "default":
        return RopeConfig(base, rotary_dim)
    factor = rope.number("factor")
    if kind == "linear":
        return RopeConfig(base, rotary_dim, RopeScaling(kind, factor))
    if kind == "dynamic":
        max_seqlen = fields.integer("max_position_embeddings")
        if rotary_dim < 4:
            rope.fail(kind_key, f"expected at least 4 rotary dimensions, got {rotary_dim}")
        return RopeConfig(base, rotary_dim, RopeScaling(kind, factor, max_seqlen))
    key = "original_max_position_embeddings"
    original = rope.integer(key) if rope.has(key) else fields.integer("max_position_embeddings")
    if kind == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if high <= low:
            rope.fail("high_freq_factor", f"expected more than low_freq_factor={low}, got {high}")
        return RopeConfig(base, rotary_dim, RopeScaling(kind, factor, original, low, high))
    if base <= 1:
        rope.fail("rope_theta", f"expected more than 1 for yarn, got {base}")
    weights = [rope.number(key) if rope.has(key) else 0.0 for key in ("mscale", "mscale_all_dim")]
    default = _yarn_factor(factor, weights[0]) / _yarn_factor(factor, weights[1]) if all(weights) else 0.0
    scaling = RopeScaling(
        kind,
        factor,
        original,
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        truncate=rope.flag("truncate", True),
        attention_factor=rope.number("attention_factor", default or _yarn_factor(factor, 1.0)),
    )
    return RopeConfig(base, rotary_dim, scaling)


def _partial_rotary_dim(fields: Fields, rope: Fields, headdim: int, key: str, default: float) -> int:
    """How many dimensions turn, by their share of headdim."""
    where, key = (rope, "partial_rotary_factor") if rope.has("partial_rotary_factor") else (fields, key)
    rotary_dim = int(headdim * where.number(key, default))
    if not 2 <= rotary_dim <= headdim or rotary_dim % 2:
        wanted = f"expected a share of headdim={headdim} that is an even number of dimensions"
        where.fail(key, f"{wanted}, got {where.values.get(key, default)}, {rotary_dim} dimensions")
    return rotary_dim


def read_gguf_rope(fields: Fields, arch: str, headdim: int, *, stored_as_pairs: bool = False) -> RopeConfig:
    """Base, rotated dimensions and scaling, behind the architecture's name.

    Without a type a factor is a linear one, as in llama.cpp.
    """
    prefix = f"{arch}.rope.scaling."
    rotary_dim = read_rotary_dim(fields, f"{arch}.rope.dimension_count", headdim, headdim)
    base = fields.number(f"{arch}.rope.freq_base", 10000.0)
    kind = fields.text(prefix + "type", "linear" if fields.has(prefix + "factor") else "none")
    if kind not in GGUF_KINDS:
        problem = f"rotary scaling {shown(kind)} is not supported; {', '.join(GGUF_KINDS)} are"
        fields.fail(prefix + "type", problem)
    if kind == "none":
        return RopeConfig(base, rotary_dim, None, stored_as_pairs)
    factor = fields.number(prefix + "factor")
    if kind == "linear":
        return RopeConfig(base, rotary_dim, RopeScaling(kind, factor), stored_as_pairs)
    if base <= 1:
        fields.fail(f"{arch}.rope.freq_base", f"expected more than 1 for yarn, got {base}")
    fields.require(prefix + "yarn_ext_factor", 1.0, default=1.0)
    divisor = prefix + "yarn_log_multiplier"
    sharpen = _yarn_factor(factor, 1.0)
    if fields.has(divisor):
        sharpen /= _yarn_factor(factor, fields.number(divisor))
    scaling = RopeScaling(
        kind,
        factor,
        fields.integer(fields.first(prefix + "original_context_length", f"{arch}.context_length")),
        beta_fast=fields.number(prefix + "yarn_beta_fast", 32.0),
        beta_slow=fields.number(prefix + "yarn_beta_slow", 1.0),
        attention_factor=sharpen * fields.number(prefix + "attn_factor", 1.0),
    )
    return RopeConfig(base, rotary_dim, scaling, stored_as_pairs)


def stretched(max_seqlen: int, rope: RopeConfig) -> int:
    """Positions that a model with this rotary embedding is for, where the file names those it was trained on."""
    scaling = rope.scaling
    if scaling is None or scaling.kind not in ("dynamic", "yarn"):
        return max_seqlen
    return max(max_seqlen, int(min(scaling.factor * scaling.original_max_seqlen, MAX_INT)))


def _yarn_factor(factor: float, weight: float) -> float:
    """What yarn multiplies q and k with: longer contexts get sharper attention."""
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0
