"""What every pre-norm decoder is made of, and the one function that runs it.

    x = embedding(token_ids)                          (total, hidden)
    for each layer:  x += attention(norm(x));  x += mlp(norm(x))          (or both from the same x)
    logits = head(norm(x))                            (batch or total, vocab)

The tokens of all rows of a batch lie one after the other, ragged and without padding: linear layers, norms
and MLPs see flat (total, features) float32; only attention knows about rows. Matrices and the KV cache have
the model's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.fused import activate, activate_mul, rms_norm
from fastattn.kvcache import attention_with_kvcache
from fastattn.linear import PackedLinear
from fastattn.model.config import ModelConfig, RopeConfig
from fastattn.model.kv_cache import KVCache

MIN_ROTARY_ROWS = 512  # the first size of the rotary tables; they grow with the longest sequence seen


class RMSNorm:
    """``x / sqrt(mean(x^2) + eps) * weight`` (arXiv 1910.07467) with weight (hidden,) float32."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight = weight  # (hidden,)
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        """x (tokens, hidden) float32 -> the same."""
        return rms_norm(x, self.weight, self.eps)  # (tokens, hidden)


class LayerNorm:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` with weight and bias (hidden,) float32."""

    def __init__(self, weight: Tensor, bias: Tensor, eps: float) -> None:
        self.weight = weight  # (hidden,)
        self.bias = bias  # (hidden,)
        self.shape = tuple(weight.shape)
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        """x (tokens, hidden) float32 -> the same."""
        return F.layer_norm(x, self.shape, self.weight, self.bias, self.eps)  # (tokens, hidden)


Norm = RMSNorm | LayerNorm


class MLP:
    """``down(activation(up(x)))``."""

    def __init__(self, up: PackedLinear, down: PackedLinear, activation: str) -> None:
        self.up = up
        self.down = down
        self.activation = activation  # a key of fused.ACTIVATIONS

    def __call__(self, x: Tensor) -> Tensor:
        """x (tokens, hidden) float32 -> the same."""
        return self.down(activate(self.up(x), self.activation))  # (tokens, hidden)


class GatedMLP:
    """``down(activation(gate(x)) * up(x))`` (GLU variants, arXiv 2002.05202), gate and up in one product."""

    def __init__(self, gate_up: PackedLinear, down: PackedLinear, activation: str) -> None:
        self.gate_up = gate_up  # weight (2 * ffn, hidden), gate first
        self.down = down
        self.activation = activation  # a key of fused.ACTIVATIONS

    def __call__(self, x: Tensor) -> Tensor:
        """x (tokens, hidden) float32 -> the same."""
        return self.down(activate_mul(self.gate_up(x), self.activation))  # (tokens, hidden)


class Rotary:
    """cos and sin of every position's angles, float32, computed up to the longest sequence seen so far.

    The tables grow on demand: a file's ``max_seqlen`` is a claim that nothing else in the file pays for.

    Args:
        config: base, rotary_dim and scaling.
        factors: (rotary_dim / 2,) float32 divisors of the frequencies (GGUF's rope_freqs), or None.
    """

    def __init__(self, config: RopeConfig, factors: Tensor | None = None) -> None:
        self.inv_freq = _inverse_frequencies(config)  # (rotary_dim / 2,) float64
        if factors is not None:
            self.inv_freq = self.inv_freq / factors.double()
        self.cos = self.sin = torch.empty(0, config.rotary_dim // 2)  # (positions, rotary_dim / 2)

    def reserve(self, seqlen: int) -> None:
        """Tables for at least ``seqlen`` positions."""
        if seqlen <= self.cos.shape[0]:
            return
        rows = max(seqlen, 2 * self.cos.shape[0], MIN_ROTARY_ROWS)
        # float64 until after cos and sin: a float32 angle of thousands of radians has lost its last digits.
        angles = torch.outer(torch.arange(rows, dtype=torch.float64), self.inv_freq)  # (rows, rotary_dim / 2)
        self.cos, self.sin = angles.cos().float(), angles.sin().float()  # (rows, rotary_dim / 2)


def _inverse_frequencies(config: RopeConfig) -> Tensor:
    """Radians per position of each rotated pair, (rotary_dim / 2,) float64."""
    pairs = torch.arange(0, config.rotary_dim, 2, dtype=torch.float64)  # (rotary_dim / 2,)
    inv_freq = config.base ** -(pairs / config.rotary_dim)  # (rotary_dim / 2,)
    scaling = config.scaling
    if scaling is None:
        return inv_freq
    if scaling.kind == "linear":
        return inv_freq / scaling.factor
    # llama3: how many turns a pair makes within the trained length decides; 0 = stretch it, 1 = leave it.
    turns = scaling.original_max_seqlen * inv_freq / (2 * math.pi)  # (rotary_dim / 2,)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # (rotary_dim / 2,)
    return inv_freq * (keep + (1 - keep) / scaling.factor)


def alibi_slopes(nheads: int) -> Tensor:
    """ALiBi's slope of each head (arXiv 2108.12409, section 3), (nheads,) float32.

    2^(-8 / n), 2^(-16 / n), ... for a power of two n; else those of the power of two below, then every other
    one of the power of two above.
    """
    below = 1 << (nheads.bit_length() - 1)  # the largest power of two <= nheads
    slopes = [2.0 ** (-8 * (h + 1) / below) for h in range(below)]
    slopes += [2.0 ** (-4 * (2 * h + 1) / below) for h in range(nheads - below)]
    return torch.tensor(slopes)  # (nheads,)


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring cache rows with equally many new tokens: one call of batched attention."""

    rows: slice  # of the cache
    tokens: slice  # of the flat tokens
    seqlen: int  # new tokens per row


def split_runs(seqlens: Sequence[int]) -> list[Run]:
    """The fewest runs that cover the batch in order."""
    runs, row, token = [], 0, 0
    for seqlen, group in groupby(seqlens):
        batch = len(list(group))
        runs.append(Run(slice(row, row + batch), slice(token, token + batch * seqlen), seqlen))
        row, token = row + batch, token + batch * seqlen
    return runs


class Attention:
    """Causal self-attention over the cache, q, k and v from one product.

    Args:
        qkv: weight ((nheads + 2 * nheads_k) * headdim, hidden), rows in the order q, k, v.
        out: weight (hidden, nheads * headdim).
        config: nheads, nheads_k and headdim.
        rotary: the model's tables, or None.
        alibi_slopes: (nheads,) float32, or None.
    """

    def __init__(
        self,
        qkv: PackedLinear,
        out: PackedLinear,
        config: ModelConfig,
        rotary: Rotary | None,
        *,
        alibi_slopes: Tensor | None = None,
    ) -> None:
        self.qkv = qkv
        self.out = out
        self.heads = [config.nheads, config.nheads_k, config.nheads_k]
        self.headdim = config.headdim
        self.rotary = rotary
        self.alibi_slopes = alibi_slopes  # (nheads,)

    def __call__(
        self, x: Tensor, runs: list[Run], k_cache: Tensor, v_cache: Tensor, seqlens: Tensor
    ) -> Tensor:
        """Append each token's k and v, attend, project.

        Args:
            x: (total, hidden) float32.
            runs: how the tokens belong to rows.
            k_cache: (batch, capacity, nheads_k, headdim), written in place.
            v_cache: the same.
            seqlens: (batch,) int32, tokens per row before this call.

        Returns:
            (total, hidden) float32.
        """
        qkv = self.qkv(x).to(k_cache.dtype)  # (total, (nheads + 2 * nheads_k) * headdim)
        if len(runs) == 1:
            out = self._attend(qkv, runs[0].seqlen, k_cache, v_cache, seqlens)
        else:
            parts = [
                self._attend(qkv[r.tokens], r.seqlen, k_cache[r.rows], v_cache[r.rows], seqlens[r.rows])
                for r in runs
            ]
            out = torch.cat(parts)  # (total, nheads * headdim)
        return self.out(out.float())  # (total, hidden)

    def _attend(self, qkv: Tensor, seqlen: int, k_cache: Tensor, v_cache: Tensor, seqlens: Tensor) -> Tensor:
        """qkv (batch * seqlen, ...) of equally long rows -> (batch * seqlen, nheads * headdim)."""
        batch = k_cache.shape[0]
        heads = qkv.view(batch, seqlen, -1, self.headdim)  # (batch, seqlen, nheads + 2 * nheads_k, headdim)
        q, k, v = torch.split(heads, self.heads, dim=2)  # (batch, seqlen, nheads or nheads_k, headdim)
        rotary = self.rotary
        out = attention_with_kvcache(
            q,
            k_cache,
            v_cache,
            k,
            v,
            cache_seqlens=seqlens,
            rotary_cos=None if rotary is None else rotary.cos,
            rotary_sin=None if rotary is None else rotary.sin,
            rotary_interleaved=False,
            causal=True,
            alibi_slopes=self.alibi_slopes,
        )
        return cast(Tensor, out).view(batch * seqlen, self.heads[0] * self.headdim)


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer: two residual branches, each behind its norm.

    One after the other, or ``parallel``: the MLP then reads x as it was before the attention, through its own
    norm, or, where ``ffn_norm`` is None, what the attention reads.
    """

    attn_norm: Norm
    attn: Attention
    ffn_norm: Norm | None
    mlp: MLP | GatedMLP
    parallel: bool = False

    def __call__(
        self, x: Tensor, runs: list[Run], k_cache: Tensor, v_cache: Tensor, seqlens: Tensor
    ) -> Tensor:
        """x (total, hidden) float32 -> the same memory, updated; the others as in ``Attention``."""
        attn_in = self.attn_norm(x)  # (total, hidden)
        attn_out = self.attn(attn_in, runs, k_cache, v_cache, seqlens)  # (total, hidden)
        if not self.parallel:
            x += attn_out
        ffn_in = attn_in if self.ffn_norm is None else self.ffn_norm(x)  # (total, hidden)
        if self.parallel:
            x += attn_out
        x += self.mlp(ffn_in)
        return x


class Decoder:
    """A decoder-only transformer with its weights. Architectures differ in the parts that they hand in.

    Args:
        config: sizes and constants.
        embedding: (vocab, hidden) in the model's dtype.
        layers: ``config.nlayers`` of them.
        norm: the last norm.
        head: weight (vocab, hidden).
        rotary: the tables that the layers' attention reads, or None.
        positions: (max_seqlen, hidden) learned positions in the model's dtype, or None.
        embedding_norm: what the embedding goes through first, or None.
    """

    def __init__(
        self,
        config: ModelConfig,
        embedding: Tensor,
        layers: Sequence[Layer],
        norm: Norm,
        head: PackedLinear,
        *,
        rotary: Rotary | None = None,
        positions: Tensor | None = None,
        embedding_norm: Norm | None = None,
    ) -> None:
        self.config = config
        self.embedding = embedding  # (vocab, hidden)
        self.layers = list(layers)
        self.norm = norm
        self.head = head
        self.rotary = rotary
        self.positions = positions  # (max_seqlen, hidden)
        self.embedding_norm = embedding_norm

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrices and of the KV cache; activations are float32."""
        return self.embedding.dtype

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache: ``batch`` rows with room for ``capacity`` tokens each; ``forward`` lets it grow."""
        return KVCache(self.config, batch, capacity, self.dtype)

    @torch.no_grad()
    def forward(
        self, token_ids: Tensor, seqlens: list[int], cache: KVCache, *, all_logits: bool = False
    ) -> Tensor:
        """Run new tokens of every cache row: a prompt, a piece of one, or one token each.

        Args:
            token_ids: (total,) int64, the rows' new tokens one after the other.
            seqlens: how many of them belong to each cache row, in order; each >= 1, together total.
            cache: what the rows have been through; the new keys and values are appended and ``cache.seqlens``
                advances.
            all_logits: logits of every token, not only of each row's last.

        Returns:
            logits float32, (batch, vocab), or (total, vocab) with all_logits.

        Raises:
            TypeError: token_ids is not an int64 tensor.
            ValueError: shapes that do not belong together, a token id outside the vocabulary, or a row that
                would be longer than ``config.max_seqlen``. The cache is then as it was.
        """
        starts: list[int] = cache.seqlens.tolist()
        ends = [start + seqlen for start, seqlen in zip(starts, seqlens)]
        self._check(token_ids, seqlens, cache, ends)
        if not seqlens:
            return torch.empty(0, self.config.vocab_size)  # (0, vocab)
        cache.reserve(max(ends))

        x = self._embed(token_ids, starts, ends)  # (total, hidden)
        runs = split_runs(seqlens)
        for layer, k_cache, v_cache in zip(self.layers, cache.k, cache.v):
            x = layer(x, runs, k_cache, v_cache, cache.seqlens)
        cache.seqlens = torch.tensor(ends, dtype=torch.int32)  # (batch,)

        if not all_logits and len(x) > len(seqlens):
            last = torch.tensor(seqlens).cumsum(0) - 1  # (batch,)
            x = x[last]  # (batch, hidden)
        return self.head(self.norm(x))  # (batch or total, vocab)

    def _embed(self, token_ids: Tensor, starts: list[int], ends: list[int]) -> Tensor:
        """Token vectors, plus learned positions, (total, hidden) float32, in memory of its own."""
        x = F.embedding(token_ids, self.embedding).float()  # (total, hidden)
        if self.rotary is not None:
            self.rotary.reserve(max(ends))
        if self.positions is not None:
            where = torch.cat([torch.arange(start, end) for start, end in zip(starts, ends)])  # (total,)
            x += F.embedding(where, self.positions)
        return x if self.embedding_norm is None else self.embedding_norm(x)

    def _check(self, token_ids: Tensor, seqlens: list[int], cache: KVCache, ends: list[int]) -> None:
        if not isinstance(token_ids, Tensor) or token_ids.dtype != torch.int64:
            got = token_ids.dtype if isinstance(token_ids, Tensor) else type(token_ids).__name__
            raise TypeError(f"token_ids: expected an int64 tensor, got {got}")
        if len(seqlens) != cache.batch:
            raise ValueError(f"seqlens: expected one entry per cache row, {cache.batch}, got {len(seqlens)}")
        if seqlens and min(seqlens) < 1:
            raise ValueError(f"seqlens: expected at least 1 new token per row, got {min(seqlens)}")
        if token_ids.shape != (sum(seqlens),):
            raise ValueError(f"token_ids: expected (total={sum(seqlens)},), got {tuple(token_ids.shape)}")
        if not seqlens:
            return
        if max(ends) > self.config.max_seqlen:
            row = ends.index(max(ends))
            limit = f"the model has max_seqlen={self.config.max_seqlen}"
            raise ValueError(f"token_ids: row {row} would hold {ends[row]} tokens, {limit}")
        low, high = (int(x) for x in token_ids.aminmax())
        if low < 0 or high >= self.config.vocab_size:
            bad = low if low < 0 else high
            raise ValueError(f"token_ids: expected ids in [0, {self.config.vocab_size}), got {bad}")
