"""What every pre-norm decoder is made of, and the one function that runs it.

    x = embedding(token_ids)                          (total, hidden)
    for each layer:  x += attention(norm(x));  x += mlp(norm(x))          (or both from the same x)
    logits = head(norm(x))                            (batch or total, vocab)

The tokens of all rows of a batch lie one after the other, ragged and without padding: linear layers, norms
and MLPs see flat (total, features) float32; only attention knows about rows. Matrices and the KV cache have
the model's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.fused import activate, activate_mul, rms_norm
from fastattn.kvcache import attention_with_kvcache
from fastattn.linear import PackedLinear
from fastattn.model.config import ModelConfig
from fastattn.model.kv_cache import KVCache, Ring
from fastattn.model.rope import Rotary


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


@dataclass(frozen=True, slots=True)
class Step:
    """One pass through the layers: which rows get how many tokens, and where these stand."""

    runs: list[Run]
    seqlens: Tensor  # (batch,) int32, tokens per row before it
    longest: int  # tokens of the longest row after it
    block_table: Tensor | None  # (batch, max_blocks) int32, of the layers with a window (KVCache.pages)


class Attention:
    """Causal self-attention over the cache, q, k and v from one product.

    Args:
        qkv: weight ((nheads + 2 * nheads_k) * headdim, hidden), rows in the order q, k, v.
        out: weight (hidden, nheads * headdim).
        config: nheads, nheads_k, headdim, scale and softcap.
        rotary: the model's tables, or None.
        window: tokens that one sees, itself included; 0: all before it.
        alibi_slopes: (nheads,) float32, or None.
        q_norm: of every query head, weight (headdim,), or None.
        k_norm: of every key head, likewise.
    """

    def __init__(
        self,
        qkv: PackedLinear,
        out: PackedLinear,
        config: ModelConfig,
        rotary: Rotary | None,
        *,
        window: int = 0,
        alibi_slopes: Tensor | None = None,
        q_norm: RMSNorm | None = None,
        k_norm: RMSNorm | None = None,
    ) -> None:
        self.qkv = qkv
        self.out = out
        self.heads = [config.nheads, config.nheads_k, config.nheads_k]
        self.headdim = config.headdim
        self.rotary = rotary
        self.ring = Ring(window) if window else None
        self.norms = (q_norm, k_norm)
        self.modifiers = {
            "softmax_scale": config.softmax_scale,
            "softcap": config.attn_softcap,
            "alibi_slopes": alibi_slopes,  # (nheads,)
        }

    def __call__(self, x: Tensor, step: Step, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        """Append each token's k and v, attend, project.

        Args:
            x: (total, hidden) float32.
            step: how the tokens belong to rows, and where they stand.
            k_cache: (batch, capacity, nheads_k, headdim), written in place.
            v_cache: the same.

        Returns:
            (total, hidden) float32.
        """
        qkv = self.qkv(x).view(len(x), -1, self.headdim)  # (total, nheads + 2 * nheads_k, headdim)
        parts = []
        for run in step.runs:
            q, k, v = self._heads(qkv[run.tokens], run.seqlen, k_cache.dtype)
            parts.append(self._attend(q, k, v, step, run.rows, k_cache, v_cache))
        out = parts[0] if len(parts) == 1 else torch.cat(parts)  # (total, nheads * headdim)
        return self.out(out.float())  # (total, hidden)

    def _heads(self, qkv: Tensor, seqlen: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """q, k, v of equally long rows, each (batch, seqlen, nheads or nheads_k, headdim) in the cache's dtype."""
        if self.norms == (None, None):
            qkv = qkv.to(dtype)  # (tokens, nheads + 2 * nheads_k, headdim)
        heads = list(torch.split(qkv, self.heads, dim=1))  # each (tokens, nheads or nheads_k, headdim)
        for n, norm in enumerate(self.norms):
            if norm is not None:
                heads[n] = norm(heads[n].reshape(-1, self.headdim)).view(heads[n].shape)
        return tuple(x.to(dtype).view(-1, seqlen, *x.shape[1:]) for x in heads)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, step: Step, rows: slice, k_cache: Tensor, v_cache: Tensor
    ) -> Tensor:
        """q, k, v (batch, seqlen, ...) of these rows -> (batch * seqlen, nheads * headdim)."""
        options: dict[str, Any] = {"causal": True, "rotary_interleaved": False, **self.modifiers}
        if self.rotary is not None:
            options |= {"rotary_cos": self.rotary.cos, "rotary_sin": self.rotary.sin}
        ring, seqlens = self.ring, step.seqlens[rows]  # (batch,)
        if ring is not None and step.longest > ring.window:
            options["window_size"] = (ring.window - 1, 0)
        if ring is None or step.block_table is None:
            out = attention_with_kvcache(
                q, k_cache[rows], v_cache[rows], k, v, cache_seqlens=seqlens, **options
            )
            return cast(Tensor, out).view(-1, self.heads[0] * self.headdim)
        pages = [x.view(-1, ring.page, *x.shape[2:]) for x in (k_cache, v_cache)]  # (num_blocks, page, ...)
        options["block_table"] = step.block_table[rows]  # (batch, max_blocks)
        parts: list[Any] = []
        for new in zip(*(torch.split(x, ring.piece, dim=1) for x in (q, k, v))):
            parts.append(attention_with_kvcache(new[0], *pages, *new[1:], cache_seqlens=seqlens, **options))
            seqlens = seqlens + new[0].shape[1]
        return torch.cat(parts, dim=1).view(-1, self.heads[0] * self.headdim)


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer: two residual branches, each behind its norm; in some models before another one.

    One after the other, or ``parallel``: the MLP then reads x as it was before the attention, through its own
    norm, or, where ``ffn_norm`` is None, what the attention reads.
    """

    attn_norm: Norm
    attn: Attention
    ffn_norm: Norm | None
    mlp: MLP | GatedMLP
    parallel: bool = False
    post_attn_norm: Norm | None = None
    post_ffn_norm: Norm | None = None

    def __call__(self, x: Tensor, step: Step, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        """x (total, hidden) float32 -> the same memory, updated; the others as in ``Attention``."""
        attn_in = self.attn_norm(x)  # (total, hidden)
        attn_out = self.attn(attn_in, step, k_cache, v_cache)  # (total, hidden)
        if self.post_attn_norm is not None:
            attn_out = self.post_attn_norm(attn_out)
        if not self.parallel:
            x += attn_out
        ffn_in = attn_in if self.ffn_norm is None else self.ffn_norm(x)  # (total, hidden)
        if self.parallel:
            x += attn_out
        ffn_out = self.mlp(ffn_in)  # (total, hidden)
        x += ffn_out if self.post_ffn_norm is None else self.post_ffn_norm(ffn_out)
        return x


class Decoder:
    """A decoder-only transformer with its weights. Architectures differ in the parts that they hand in.

    Args:
        config: sizes and constants.
        embedding: (vocab, hidden) in the model's dtype.
        layers: ``config.nlayers`` of them.
        norm: the last norm.
        head: weight (vocab, hidden).
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
        positions: Tensor | None = None,
        embedding_norm: Norm | None = None,
    ) -> None:
        self.config = config
        self.embedding = embedding  # (vocab, hidden)
        self.layers = list(layers)
        self.norm = norm
        self.head = head
        self.rotaries = {layer.attn.rotary for layer in layers if layer.attn.rotary is not None}
        self.prompt_limit = min((r.prompt_limit for r in self.rotaries), default=config.max_seqlen)
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
        step = Step(split_runs(seqlens), cache.seqlens, max(ends), cache.pages(max(ends)))
        for layer, k_cache, v_cache in zip(self.layers, cache.k, cache.v):
            x = layer(x, step, k_cache, v_cache)
        cache.advance(ends)

        if not all_logits and len(x) > len(seqlens):
            last = torch.tensor(seqlens).cumsum(0) - 1  # (batch,)
            x = x[last]  # (batch, hidden)
        logits = self.head(self.norm(x))  # (batch or total, vocab)
        cap = self.config.logit_softcap
        return logits.div_(cap).tanh_().mul_(cap) if cap else logits  # (batch or total, vocab)

    def _embed(self, token_ids: Tensor, starts: list[int], ends: list[int]) -> Tensor:
        """Token vectors, plus learned positions, (total, hidden) float32, in memory of its own."""
        x = F.embedding(token_ids, self.embedding).float()  # (total, hidden)
        if self.config.embedding_scale != 1.0:
            x = x * self.config.embedding_scale
        for rotary in self.rotaries:
            rotary.reserve(max(ends))
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
        for row, (end, seqlen) in enumerate(zip(ends, seqlens)):
            if seqlen > 1 and end > self.prompt_limit:
                begin = f"beyond {self.prompt_limit}, where dynamic rotary scaling begins"
                raise ValueError(
                    f"token_ids: row {row} would hold {end} tokens; {begin}, they have to come one at a time"
                )
        low, high = (int(x) for x in token_ids.aminmax())
        if low < 0 or high >= self.config.vocab_size:
            bad = low if low < 0 else high
            raise ValueError(f"token_ids: expected ids in [0, {self.config.vocab_size}), got {bad}")
