"""GPT-J: one LayerNorm before attention and MLP side by side, rotary embedding of neighbouring pairs, a biased head.

The rows of q and k are put in the order of halves at load: ``build_gpt`` knows one rotary convention. GGUF names the
architecture and its tensors; they are taken to lie as in Hugging Face files.
"""

from __future__ import annotations

from fastattn.model.blocks import Decoder
from fastattn.model.config import (
    Fields,
    ModelConfig,
    RopeConfig,
    read_activation,
    read_gguf,
    read_hf,
    read_rotary_dim,
)
from fastattn.model.gpt import build_gpt
from fastattn.model.rope import read_gguf_rope
from fastattn.model.weights import TensorSource, WeightReader

NAME = "gptj"
HF_CLASSES = ("GPTJForCausalLM",)
GGUF_ARCHS = ("gptj",)

HF_PREFIX = "transformer."
HF_TRANSPOSED: tuple[str, ...] = ()
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
    "norm": ("ln_f", "output_norm"),
    "head": ("lm_head", "output"),
    "attn_norm": ("h.{}.ln_1", "blk.{}.attn_norm"),
    "q": ("h.{}.attn.q_proj", "blk.{}.attn_q"),
    "k": ("h.{}.attn.k_proj", "blk.{}.attn_k"),
    "v": ("h.{}.attn.v_proj", "blk.{}.attn_v"),
    "attn_out": ("h.{}.attn.out_proj", "blk.{}.attn_output"),
    "up": ("h.{}.mlp.fc_in", "blk.{}.ffn_up"),
    "down": ("h.{}.mlp.fc_out", "blk.{}.ffn_down"),
}


def hf_config(config: Fields, generation_config: Fields) -> ModelConfig:
    """From config.json and generation_config.json."""
    ffn_size = 4 * config.integer("n_embd")  # what a null n_inner means
    common = read_hf(config, generation_config, KEYS, ffn_size=ffn_size)
    rotary_dim = read_rotary_dim(config, "rotary_dim", 64, common["headdim"])
    return ModelConfig(
        arch=NAME,
        **common,
        norm_eps=config.number("layer_norm_epsilon", 1e-5),
        rope=RopeConfig(10000.0, rotary_dim, stored_as_pairs=True),
        tie_embeddings=config.flag("tie_word_embeddings", False),
        activation=read_activation(config, "activation_function", "gelu_new"),
        parallel=True,
    )


def gguf_config(fields: Fields, source: TensorSource) -> ModelConfig:
    """From GGUF metadata."""
    common = read_gguf(fields, source, "gptj")
    return ModelConfig(
        arch=NAME,
        **common,
        norm_eps=fields.number("gptj.attention.layer_norm_epsilon"),
        rope=read_gguf_rope(fields, "gptj", common["headdim"], stored_as_pairs=True),
        activation="gelu_tanh",
        parallel=True,
    )


def build(config: ModelConfig, weights: WeightReader) -> Decoder:
    """The decoder, read from the file."""
    return build_gpt(config, weights, biased={"up", "down"}, ffn_norm=None)
