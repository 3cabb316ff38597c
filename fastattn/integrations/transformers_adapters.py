"""Layers that write their attention out instead of asking transformers' interface, by the name of their class.

And those of T5, which ask it, but with a matrix of biases that need not be. An adapter is a subclass that replaces the
method with the attention, or the bias, in it, and takes the place of the layer's class:
parameters, hooks and the state_dict stay as they are. ``implementation`` is what the model's configuration must say, so
that the model makes masks that the adapter understands.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.integrations.transformers_attention import attend


class _Adapter:
    """What all have: copies and pickles remember the layer's class, and find the adapter by it."""

    implementation = "fastattn"
    __dict__: dict[str, Any]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        base = next(c for c in type(self).__mro__ if issubclass(c, nn.Module) and not issubclass(c, _Adapter))
        return _remade, (base,), self.__dict__


def _remade(base: type[Any]) -> Any:
    cls = ADAPTERS[base.__name__](base)
    return cls.__new__(cls)


@cache
def bloom(base: type[Any]) -> type[Any]:
    """BLOOM: ALiBi comes as a bias per key, the mask as bool or None."""

    class BloomAttention(_Adapter, base):  # type: ignore[misc]
        def forward(
            self,
            hidden_states: Tensor,
            residual: Tensor,
            alibi: Tensor,
            attention_mask: Tensor | None,
            layer_past: Any = None,
            **kwargs: Any,
        ) -> tuple[Tensor, None]:
            batch, seqlen_q, _ = hidden_states.shape
            query, key, value = self._reshape(self.query_key_value(hidden_states))
            if layer_past is not None:
                key, value = layer_past.update(key, value, self.layer_idx)
            bias = alibi.view(batch, self.num_heads, 1, -1)  # (batch, nheads, 1, seqlen_k)
            out = attend(
                self, query, key, value, attention_mask, bias=bias, scaling=self.inv_norm_factor,
                dropout=self.attention_dropout.p if self.training else 0.0,
            )  # fmt: skip
            out = self.dense(out.reshape(batch, seqlen_q, -1))
            return residual + nn.functional.dropout(out, self.hidden_dropout, self.training), None

    return BloomAttention


@cache
def falcon(base: type[Any]) -> type[Any]:
    """Falcon: rotary and multi-query, or ALiBi, which the model has put into a float mask."""

    class FalconAttention(_Adapter, base):  # type: ignore[misc]
        def forward(
            self,
            hidden_states: Tensor,
            alibi: Tensor | None,
            attention_mask: Tensor | None,
            position_ids: Tensor | None = None,
            layer_past: Any = None,
            use_cache: bool = False,
            output_attentions: bool = False,
            position_embeddings: tuple[Tensor, Tensor] | None = None,
            **kwargs: Any,
        ) -> tuple[Tensor, None]:
            from transformers.models.falcon import modeling_falcon

            batch, seqlen_q, _ = hidden_states.shape
            heads = self._split_heads(self.query_key_value(hidden_states))
            query, key, value = (
                x.transpose(1, 2) for x in heads
            )  # (batch, nheads or nheads_k, seqlen, headdim)
            dropout = 0.0
            if alibi is None:
                assert position_embeddings is not None
                rotate: Any = modeling_falcon.apply_rotary_pos_emb
                query, key = rotate(query, key, *position_embeddings)
            elif self.training:  # only here the model drops weights
                dropout = self.attention_dropout.p
            if layer_past is not None:
                key, value = layer_past.update(key, value, self.layer_idx)
            out = attend(
                self, query, key, value, attention_mask, scaling=self.inv_norm_factor, dropout=dropout
            )
            return self.dense(out.reshape(batch, seqlen_q, -1)), None

    return FalconAttention


@cache
def gptj(base: type[Any]) -> type[Any]:
    """GPT-J: its one method around the softmax."""

    class GPTJAttention(_Adapter, base):  # type: ignore[misc]
        def _attn(
            self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None
        ) -> tuple[Tensor, None]:
            query, key = query.to(value.dtype), key.to(value.dtype)
            dropout = self.attn_dropout.p if self.training else 0.0
            scaling = 1 / float(self.scale_attn)
            out = attend(self, query, key, value, attention_mask, scaling=scaling, dropout=dropout)
            return out.transpose(1, 2), None  # (batch, nheads, seqlen_q, headdim)

    return GPTJAttention


@cache
def mpt(base: type[Any]) -> type[Any]:
    """MPT: the mask says, by bool, what is hidden, and ALiBi is as long as the model's longest text."""

    class MptAttention(_Adapter, base):  # type: ignore[misc]
        implementation = "eager"

        def forward(
            self,
            hidden_states: Tensor,
            position_bias: Tensor | None,
            past_key_values: Any = None,
            attention_mask: Tensor | None = None,
            **kwargs: Any,
        ) -> tuple[Tensor, None]:
            batch, seqlen_q, _ = hidden_states.shape
            qkv = self.Wqkv(hidden_states)
            if self.clip_qkv:
                qkv = qkv.clamp(-self.clip_qkv, self.clip_qkv)
            qkv = qkv.view(batch, seqlen_q, 3, self.n_heads, self.head_dim)
            query, key, value = (x.transpose(1, 2) for x in qkv.unbind(2))
            if past_key_values is not None:
                key, value = past_key_values.update(key, value, self.layer_idx)
            if position_bias is not None:  # (nheads, 1, max_seq_len), of which the last keys are ours
                position_bias = position_bias[None, :, :, max(0, position_bias.shape[2] - key.shape[2]) :]
            out = attend(
                self, query, key, value, None if attention_mask is None else ~attention_mask.to(torch.bool),
                bias=position_bias, scaling=float(self.softmax_scale),
                dropout=self.attn_dropout_p if self.training else 0.0,
            )  # fmt: skip
            return self.out_proj(out.reshape(batch, seqlen_q, -1)), None

    return MptAttention


class _ByDistance(_Adapter):
    """A bias that depends on how far a key is from a query alone, as the line of distances: no matrix is filled."""

    config: Any
    relative_attention_bias: nn.Embedding

    @property
    def biases_by_distance(self) -> bool:
        """Not while ``set_attn_implementation`` has put others in our place, who know matrices."""
        return bool(self.config._attn_implementation == self.implementation)

    def compute_bias(
        self, query_length: int, key_length: int, device: Any = None, past_seen_tokens: int | Tensor = 0
    ) -> Tensor:
        """(1, nheads, 1, seqlen_q + seqlen_k - 1), by key - query; in transformers it is seqlen_q by seqlen_k."""
        if not self.biases_by_distance:
            matrix: Tensor = super().compute_bias(query_length, key_length, device, past_seen_tokens)  # type: ignore[misc]
            return matrix
        device = self.relative_attention_bias.weight.device if device is None else device
        first = 1 - query_length
        distances = torch.arange(first, max(first, key_length), device=device) - past_seen_tokens
        values: Tensor = self.relative_attention_bias(self._buckets(distances))  # (distances, nheads)
        return values.T[None, :, None]

    def _buckets(self, distances: Tensor) -> Tensor:
        raise NotImplementedError


@cache
def t5(base: type[Any]) -> type[Any]:
    """T5 and its copies: a layer hands its bias on to the next, and cross-attention has none."""

    class T5Attention(_ByDistance, base):  # type: ignore[misc]
        def forward(
            self, hidden_states: Tensor, *args: Any, position_bias: Tensor | None = None, **kwargs: Any
        ) -> Any:
            if position_bias is None and self.biases_by_distance and not self.has_relative_attention_bias:
                position_bias = hidden_states.new_empty((1, self.n_heads, 1, 0))  # transformers' are zeros
            return super().forward(hidden_states, *args, position_bias=position_bias, **kwargs)

        def _buckets(self, distances: Tensor) -> Tensor:
            buckets: Tensor = self._relative_position_bucket(
                distances, not self.is_decoder, self.relative_attention_num_buckets,
                self.relative_attention_max_distance,
            )  # fmt: skip
            return buckets

    return T5Attention


@cache
def umt5(base: type[Any]) -> type[Any]:
    """UMT5: every layer has a bias of its own, and cross-attention a matrix of zeros."""

    class UMT5Attention(_ByDistance, base):  # type: ignore[misc]
        @property
        def biases_by_distance(self) -> bool:
            return bool(self.has_relative_attention_bias) and super().biases_by_distance

        def _buckets(self, distances: Tensor) -> Tensor:
            buckets: Tensor = self._relative_position_bucket(distances)
            return buckets

    return UMT5Attention


ADAPTERS: dict[str, Any] = {
    "BloomAttention": bloom,
    "FalconAttention": falcon,
    "GPTJAttention": gptj,
    "MptAttention": mpt,
    **dict.fromkeys(("T5Attention", "MT5Attention", "Pop2PianoAttention", "SwitchTransformersAttention"), t5),
    "UMT5Attention": umt5,
}
