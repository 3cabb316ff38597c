"""GPT-2: LayerNorm, learned positions, plain MLP, biases. Hugging Face stores its matrices as (in, out)."""

from __future__ import annotations

from fastattn.model.blocks import Decoder
from fastattn.model.config import Fields, ModelConfig, read_activation, read_gguf, read_hf
from fastattn.model.gpt import build_gpt
from fastattn.model.weights import TensorSource, WeightReader

NAME = "gpt2"
HF_CLASSES = ("GPT2LMHeadModel",)
GGUF_ARCHS = ("gpt2",)

HF_PREFIX = "transformer."
HF_TRANSPOSED = ("qkv", "attn_out", "up", "down")
IGNORED = (".attn.bias", ".attn.masked_bias")  # the causal mask, a buffer in old checkpoints

KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "n_embd",
    "nlayers": "n_layer",
    "nheads": "n_head",
    "ffn_size": "n_inner",
    "max_seqlen": "n_positions",
}

# part: (Hugging Face without "transformer.", GGUF)
NAMES = {
    "embedding": ("wte", "token_embd"),
    "positions": ("wpe", "position_embd"),
    "norm": ("ln_f", "output_norm"),
    "head": ("lm_head", "output"),
    "attn_norm": ("h.{}.ln_1", "blk.{}.attn_norm"),
    "qkv": ("h.{}.attn.c_attn", "blk.{}.attn_qkv"),
    "attn_out": ("h.{}.attn.c_proj", "blk.{}.attn_output"),
    "ffn_norm": ("h.{}.ln_2", "blk.{}.ffn_norm"),
    "up": ("h.{}.mlp.c_fc", "blk.{}.ffn_up"),
    "down": ("h.{}.mlp.c_proj", "blk.{}.ffn_down"),
}


def hf_config(config: Fields, generation_config: Fields) -> ModelConfig:
    """From config.json and generation_config.json."""
    for key, wanted in {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    }.items():
        config.require(key, wanted, default=wanted)
    ffn_size = 4 * config.integer("n_embd")  # what a null n_inner means
    return ModelConfig(
        arch=NAME,
        **read_hf(config, generation_config, KEYS, ffn_size=ffn_size),
        norm_eps=config.number("layer_norm_epsilon", 1e-5),
        rope=None,
        tie_embeddings=config.flag("tie_word_embeddings", True),
        activation=read_activation(config, "activation_function", "gelu_new"),
    )


def gguf_config(fields: Fields, source: TensorSource) -> ModelConfig:
    """From GGUF metadata."""
    return ModelConfig(
        arch=NAME,
        **read_gguf(fields, source, "gpt2"),
        norm_eps=fields.number("gpt2.attention.layer_norm_epsilon"),
        rope=None,
        activation="gelu_tanh",
    )


def build(config: ModelConfig, weights: WeightReader) -> Decoder:
    """The decoder, read from the file."""
    return build_gpt(config, weights, biased={"qkv", "attn_out", "up", "down"})
