"""What the architectures with LayerNorm and a plain MLP share: GPT-2, GPT-NeoX, GPT-J, OPT, Phi, BLOOM, Falcon."""

from __future__ import annotations

from collections.abc import Set

from torch import Tensor

from fastattn.linear import PackedLinear
from fastattn.model.blocks import MLP, Attention, Decoder, Layer, LayerNorm
from fastattn.model.config import ModelConfig
from fastattn.model.rope import Rotary
from fastattn.model.weights import WeightReader, split_pairs, ungroup_qkv


def build_gpt(
    config: ModelConfig,
    weights: WeightReader,
    *,
    biased: Set[str] = frozenset(),
    attn_norm: str = "attn_norm",
    ffn_norm: str | None = "ffn_norm",
    alibi_slopes: Tensor | None = None,
    position_offset: int = 0,
) -> Decoder:
    """The decoder, read from the file.

    Args:
        config: the model; ``rope``, ``parallel`` and ``qkv_grouped`` say how its layers go.
        weights: the file. q, k and v are one part "qkv" or three; "positions", "embedding_norm" are read where the
            architecture names them.
        biased: linear parts that must have a bias; the others may.
        attn_norm: the part that normalises what attention reads.
        ffn_norm: the part that does so for the MLP; None where that reads what attention reads.
        alibi_slopes: (nheads,) float32, or None.
        position_offset: rows of "positions" that come before position 0.
    """
    hidden, headdim = config.hidden_size, config.headdim
    size_q, size_k = config.nheads * headdim, config.nheads_k * headdim
    rotary = None if config.rope is None else Rotary(config.rope)

    def norm(part: str, layer: int | None = None) -> LayerNorm:
        weight = weights.vector(part, hidden, layer)  # (hidden,)
        return LayerNorm(weight, weights.vector(part, hidden, layer, "bias"), config.norm_eps)

    def linear(layer: int, cols: int, **rows: int) -> PackedLinear:
        return PackedLinear(*weights.linear(rows, cols, layer, needs_bias=not biased.isdisjoint(rows)))

    def qkv(layer: int) -> PackedLinear:
        fused = "q" not in weights.names or weights.has("qkv", layer)
        rows = {"qkv": size_q + 2 * size_k} if fused else {"q": size_q, "k": size_k, "v": size_k}
        weight, bias = weights.linear(rows, hidden, layer, needs_bias=not biased.isdisjoint(rows))
        parts = [weight] if bias is None else [weight, bias]  # (size_q + 2 * size_k, hidden), the same rows
        if config.qkv_grouped:
            parts = [ungroup_qkv(part, config.nheads_k, headdim) for part in parts]
        if config.rope is not None and config.rope.stored_as_pairs:
            for part in parts:
                split_pairs(part[: size_q + size_k], headdim, config.rope.rotary_dim)
        return PackedLinear(*parts)

    layers = []
    for i in range(config.nlayers):
        attn = Attention(
            qkv(i), linear(i, size_q, attn_out=hidden), config, rotary, alibi_slopes=alibi_slopes
        )
        mlp = MLP(
            linear(i, hidden, up=config.ffn_size), linear(i, config.ffn_size, down=hidden), config.activation
        )
        own_norm = None if ffn_norm is None else norm(ffn_norm, i)
        layers.append(Layer(norm(attn_norm, i), attn, own_norm, mlp, config.parallel))

    embedding = weights.matrix("embedding", config.vocab_size, hidden)  # (vocab, hidden)
    positions = None
    if "positions" in weights.names:
        rows = position_offset + config.max_seqlen
        positions = weights.matrix("positions", rows, hidden)[position_offset:]  # (max_seqlen, hidden)
    return Decoder(
        config,
        embedding,
        layers,
        norm("norm"),
        PackedLinear(*weights.head(embedding, config.tie_embeddings)),
        positions=positions,
        embedding_norm=norm("embedding_norm") if "embedding_norm" in weights.names else None,
    )
