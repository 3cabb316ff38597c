"""The one object that travels from the public face to a backend: what a call computes.

Everything here has been checked (``checks.py``): a backend may trust shapes, dtypes and ranges.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

NO_FEATURES: frozenset[str] = frozenset()
GRADIENTS = frozenset({"gradients"})


@dataclass(frozen=True, slots=True)
class AttentionArgs:
    """One softmax attention. The score modifiers that are not used keep their defaults."""

    q: Tensor  # (batch, seqlen_q, nheads, headdim)
    k: Tensor  # (batch, seqlen_k, nheads_k, headdim)
    v: Tensor  # (batch, seqlen_k, nheads_k, headdim_v)
    softmax_scale: float
    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alibi_slopes: Tensor | None = None  # (nheads,) or (batch, nheads)
    attn_bias: Tensor | None = None  # broadcastable to (batch, nheads, seqlen_q, seqlen_k), float
    attn_mask: Tensor | None = None  # the same, bool, True = may attend
    sinks: Tensor | None = None  # (nheads,)
    dropout_p: float = 0.0
    seqlens_k: Tensor | None = None  # (batch,) int32: how many keys of each row count; None = all
    return_lse: bool = False
    needs_grad: bool = False

    @property
    def subject(self) -> Tensor:
        """The tensor whose dtype and device decide which backend can serve."""
        return self.q

    def features(self) -> frozenset[str]:
        """Names of what this call needs beyond plain (causal) attention."""
        if (
            self.window_size == (-1, -1)
            and self.softcap == 0.0
            and self.dropout_p == 0.0
            and self.alibi_slopes is self.attn_bias is self.attn_mask is self.sinks is None
            and not self.needs_grad
        ):
            return NO_FEATURES  # what a decode step asks 30 times per token: keep it cheap
        used = {
            "window": self.window_size != (-1, -1),
            "softcap": self.softcap != 0.0,
            "alibi": self.alibi_slopes is not None,
            "bias": self.attn_bias is not None,
            "mask": self.attn_mask is not None,
            "sinks": self.sinks is not None,
            "dropout": self.dropout_p != 0.0,
            "gradients": self.needs_grad,
        }
        return frozenset(name for name, is_used in used.items() if is_used)


@dataclass(frozen=True, slots=True)
class KVAppendArgs:
    """Rotate q and the new k, and write the new k, v into the cache, in place."""

    q: Tensor  # (batch, seqlen_q, nheads, headdim)
    k_cache: Tensor  # (batch, seqlen_cache, nheads_k, headdim)
    v_cache: Tensor  # (batch, seqlen_cache, nheads_k, headdim_v)
    cache_seqlens: Tensor  # (batch,) int32, tokens already in the cache
    k: Tensor | None = None  # (batch, seqlen_new, nheads_k, headdim)
    v: Tensor | None = None  # (batch, seqlen_new, nheads_k, headdim_v)
    rotary_cos: Tensor | None = None  # (seqlen_rotary, rotary_dim / 2), float32
    rotary_sin: Tensor | None = None  # the same
    rotary_interleaved: bool = True
    rotary_per_row: bool = True  # each query at its own position (causal), or all at cache_seqlens
    needs_grad: bool = False

    @property
    def subject(self) -> Tensor:
        """The tensor whose dtype and device decide which backend can serve."""
        return self.q

    def features(self) -> frozenset[str]:
        """Names of what this append needs beyond writing and rotating."""
        return GRADIENTS if self.needs_grad else NO_FEATURES


@dataclass(frozen=True, slots=True)
class SamplingArgs:
    """One draw per row. A parameter is a number for all rows, or a contiguous (batch,) tensor."""

    logits: Tensor  # (batch, vocab), stride(-1) == 1
    temperature: float | Tensor  # float64, 0 = greedy, inf = uniform
    top_k: int | Tensor  # int64, 0 and -1 = off
    top_p: float | Tensor  # float64, 1 = off
    min_p: float | Tensor  # float64, 0 = off
    seeds: int | Tensor  # int64, the key's 64 bits
    positions: int | Tensor  # int64
    extra_features: frozenset[str] = frozenset()

    @property
    def subject(self) -> Tensor:
        """The tensor whose dtype and device decide which backend can serve."""
        return self.logits

    def features(self) -> frozenset[str]:
        """Names of what this call needs beyond temperature, top_k, top_p and min_p."""
        return self.extra_features
