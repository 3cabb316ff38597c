"""Gemma 3 (arXiv 2503.19786), its text model: Gemma 2 with norms of q and k instead of soft caps.

Five of six layers are local and turn by another base than those that see everything.
"""

from __future__ import annotations

from fastattn.model import gated
from fastattn.model.config import Fields, ModelConfig, RopeConfig
from fastattn.model.gated import HF_PREFIX, HF_TRANSPOSED, IGNORED, build
from fastattn.model.gemma2 import HEADDIM, gguf_common, gguf_window, hf_common, hf_softcap, hf_window
from fastattn.model.gemma2 import NAMES as GEMMA2_NAMES
from fastattn.model.rope import hf_rope
from fastattn.model.weights import TensorSource

__all__ = ["HF_PREFIX", "HF_TRANSPOSED", "IGNORED", "build", "gguf_config", "hf_config"]

NAME = "gemma3"
HF_CLASSES = ("Gemma3ForCausalLM",)
GGUF_ARCHS = ("gemma3",)
NAMES = {**GEMMA2_NAMES, **gated.QK_NORMS}

PATTERN = 6  # of so many layers the last sees everything
LAYERS_27B = 62
BASE, LOCAL_BASE = 1e6, 10000.0


def hf_config(config: Fields, generation_config: Fields) -> ModelConfig:
    """From config.json and generation_config.json."""
    config.require("use_bidirectional_attention", False, default=False)
    pattern = config.integer("sliding_window_pattern", PATTERN)
    headdim = config.integer("head_dim", HEADDIM)
    return gated.hf_config(
        NAME,
        config,
        generation_config,
        **hf_common(config),
        **hf_window(config, pattern),
        attn_softcap=hf_softcap(config, "attn_logit_softcapping", 0.0),
        logit_softcap=hf_softcap(config, "final_logit_softcapping", 0.0),
        rope=_hf_rope(config, "full_attention", "rope_theta", BASE, headdim),
        local_rope=_hf_rope(config, "sliding_attention", "rope_local_base_freq", LOCAL_BASE, headdim),
    )


def _hf_rope(config: Fields, kind: str, base_key: str, base: float, headdim: int) -> RopeConfig:
    """``rope_parameters`` by kind of layer; before transformers 5 a base each, and rope_scaling of the global ones."""
    if config.has("rope_parameters"):
        rope = config.nested("rope_parameters").nested(kind)
    elif kind == "full_attention":
        rope = config.nested("rope_scaling")
    else:
        rope = Fields(config.path, {})
    return hf_rope(config, rope, rope.number("rope_theta", config.number(base_key, base)), headdim)


def gguf_config(fields: Fields, source: TensorSource) -> ModelConfig:
    """From GGUF metadata."""
    key = "gemma3.final_logit_softcapping"
    headdim = fields.integer("gemma3.attention.key_length", HEADDIM)
    return gated.gguf_config(
        NAME,
        fields,
        source,
        **gguf_common(NAME, fields, LAYERS_27B),
        **gguf_window(NAME, fields, PATTERN, None),
        logit_softcap=fields.number(key) if fields.has(key) else 0.0,
        local_rope=RopeConfig(fields.number("gemma3.rope.freq_base_swa", LOCAL_BASE), headdim),
    )
