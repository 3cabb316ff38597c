"""Mistral (arXiv 2310.06825): Llama, and every layer sees a window of the last tokens. Its GGUF files are Llama's."""

from __future__ import annotations

from fastattn.model import gated
from fastattn.model.config import Fields, ModelConfig
from fastattn.model.gated import HF_PREFIX, HF_TRANSPOSED, IGNORED, NAMES, build

__all__ = ["HF_PREFIX", "HF_TRANSPOSED", "IGNORED", "NAMES", "build", "hf_config"]

NAME = "mistral"
HF_CLASSES = ("MistralForCausalLM",)
GGUF_ARCHS: tuple[str, ...] = ()

DEFAULT_WINDOW = 4096  # where the file does not say; null is no window


def hf_config(config: Fields, generation_config: Fields) -> ModelConfig:
    """From config.json and generation_config.json."""
    every_layer = tuple(range(config.integer("num_hidden_layers")))
    window = gated.windowed(config, "sliding_window", every_layer, DEFAULT_WINDOW)
    return gated.hf_config(NAME, config, generation_config, **window)
