"""What Llama, Mistral, Qwen and Gemma share: RMSNorm, rotary embedding, grouped-query attention, gated MLP.

Their files say in the same words how large they are and how their tensors are called; what one of them has more
(norms of q and k, norms after the branches, windows) is found by its name. GGUF files of Llama store the rows of
q and k permuted, so that the two halves of a rotated pair are neighbours; ``build`` puts them back.
"""

from __future__ import annotations

from typing import Any

from fastattn.linear import PackedLinear
from fastattn.model.blocks import Attention, Decoder, GatedMLP, Layer, RMSNorm
from fastattn.model.config import Fields, ModelConfig, read_activation, read_gguf, read_hf, shown
from fastattn.model.rope import Rotary, read_gguf_rope, read_hf_rope, stretched
from fastattn.model.weights import TensorSource, WeightReader, split_pairs

HF_PREFIX = "model."
HF_TRANSPOSED: tuple[str, ...] = ()
IGNORED = (".rotary_emb.inv_freq",)  # a buffer in old checkpoints

KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "nlayers": "num_hidden_layers",
    "nheads": "num_attention_heads",
    "nheads_k": "num_key_value_heads",
    "headdim": "head_dim",
    "ffn_size": "intermediate_size",
    "max_seqlen": "max_position_embeddings",
}

# part: (Hugging Face without "model.", GGUF)
NAMES = {
    "embedding": ("embed_tokens", "token_embd"),
    "norm": ("norm", "output_norm"),
    "head": ("lm_head", "output"),
    "rope_factors": ("rope_factors", "rope_freqs"),
    "attn_norm": ("layers.{}.input_layernorm", "blk.{}.attn_norm"),
    "q": ("layers.{}.self_attn.q_proj", "blk.{}.attn_q"),
    "k": ("layers.{}.self_attn.k_proj", "blk.{}.attn_k"),
    "v": ("layers.{}.self_attn.v_proj", "blk.{}.attn_v"),
    "attn_out": ("layers.{}.self_attn.o_proj", "blk.{}.attn_output"),
    "ffn_norm": ("layers.{}.post_attention_layernorm", "blk.{}.ffn_norm"),
    "gate": ("layers.{}.mlp.gate_proj", "blk.{}.ffn_gate"),
    "up": ("layers.{}.mlp.up_proj", "blk.{}.ffn_up"),
    "down": ("layers.{}.mlp.down_proj", "blk.{}.ffn_down"),
}
QK_NORMS = {
    "q_norm": ("layers.{}.self_attn.q_norm", "blk.{}.attn_q_norm"),
    "k_norm": ("layers.{}.self_attn.k_norm", "blk.{}.attn_k_norm"),
}


def hf_config(
    name: str,
    config: Fields,
    generation_config: Fields,
    *,
    defaults: dict[str, int] | None = None,
    tied: bool = False,
    **others: Any,
) -> ModelConfig:
    """From config.json and generation_config.json.

    Args:
        name: of the architecture.
        config: config.json.
        generation_config: generation_config.json.
        defaults: sizes that config.json may lack.
        tied: whether the head is the embedding, where the file does not say.
        others: fields of ModelConfig that this architecture has its own way for.
    """
    common = read_hf(config, generation_config, KEYS, **(defaults or {}))
    if "rope" not in others:
        others["rope"] = read_hf_rope(config, common["headdim"])
    if "activation" not in others:
        others["activation"] = read_activation(config, "hidden_act", "silu")
    common["max_seqlen"] = stretched(common["max_seqlen"], others["rope"])
    return ModelConfig(
        arch=name,
        **common,
        norm_eps=config.number("rms_norm_eps", 1e-6),
        tie_embeddings=config.flag("tie_word_embeddings", tied),
        **others,
    )


def gguf_config(
    name: str, fields: Fields, source: TensorSource, *, stored_as_pairs: bool = False, **others: Any
) -> ModelConfig:
    """From GGUF metadata; ``others`` are fields of ModelConfig that this architecture has its own way for."""
    common = read_gguf(fields, source, name)
    rope = read_gguf_rope(fields, name, common["headdim"], stored_as_pairs=stored_as_pairs)
    common["max_seqlen"] = stretched(common["max_seqlen"], rope)
    return ModelConfig(
        arch=name,
        **common,
        norm_eps=fields.number(f"{name}.attention.layer_norm_rms_epsilon"),
        rope=rope,
        **{"activation": "silu", **others},
    )


def read_layer_types(config: Fields, nlayers: int, default: tuple[int, ...]) -> tuple[int, ...]:
    """The layers that config.json's ``layer_types`` says slide a window."""
    if not config.has("layer_types"):
        return default
    types = config.values["layer_types"]
    known = ("sliding_attention", "full_attention")
    if not isinstance(types, list) or len(types) != nlayers or any(kind not in known for kind in types):
        config.fail("layer_types", f"expected {nlayers} of {', '.join(known)}, got {shown(types)}")
    return tuple(i for i, kind in enumerate(types) if kind == known[0])


def windowed(
    config: Fields, key: str, local_layers: tuple[int, ...], default: int | None = None
) -> dict[str, Any]:
    """``window`` and ``local_layers`` of ModelConfig; none where the key is null, or missing without a default."""
    if config.has(key) or (default and key not in config.values):
        window = config.integer(key, default, low=0)
        if window and local_layers:
            return {"window": window, "local_layers": local_layers}
    return {}


def build(config: ModelConfig, weights: WeightReader, *, qkv_bias: bool = False) -> Decoder:
    """The decoder, read from the file. q, k and v must have biases with ``qkv_bias``, else they may."""
    rope = config.rope
    assert rope is not None
    hidden, headdim = config.hidden_size, config.headdim
    size_q, size_k = config.nheads * headdim, config.nheads_k * headdim
    has_factors = weights.has("rope_factors")
    factors = weights.vector("rope_factors", rope.rotary_dim // 2) if has_factors else None
    rotary = Rotary(rope, factors)
    local_rotary = rotary if config.local_rope is None else Rotary(config.local_rope)

    def qkv(layer: int) -> PackedLinear:
        rows = {"q": size_q, "k": size_k, "v": size_k}
        weight, bias = weights.linear(
            rows, hidden, layer, needs_bias=qkv_bias
        )  # (size_q + 2 * size_k, hidden)
        if rope.stored_as_pairs:
            for part in (weight,) if bias is None else (weight, bias):
                split_pairs(part[: size_q + size_k], headdim, rope.rotary_dim)
        return PackedLinear(weight, bias)

    def linear(layer: int, cols: int, **rows: int) -> PackedLinear:
        return PackedLinear(*weights.linear(rows, cols, layer))

    def norm(part: str, size: int, layer: int | None = None) -> RMSNorm:
        return RMSNorm(weights.vector(part, size, layer) + config.norm_offset, config.norm_eps)

    def norm_if_named(part: str, size: int, layer: int) -> RMSNorm | None:
        return norm(part, size, layer) if part in weights.names else None

    layers = []
    for i in range(config.nlayers):
        is_local = i in config.local_layers
        attn = Attention(
            qkv(i),
            linear(i, size_q, attn_out=hidden),
            config,
            local_rotary if is_local else rotary,
            window=config.window if is_local else 0,
            q_norm=norm_if_named("q_norm", headdim, i),
            k_norm=norm_if_named("k_norm", headdim, i),
        )
        gate_up = linear(i, hidden, gate=config.ffn_size, up=config.ffn_size)
        layer = Layer(
            norm("attn_norm", hidden, i),
            attn,
            norm("ffn_norm", hidden, i),
            GatedMLP(gate_up, linear(i, config.ffn_size, down=hidden), config.activation),
            post_attn_norm=norm_if_named("post_attn_norm", hidden, i),
            post_ffn_norm=norm_if_named("post_ffn_norm", hidden, i),
        )
        layers.append(layer)

    embedding = weights.matrix("embedding", config.vocab_size, hidden)  # (vocab, hidden)
    head = PackedLinear(*weights.head(embedding, config.tie_embeddings))
    return Decoder(config, embedding, layers, norm("norm", hidden), head)
