"""The one object that travels from the public face to a backend: what a call computes.

Everything here has been checked (``checks.py``): a backend may trust shapes, dtypes and ranges.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from fastattn.token_counts import TokenCounts

MAX_HEADDIM = 512  # csrc/params.h, kMaxHeaddim
LogitBias = Tensor | tuple[Tensor, Tensor]
NO_FEATURES: frozenset[str] = frozenset()
APPEND_GRADIENTS = frozenset({"append_gradients"})


def top_left(seqlen_q: int, seqlen_k: int) -> tuple[int, bool, tuple[int, int]]:
    """A causal mask with its corner top-left, in terms of ``attention``'s, whose corner is bottom-right.

    Returns:
        How many keys anybody sees, and ``causal`` and ``window_size`` for a call with that many.
    """
    if seqlen_q <= seqlen_k:
        return seqlen_q, True, (-1, -1)
    return seqlen_k, False, (-1, seqlen_q - seqlen_k)


@dataclass(frozen=True, slots=True)
class AttentionArgs:
    """One softmax attention. The score modifiers that are not used keep their defaults.

    Which keys a batch row has: ``k_leftpad .. seqlens_k`` of its rows. Where its rows are: in row ``cache_batch_idx``
    of k and v; or, packed, from ``cu_seqlens_k`` on; or in the pages that ``block_table`` lists.
    """

    q: Tensor  # (batch, seqlen_q, nheads, headdim); (1, total_q, nheads, headdim) with cu_seqlens_q
    k: Tensor  # (batch, seqlen_k, nheads_k, headdim); (1, total_k, ...) packed; (num_blocks, page_size, ...) paged
    v: Tensor  # the same, headdim_v
    softmax_scale: float
    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alibi_slopes: Tensor | None = None  # (nheads,) or (batch, nheads), float32
    attn_bias: Tensor | None = None  # broadcastable to (batch, nheads, seqlen_q, seqlen_k), float
    bias_is_relative: bool = False  # attn_bias is (batch|1, nheads|1, 1, seqlen_q + seqlen_k - 1), by j - i
    attn_mask: Tensor | None = None  # the same, bool, True = may attend
    sinks: Tensor | None = None  # (nheads,)
    dropout_p: float = 0.0
    rng_state: Tensor | None = None  # (2,) int64: seed, offset; given iff dropout_p > 0
    cu_seqlens_q: Tensor | None = None  # (batch + 1,) int32: where each sequence's queries begin
    cu_seqlens_k: Tensor | None = None  # (batch + 1,) int32; None if k is not packed
    max_seqlen_q: int = 0  # of the packed sequences
    max_seqlen_k: int = 0
    seqlens_k: Tensor | None = None  # (batch,) int32: where each row's keys end; None = all
    k_leftpad: Tensor | None = None  # (batch,) int32: where each row's keys begin; None = 0
    cache_batch_idx: Tensor | None = None  # (batch,) int32: the row of k and v that a batch row reads
    block_table: Tensor | None = None  # (batch, max_blocks) int32: pages of k and v
    k_scale: Tensor | None = None  # k's shape without headdim, float32: k is int8, and stands for k * k_scale
    v_scale: Tensor | None = None  # the same for v
    return_lse: bool = False
    needs_grad: bool = False

    @property
    def subject(self) -> Tensor:
        """The tensor whose dtype and device decide which backend can serve."""
        return self.q

    @property
    def batch(self) -> int:
        """Sequences in the call."""
        return self.q.shape[0] if self.cu_seqlens_q is None else self.cu_seqlens_q.shape[0] - 1

    def features(self) -> frozenset[str]:
        """Names of what this call needs beyond plain (causal) attention."""
        if (
            self.window_size == (-1, -1)
            and self.softcap == 0.0
            and self.dropout_p == 0.0
            and self.alibi_slopes is self.attn_bias is self.attn_mask is self.sinks is None
            and self.cu_seqlens_q is self.k_leftpad is self.cache_batch_idx is self.block_table is None
            and self.k.dtype == self.q.dtype
            and not self.needs_grad
        ):
            return NO_FEATURES  # what a decode step asks 30 times per token: keep it cheap
        used = {
            "window": self.window_size != (-1, -1),
            "softcap": self.softcap != 0.0,
            "alibi": self.alibi_slopes is not None,
            "bias": self.attn_bias is not None and not self.bias_is_relative,
            "relative_bias": self.bias_is_relative,
            "mask": self.attn_mask is not None,
            "sinks": self.sinks is not None,
            "dropout": self.dropout_p != 0.0,
            "varlen": self.cu_seqlens_q is not None,
            "leftpad": self.k_leftpad is not None,
            "cache_batch_idx": self.cache_batch_idx is not None,
            "paged": self.block_table is not None,
            "kv_dtype": self.k.dtype != self.q.dtype,
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
    k_leftpad: Tensor | None = None  # these five as in AttentionArgs
    cache_batch_idx: Tensor | None = None
    block_table: Tensor | None = None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    needs_grad: bool = False

    @property
    def subject(self) -> Tensor:
        """The tensor whose dtype and device decide which backend can serve."""
        return self.q

    def features(self) -> frozenset[str]:
        """Names of what this append needs beyond writing and rotating."""
        return APPEND_GRADIENTS if self.needs_grad else NO_FEATURES


class LogitEdits(NamedTuple):
    """What happens to logits before temperature. Tensors of one value per token are expanded to the batch."""

    logit_bias: LogitBias | None = (
        None  # (batch, vocab) or ids and values, each (batch, n); float32, or float64
    )
    allowed: Tensor | None = None  # (batch, vocab) bool, or (batch, ceil(vocab / 32)) int32
    repetition_penalty: float | Tensor = 1.0  # float64, as the other two
    presence_penalty: float | Tensor = 0.0
    frequency_penalty: float | Tensor = 0.0
    token_counts: Tensor | TokenCounts | None = None  # (batch, vocab) int32; None if no penalty needs it
    prompt_mask: Tensor | None = None  # (batch, vocab) bool

    @property
    def has_penalties(self) -> bool:
        """Whether some token may be penalised."""
        return self.token_counts is not None or self.prompt_mask is not None

    def with_ascending_bias(self) -> LogitEdits:
        """The listed biases of each row by ascending id: those of one token are neighbours then, in their order."""
        if not isinstance(self.logit_bias, tuple):
            return self
        ids, values = self.logit_bias  # each (batch, n)
        batch = ids.shape[0]
        if ids.stride(0) == values.stride(0) == 0:  # one list for all rows
            ids, values = ids[:1], values[:1]
        ids, order = ids.sort(dim=1, stable=True)
        return self._replace(logit_bias=(ids.expand(batch, -1), values.gather(1, order).expand(batch, -1)))


class SamplingArgs(NamedTuple):
    """One draw per row. A parameter is a number for all rows, or a contiguous (batch,) tensor."""

    logits: Tensor  # (batch, vocab), stride(-1) == 1
    temperature: float | Tensor  # float64, 0 = greedy, inf = uniform
    top_k: int | Tensor  # int64, 0 and -1 = off
    top_p: float | Tensor  # float64, 1 = off
    min_p: float | Tensor  # float64, 0 = off
    seeds: int | Tensor  # int64, the key's 64 bits
    positions: int | Tensor  # int64
    edits: LogitEdits | None = None
    logprobs: int = 0  # of how many of the best tokens; 0 = of none
    survivors: bool = False  # asked for what the filters keep, not for a token

    @property
    def subject(self) -> Tensor:
        """The tensor whose dtype and device decide which backend can serve."""
        return self.logits

    def features(self) -> frozenset[str]:
        """Names of what this call needs beyond temperature, top_k, top_p and min_p."""
        if self.edits is None and self.logprobs == 0 and not self.survivors:
            return NO_FEATURES
        edits = self.edits or LogitEdits()
        used = {
            "logit_bias": edits.logit_bias is not None,
            "allowed": edits.allowed is not None,
            "penalties": edits.has_penalties,
            "logprobs": self.logprobs > 0,
            "survivors": self.survivors,
        }
        return frozenset(name for name, is_used in used.items() if is_used)
