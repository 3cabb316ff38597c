"""Qwen 3 (arXiv 2505.09388): Llama with an RMSNorm of every head's q and k; the later layers may slide a window."""

from __future__ import annotations

from fastattn.model import gated
from fastattn.model.config import Fields, ModelConfig
from fastattn.model.gated import HF_PREFIX, HF_TRANSPOSED, IGNORED, build
from fastattn.model.qwen2 import hf_window
from fastattn.model.weights import TensorSource

__all__ = ["HF_PREFIX", "HF_TRANSPOSED", "IGNORED", "build", "gguf_config", "hf_config"]

NAME = "qwen3"
HF_CLASSES = ("Qwen3ForCausalLM",)
GGUF_ARCHS = ("qwen3",)
NAMES = {**gated.NAMES, **gated.QK_NORMS}


def hf_config(config: Fields, generation_config: Fields) -> ModelConfig:
    """From config.json and generation_config.json."""
    return gated.hf_config(NAME, config, generation_config, defaults={"headdim": 128}, **hf_window(config))


def gguf_config(fields: Fields, source: TensorSource) -> ModelConfig:
    """From GGUF metadata."""
    return gated.gguf_config(NAME, fields, source)
