"""Gemma 2 (arXiv 2408.00118): norms before and after each branch, every other layer local, soft caps.

Hugging Face files store the RMSNorm weights less one, GGUF files whole; the token vectors come in times
sqrt(hidden_size).
"""

from __future__ import annotations

import math
from typing import Any

from fastattn.model import gated
from fastattn.model.config import Fields, ModelConfig, read_activation, shown
from fastattn.model.gated import HF_PREFIX, HF_TRANSPOSED, IGNORED, build
from fastattn.model.weights import TensorSource

__all__ = ["HF_PREFIX", "HF_TRANSPOSED", "IGNORED", "build", "gguf_config", "hf_config"]

NAME = "gemma2"
HF_CLASSES = ("Gemma2ForCausalLM",)
GGUF_ARCHS = ("gemma2",)
NAMES = {
    **gated.NAMES,
    "post_attn_norm": ("layers.{}.post_attention_layernorm", "blk.{}.post_attention_norm"),
    "ffn_norm": ("layers.{}.pre_feedforward_layernorm", "blk.{}.ffn_norm"),
    "post_ffn_norm": ("layers.{}.post_feedforward_layernorm", "blk.{}.post_ffw_norm"),
}

WINDOW = 4096  # where the file does not say
HEADDIM = 256
PATTERN = 2  # of so many layers the last sees everything
LAYERS_27B = 46


def hf_config(config: Fields, generation_config: Fields) -> ModelConfig:
    """From config.json and generation_config.json."""
    config.require("use_bidirectional_attention", False, default=False)
    caps: dict[str, Any] = {
        "attn_softcap": hf_softcap(config, "attn_logit_softcapping", 50.0),
        "logit_softcap": hf_softcap(config, "final_logit_softcapping", 30.0),
    }
    window = hf_window(config, PATTERN)
    return gated.hf_config(NAME, config, generation_config, **hf_common(config), **caps, **window)


def gguf_config(fields: Fields, source: TensorSource) -> ModelConfig:
    """From GGUF metadata."""
    caps: dict[str, Any] = {
        "attn_softcap": fields.number("gemma2.attn_logit_softcapping", 50.0),
        "logit_softcap": fields.number("gemma2.final_logit_softcapping", 30.0),
    }
    common = gguf_common(NAME, fields, LAYERS_27B)
    window = gguf_window(NAME, fields, PATTERN, WINDOW)
    return gated.gguf_config(NAME, fields, source, **common, **caps, **window)


def hf_common(config: Fields) -> dict[str, Any]:
    """What Gemma 2 and 3 have in common."""
    return {
        "defaults": {"headdim": HEADDIM},
        "tied": True,
        "activation": read_activation(config, "hidden_activation", "gelu_pytorch_tanh"),
        "softmax_scale": config.number("query_pre_attn_scalar", 256.0) ** -0.5,
        "embedding_scale": math.sqrt(config.integer("hidden_size")),
        "norm_offset": 1.0,
    }


def hf_softcap(config: Fields, key: str, default: float) -> float:
    """A soft cap, of which a null is none."""
    return (
        0.0 if not config.has(key) and (key in config.values or not default) else config.number(key, default)
    )


def hf_window(config: Fields, pattern: int) -> dict[str, Any]:
    """The window of layer_types, or of all layers but the last of ``pattern``."""
    nlayers = config.integer("num_hidden_layers")
    local = gated.read_layer_types(config, nlayers, local_layers(nlayers, pattern))
    return gated.windowed(config, "sliding_window", local, WINDOW)


def gguf_common(name: str, fields: Fields, layers_27b: int) -> dict[str, Any]:
    """The same from GGUF. The 27B models alone scale scores by hidden_size / nheads; the files do not say so."""
    hidden = fields.integer(f"{name}.embedding_length")
    common: dict[str, Any] = {"activation": "gelu_tanh", "embedding_scale": math.sqrt(hidden)}
    if fields.integer(f"{name}.block_count") == layers_27b:
        common["softmax_scale"] = (hidden // fields.integer(f"{name}.attention.head_count")) ** -0.5
    return common


def gguf_window(name: str, fields: Fields, pattern: int, default: int | None) -> dict[str, Any]:
    """The same from GGUF, whose pattern is a number or says of every layer whether it is local."""
    nlayers, key = fields.integer(f"{name}.block_count"), f"{name}.attention.sliding_window_pattern"
    listed = fields.values.get(key)
    if isinstance(listed, list):
        if len(listed) != nlayers or not all(isinstance(is_local, bool) for is_local in listed):
            fields.fail(key, f"expected a bool for each of the {nlayers} layers, got {shown(listed)}")
        local = tuple(i for i, is_local in enumerate(listed) if is_local)
    else:
        local = local_layers(nlayers, fields.integer(key, pattern))
    return gated.windowed(fields, f"{name}.attention.sliding_window", local, default)


def local_layers(nlayers: int, pattern: int) -> tuple[int, ...]:
    """All but the last of every ``pattern``."""
    return tuple(i for i in range(nlayers) if (i + 1) % pattern)
