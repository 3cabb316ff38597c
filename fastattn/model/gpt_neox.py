"""GPT-NeoX and Pythia: LayerNorm, rotary embedding of a share of each head, attention and MLP side by side."""

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

NAME = "gpt_neox"
HF_CLASSES = ("GPTNeoXForCausalLM",)
GGUF_ARCHS = ("gptneox",)

HF_PREFIX = "gpt_neox."
HF_TRANSPOSED: tuple[str, ...] = ()
IGNORED = (".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")  # buffers in old checkpoints

KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "nlayers": "num_hidden_layers",
    "nheads": "num_attention_heads",
    "ffn_size": "intermediate_size",
    "max_seqlen": "max_position_embeddings",
}

# part: (Hugging Face without "gpt_neox.", GGUF)
NAMES = {
    "embedding": ("embed_in", "token_embd"),
    "norm": ("final_layer_norm", "output_norm"),
    "head": ("embed_out", "output"),
    "attn_norm": ("layers.{}.input_layernorm", "blk.{}.attn_norm"),
    "qkv": ("layers.{}.attention.query_key_value", "blk.{}.attn_qkv"),
    "attn_out": ("layers.{}.attention.dense", "blk.{}.attn_output"),
    "ffn_norm": ("layers.{}.post_attention_layernorm", "blk.{}.ffn_norm"),
    "up": ("layers.{}.mlp.dense_h_to_4h", "blk.{}.ffn_up"),
    "down": ("layers.{}.mlp.dense_4h_to_h", "blk.{}.ffn_down"),
}


def hf_config(config: Fields, generation_config: Fields) -> ModelConfig:
    """From config.json and generation_config.json."""
    common = read_hf(config, generation_config, KEYS)
    rope = read_hf_rope(
        config, common["headdim"], base_key="rotary_emb_base", partial_key="rotary_pct", partial=0.25
    )
    return ModelConfig(
        arch=NAME,
        **common,
        norm_eps=config.number("layer_norm_eps", 1e-5),
        rope=rope,
        tie_embeddings=config.flag("tie_word_embeddings", False),
        activation=read_activation(config, "hidden_act", "gelu"),
        parallel=config.flag("use_parallel_residual", True),
        qkv_grouped=True,
    )


def gguf_config(fields: Fields, source: TensorSource) -> ModelConfig:
    """From GGUF metadata, where all queries, all keys and all values follow each other, and the base is 10000."""
    common = read_gguf(fields, source, "gptneox")
    return ModelConfig(
        arch=NAME,
        **common,
        norm_eps=fields.number("gptneox.attention.layer_norm_epsilon"),
        rope=read_gguf_rope(fields, "gptneox", common["headdim"]),
        activation="gelu",
        parallel=fields.flag("gptneox.use_parallel_residual", True),
    )


def build(config: ModelConfig, weights: WeightReader) -> Decoder:
    """The decoder, read from the file."""
    return build_gpt(config, weights, biased={"up", "down"})
