"""OPT: LayerNorm, learned positions, ReLU. GGUF has no name for it."""

from __future__ import annotations

from fastattn.model.blocks import Decoder
from fastattn.model.config import Fields, ModelConfig, read_activation, read_hf
from fastattn.model.gpt import build_gpt
from fastattn.model.weights import WeightReader

NAME = "opt"
HF_CLASSES = ("OPTForCausalLM",)
GGUF_ARCHS: tuple[str, ...] = ()

HF_PREFIX = "model."
HF_TRANSPOSED: tuple[str, ...] = ()
IGNORED: tuple[str, ...] = ()

POSITION_OFFSET = (
    2  # rows of the position table that stand before position 0: its indices began behind the padding's
)

KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "nlayers": "num_hidden_layers",
    "nheads": "num_attention_heads",
    "ffn_size": "ffn_dim",
    "max_seqlen": "max_position_embeddings",
}

# part: (Hugging Face without "model.",)
NAMES = {
    "embedding": ("decoder.embed_tokens",),
    "positions": ("decoder.embed_positions",),
    "norm": ("decoder.final_layer_norm",),
    "head": ("lm_head",),
    "attn_norm": ("decoder.layers.{}.self_attn_layer_norm",),
    "q": ("decoder.layers.{}.self_attn.q_proj",),
    "k": ("decoder.layers.{}.self_attn.k_proj",),
    "v": ("decoder.layers.{}.self_attn.v_proj",),
    "attn_out": ("decoder.layers.{}.self_attn.out_proj",),
    "ffn_norm": ("decoder.layers.{}.final_layer_norm",),
    "up": ("decoder.layers.{}.fc1",),
    "down": ("decoder.layers.{}.fc2",),
}


def hf_config(config: Fields, generation_config: Fields) -> ModelConfig:
    """From config.json and generation_config.json."""
    common = read_hf(config, generation_config, KEYS)
    for key, wanted in {
        "do_layer_norm_before": True,  # False in opt-350m alone
        "_remove_final_layer_norm": False,
        "layer_norm_elementwise_affine": True,
        "word_embed_proj_dim": common["hidden_size"],
    }.items():
        config.require(key, wanted, default=wanted)
    return ModelConfig(
        arch=NAME,
        **common,
        norm_eps=1e-5,
        rope=None,
        tie_embeddings=config.flag("tie_word_embeddings", True),
        activation=read_activation(config, "activation_function", "relu"),
    )


def build(config: ModelConfig, weights: WeightReader) -> Decoder:
    """The decoder, read from the file."""
    return build_gpt(config, weights, position_offset=POSITION_OFFSET)
