"""Qwen 2 (arXiv 2407.10671): Llama with biases of q, k and v; the later layers may slide a window."""

from __future__ import annotations

from typing import Any

from fastattn.model import gated
from fastattn.model.blocks import Decoder
from fastattn.model.config import Fields, ModelConfig
from fastattn.model.gated import HF_PREFIX, HF_TRANSPOSED, IGNORED, NAMES
from fastattn.model.weights import TensorSource, WeightReader

__all__ = ["HF_PREFIX", "HF_TRANSPOSED", "IGNORED", "NAMES", "gguf_config", "hf_config"]

NAME = "qwen2"
HF_CLASSES = ("Qwen2ForCausalLM",)
GGUF_ARCHS = ("qwen2",)


def hf_config(config: Fields, generation_config: Fields) -> ModelConfig:
    """From config.json and generation_config.json."""
    return gated.hf_config(NAME, config, generation_config, **hf_window(config))


def gguf_config(fields: Fields, source: TensorSource) -> ModelConfig:
    """From GGUF metadata."""
    return gated.gguf_config(NAME, fields, source)


def build(config: ModelConfig, weights: WeightReader) -> Decoder:
    """The decoder, read from the file."""
    return gated.build(config, weights, qkv_bias=True)


def hf_window(config: Fields) -> dict[str, Any]:
    """The window of Qwen's files, if they use it: of ``layer_types``, or of layers from max_window_layers on."""
    if not config.flag("use_sliding_window", False):
        return {}
    nlayers = config.integer("num_hidden_layers")
    later = tuple(range(config.integer("max_window_layers", 28, low=0), nlayers))
    return gated.windowed(config, "sliding_window", gated.read_layer_types(config, nlayers, later), 4096)
