"""Llama and Mistral: RMSNorm, rotary embedding, grouped-query attention, gated MLP.

GGUF files store the rows of q and k permuted, so that the two halves of a rotated pair are neighbours; ``build``
puts them back, as Hugging Face files have them.
"""

from __future__ import annotations

from fastattn.linear import PackedLinear
from fastattn.model.blocks import Attention, Decoder, GatedMLP, Layer, RMSNorm, Rotary
from fastattn.model.config import (
    Fields,
    ModelConfig,
    read_activation,
    read_gguf_ids,
    read_gguf_rope,
    read_hf_ids,
    read_hf_rope,
    read_sizes,
)
from fastattn.model.weights import TensorSource, WeightReader, split_pairs

NAME = "llama"
HF_CLASSES = ("LlamaForCausalLM", "MistralForCausalLM")
GGUF_ARCHS = ("llama",)

HF_PREFIX = "model."
HF_TRANSPOSED: tuple[str, ...] = ()
IGNORED = (".rotary_emb.inv_freq",)  # a buffer in old checkpoints

# ModelConfig field: (config.json, GGUF metadata)
KEYS = {
    "vocab_size": ("vocab_size", "llama.vocab_size"),
    "hidden_size": ("hidden_size", "llama.embedding_length"),
    "nlayers": ("num_hidden_layers", "llama.block_count"),
    "nheads": ("num_attention_heads", "llama.attention.head_count"),
    "nheads_k": ("num_key_value_heads", "llama.attention.head_count_kv"),
    "headdim": ("head_dim", "llama.attention.key_length"),
    "ffn_size": ("intermediate_size", "llama.feed_forward_length"),
    "max_seqlen": ("max_position_embeddings", "llama.context_length"),
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


def hf_config(config: Fields, generation_config: Fields) -> ModelConfig:
    """From config.json and generation_config.json."""
    sizes = read_sizes(config, {field: keys[0] for field, keys in KEYS.items()})
    _check_window(config, "sliding_window", sizes["max_seqlen"])
    bos_id, eos_ids = read_hf_ids(config, generation_config)
    return ModelConfig(
        arch=NAME,
        **sizes,
        norm_eps=config.number("rms_norm_eps", 1e-6),
        rope=read_hf_rope(config, sizes["headdim"]),
        tie_embeddings=config.flag("tie_word_embeddings", False),
        activation=read_activation(config, "hidden_act", "silu"),
        bos_id=bos_id,
        eos_ids=eos_ids,
    )


def gguf_config(fields: Fields, source: TensorSource) -> ModelConfig:
    """From GGUF metadata. Without a vocab_size the embedding's rows count; without a head it is tied."""
    shapes = source.shapes()
    rows = shapes.get("token_embd.weight", (0,))[0]
    keys = {field: keys[1] for field, keys in KEYS.items()}
    sizes = read_sizes(fields, keys, **({"vocab_size": rows} if rows else {}))
    headdim = sizes["headdim"]
    fields.require("llama.attention.value_length", headdim, headdim)
    _check_window(fields, "llama.attention.sliding_window", sizes["max_seqlen"])
    bos_id, eos_ids = read_gguf_ids(fields)
    return ModelConfig(
        arch=NAME,
        **sizes,
        norm_eps=fields.number("llama.attention.layer_norm_rms_epsilon"),
        rope=read_gguf_rope(fields, "llama", headdim, stored_as_pairs=True),
        tie_embeddings="output.weight" not in shapes,
        activation="silu",
        bos_id=bos_id,
        eos_ids=eos_ids,
    )


def _check_window(fields: Fields, key: str, max_seqlen: int) -> None:
    """Sliding windows that some sequence would feel are not built: refuse them."""
    if fields.has(key) and fields.integer(key, low=0) < max_seqlen:
        problem = f"a sliding window shorter than max_seqlen={max_seqlen} is not supported"
        fields.fail(key, f"{problem}, got {fields.values[key]}")


def build(config: ModelConfig, weights: WeightReader) -> Decoder:
    """The decoder, read from the file."""
    rope = config.rope
    assert rope is not None
    hidden, eps = config.hidden_size, config.norm_eps
    size_q, size_k = config.nheads * config.headdim, config.nheads_k * config.headdim
    has_factors = weights.has("rope_factors")
    factors = weights.vector("rope_factors", rope.rotary_dim // 2) if has_factors else None
    rotary = Rotary(rope, factors)

    def linear(layer: int, cols: int, **rows: int) -> PackedLinear:
        return PackedLinear(*weights.linear(rows, cols, layer))

    layers = []
    for i in range(config.nlayers):
        qkv, bias = weights.linear(
            {"q": size_q, "k": size_k, "v": size_k}, hidden, i
        )  # (size_q + 2 * size_k, hidden)
        if rope.stored_as_pairs:
            for rows in (qkv,) if bias is None else (qkv, bias):
                split_pairs(rows[: size_q + size_k], config.headdim, rope.rotary_dim)
        attn = Attention(PackedLinear(qkv, bias), linear(i, size_q, attn_out=hidden), config, rotary)
        gate_up = linear(i, hidden, gate=config.ffn_size, up=config.ffn_size)
        mlp = GatedMLP(gate_up, linear(i, config.ffn_size, down=hidden), config.activation)
        attn_norm = RMSNorm(weights.vector("attn_norm", hidden, i), eps)
        layers.append(Layer(attn_norm, attn, RMSNorm(weights.vector("ffn_norm", hidden, i), eps), mlp))

    embedding = weights.matrix("embedding", config.vocab_size, hidden)  # (vocab, hidden)
    head = PackedLinear(*weights.head(embedding, config.tie_embeddings))
    norm = RMSNorm(weights.vector("norm", hidden), eps)
    return Decoder(config, embedding, layers, norm, head, rotary=rotary)
