"""BLOOM: LayerNorm, on the embedding too, and ALiBi instead of positions.

Its files name no longest sequence where ``seq_length`` is missing: then it is the 2048 that it was trained with.
"""

from __future__ import annotations

from fastattn.model.blocks import Decoder, alibi_slopes
from fastattn.model.config import Fields, ModelConfig, read_gguf, read_hf
from fastattn.model.gpt import build_gpt
from fastattn.model.weights import TensorSource, WeightReader

NAME = "bloom"
HF_CLASSES = ("BloomForCausalLM",)
GGUF_ARCHS = ("bloom",)

HF_PREFIX = "transformer."
HF_TRANSPOSED: tuple[str, ...] = ()
IGNORED: tuple[str, ...] = ()

# part: (Hugging Face without "transformer.", GGUF)
NAMES = {
    "embedding": ("word_embeddings", "token_embd"),
    "embedding_norm": ("word_embeddings_layernorm", "token_embd_norm"),
    "norm": ("ln_f", "output_norm"),
    "head": ("lm_head", "output"),
    "attn_norm": ("h.{}.input_layernorm", "blk.{}.attn_norm"),
    "qkv": ("h.{}.self_attention.query_key_value", "blk.{}.attn_qkv"),
    "attn_out": ("h.{}.self_attention.dense", "blk.{}.attn_output"),
    "ffn_norm": ("h.{}.post_attention_layernorm", "blk.{}.ffn_norm"),
    "up": ("h.{}.mlp.dense_h_to_4h", "blk.{}.ffn_up"),
    "down": ("h.{}.mlp.dense_4h_to_h", "blk.{}.ffn_down"),
}


def hf_config(config: Fields, generation_config: Fields) -> ModelConfig:
    """From config.json, in the words of today or of the first checkpoints, and generation_config.json."""
    config.require("apply_residual_connection_post_layernorm", False, default=False)
    keys = {
        "vocab_size": "vocab_size",
        "hidden_size": config.first("hidden_size", "n_embed"),
        "nlayers": config.first("n_layer", "num_hidden_layers"),
        "nheads": config.first("n_head", "num_attention_heads"),
        "ffn_size": "n_inner",
        "max_seqlen": "seq_length",
    }
    ffn_size = 4 * config.integer(keys["hidden_size"])
    return ModelConfig(
        arch=NAME,
        **read_hf(config, generation_config, keys, ffn_size=ffn_size, max_seqlen=2048),
        norm_eps=config.number("layer_norm_epsilon", 1e-5),
        rope=None,
        tie_embeddings=config.flag("tie_word_embeddings", True),
        activation="gelu_tanh",
        alibi=True,
        qkv_grouped=True,
    )


def gguf_config(fields: Fields, source: TensorSource) -> ModelConfig:
    """From GGUF metadata, where all queries, all keys and all values follow each other."""
    return ModelConfig(
        arch=NAME,
        **read_gguf(fields, source, "bloom"),
        norm_eps=fields.number("bloom.attention.layer_norm_epsilon"),
        rope=None,
        activation="gelu_tanh",
        alibi=True,
    )


def build(config: ModelConfig, weights: WeightReader) -> Decoder:
    """The decoder, read from the file."""
    biased = {"qkv", "attn_out", "up", "down"}
    return build_gpt(config, weights, biased=biased, alibi_slopes=alibi_slopes(config.nheads))
