"""Phi-1, Phi-1.5 and Phi-2: one LayerNorm before attention and MLP side by side, partial rotary, a biased head."""

from __future__ import annotations

from fastattn.model.blocks import Decoder
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

NAME = "phi"
HF_CLASSES = ("PhiForCausalLM",)
GGUF_ARCHS = ("phi2",)

HF_PREFIX = "model."
HF_TRANSPOSED: tuple[str, ...] = ()
IGNORED = (".rotary_emb.inv_freq",)  # a buffer in old checkpoints

KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "nlayers": "num_hidden_layers",
    "nheads": "num_attention_heads",
    "nheads_k": "num_key_value_heads",
    "ffn_size": "intermediate_size",
    "max_seqlen": "max_position_embeddings",
}

# part: (Hugging Face without "model.", GGUF). GGUF files from before transformers had Phi hold q, k and v as one.
NAMES = {
    "embedding": ("embed_tokens", "token_embd"),
    "norm": ("final_layernorm", "output_norm"),
    "head": ("lm_head", "output"),
    "attn_norm": ("layers.{}.input_layernorm", "blk.{}.attn_norm"),
    "qkv": ("layers.{}.self_attn.qkv_proj", "blk.{}.attn_qkv"),
    "q": ("layers.{}.self_attn.q_proj", "blk.{}.attn_q"),
    "k": ("layers.{}.self_attn.k_proj", "blk.{}.attn_k"),
    "v": ("layers.{}.self_attn.v_proj", "blk.{}.attn_v"),
    "attn_out": ("layers.{}.self_attn.dense", "blk.{}.attn_output"),
    "up": ("layers.{}.mlp.fc1", "blk.{}.ffn_up"),
    "down": ("layers.{}.mlp.fc2", "blk.{}.ffn_down"),
}


def hf_config(config: Fields, generation_config: Fields) -> ModelConfig:
    """From config.json and generation_config.json."""
    config.require("qk_layernorm", False, default=False)
    common = read_hf(config, generation_config, KEYS)
    return ModelConfig(
        arch=NAME,
        **common,
        norm_eps=config.number("layer_norm_eps", 1e-5),
        rope=read_hf_rope(config, common["headdim"], partial=0.5),
        tie_embeddings=config.flag("tie_word_embeddings", False),
        activation=read_activation(config, "hidden_act", "gelu_new"),
        parallel=True,
    )


def gguf_config(fields: Fields, source: TensorSource) -> ModelConfig:
    """From GGUF metadata."""
    common = read_gguf(fields, source, "phi2")
    return ModelConfig(
        arch=NAME,
        **common,
        norm_eps=fields.number("phi2.attention.layer_norm_epsilon"),
        rope=read_gguf_rope(fields, "phi2", common["headdim"]),
        activation="gelu_tanh",
        parallel=True,
    )


def build(config: ModelConfig, weights: WeightReader) -> Decoder:
    """The decoder, read from the file."""
    return build_gpt(config, weights, biased={"qkv", "q", "attn_out", "up", "down"}, ffn_norm=None)
