"""Falcon, which is built as PaLM (arXiv 2204.02311): few KV heads, attention and MLP side by side, rotary embedding.

* 7B: one KV head, one norm for both. 40B ("new decoder architecture"): groups of queries, two norms; 11B with one.
* RW: as many KV heads as heads, ALiBi instead of rotary embedding, attention and MLP one after the other.

GGUF keeps all queries, all keys and all values in this order, and knows the first two kinds alone. The 40B's norm
before the MLP is its ``attn_norm``, the one before attention its ``attn_norm_2``.
"""

from __future__ import annotations

import math

import torch

from fastattn.model.blocks import Decoder, alibi_slopes
from fastattn.model.config import (
    Fields,
    ModelConfig,
    read_activation,
    read_gguf,
    read_hf,
)
from fastattn.model.gpt import build_gpt
from fastattn.model.rope import read_gguf_rope, read_hf_rope
from fastattn.model.weights import TensorSource, WeightReader

NAME = "falcon"
HF_CLASSES = ("FalconForCausalLM",)
GGUF_ARCHS = ("falcon",)

HF_PREFIX = "transformer."
HF_TRANSPOSED: tuple[str, ...] = ()
IGNORED = (".rotary_emb.inv_freq",)  # a buffer in old checkpoints

KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "nlayers": "num_hidden_layers",
    "nheads": "num_attention_heads",
    "ffn_size": "ffn_hidden_size",
    "max_seqlen": "max_position_embeddings",
}

# part: (Hugging Face without "transformer.", GGUF)
NAMES = {
    "embedding": ("word_embeddings", "token_embd"),
    "norm": ("ln_f", "output_norm"),
    "head": ("lm_head", "output"),
    "attn_norm": ("h.{}.input_layernorm", "blk.{}.attn_norm"),
    "ffn_norm": ("h.{}.post_attention_layernorm", "blk.{}.ffn_norm"),
    "own_attn_norm": ("h.{}.ln_attn", "blk.{}.attn_norm_2"),
    "own_ffn_norm": ("h.{}.ln_mlp", "blk.{}.attn_norm"),
    "qkv": ("h.{}.self_attention.query_key_value", "blk.{}.attn_qkv"),
    "attn_out": ("h.{}.self_attention.dense", "blk.{}.attn_output"),
    "up": ("h.{}.mlp.dense_h_to_4h", "blk.{}.ffn_up"),
    "down": ("h.{}.mlp.dense_4h_to_h", "blk.{}.ffn_down"),
}


def hf_config(config: Fields, generation_config: Fields) -> ModelConfig:
    """From config.json and generation_config.json. Without the new architecture num_kv_heads says nothing."""
    is_new = config.flag("new_decoder_architecture", False)
    has_one_kv_head = not is_new and config.flag("multi_query", True)
    alibi = config.flag("alibi", False)
    ffn_size = 4 * config.integer("hidden_size")  # what a null ffn_hidden_size means
    keys = {**KEYS, "nheads_k": "num_kv_heads"} if is_new else KEYS
    common = read_hf(config, generation_config, keys, ffn_size=ffn_size, max_seqlen=2048)
    if has_one_kv_head:
        common["nheads_k"] = 1
    return ModelConfig(
        arch=NAME,
        **common,
        norm_eps=config.number("layer_norm_epsilon", 1e-5),
        rope=None if alibi else read_hf_rope(config, common["headdim"]),
        tie_embeddings=config.flag("tie_word_embeddings", True),
        activation=read_activation(config, "activation", "gelu"),
        alibi=alibi,
        parallel=is_new or config.flag("parallel_attn", True),
        qkv_grouped=True,
    )


def gguf_config(fields: Fields, source: TensorSource) -> ModelConfig:
    """From GGUF metadata."""
    common = read_gguf(fields, source, "falcon")
    fields.require("falcon.tensor_data_layout", "jploski", default="jploski")
    return ModelConfig(
        arch=NAME,
        **common,
        norm_eps=fields.number("falcon.attention.layer_norm_epsilon"),
        rope=read_gguf_rope(fields, "falcon", common["headdim"]),
        activation="gelu",
        parallel=True,
    )


def build(config: ModelConfig, weights: WeightReader) -> Decoder:
    """The decoder, read from the file."""
    slopes = None
    if config.alibi:
        # ALiBi joins the scores before they are scaled, with slopes in bfloat16 (their products with the distance,
        # which transformers rounds too, stay as they are: it says where keys are, not how far from the query).
        rounded = alibi_slopes(config.nheads).to(torch.bfloat16).float()  # (nheads,)
        slopes = rounded / math.sqrt(config.headdim)  # (nheads,)
    if config.parallel and weights.has("own_attn_norm", 0):
        return build_gpt(
            config, weights, attn_norm="own_attn_norm", ffn_norm="own_ffn_norm", alibi_slopes=slopes
        )
    return build_gpt(config, weights, ffn_norm=None if config.parallel else "ffn_norm", alibi_slopes=slopes)
