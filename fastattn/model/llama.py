"""Llama: the shared gated decoder as it is. GGUF files of Mistral are of this architecture too."""

from __future__ import annotations

from fastattn.model import gated
from fastattn.model.config import Fields, ModelConfig
from fastattn.model.gated import HF_PREFIX, HF_TRANSPOSED, IGNORED, NAMES, build
from fastattn.model.weights import TensorSource

__all__ = ["HF_PREFIX", "HF_TRANSPOSED", "IGNORED", "NAMES", "build", "gguf_config", "hf_config"]

NAME = "llama"
HF_CLASSES = ("LlamaForCausalLM",)
GGUF_ARCHS = ("llama",)


def hf_config(config: Fields, generation_config: Fields) -> ModelConfig:
    """From config.json and generation_config.json."""
    return gated.hf_config(NAME, config, generation_config)


def gguf_config(fields: Fields, source: TensorSource) -> ModelConfig:
    """From GGUF metadata; a sliding window is one of all layers."""
    every_layer = tuple(range(fields.integer("llama.block_count")))
    window = gated.windowed(fields, "llama.attention.sliding_window", every_layer)
    return gated.gguf_config(NAME, fields, source, stored_as_pairs=True, **window)
