"""fastattn: fused softmax-attention and top-k/top-p sampling kernels, and the decoder loop on top of them.

``attention``, ``attention_varlen``, ``attention_with_kvcache``, ``merge_states`` and ``sample`` are the kernels' public
face, ``flash_attn`` speaks that package's dialect, ``scaled_dot_product_attention`` and ``MultiheadAttention`` torch's;
``load_model`` runs a real model through them.
``python -m fastattn.doctor`` says what this machine has and which kernels would serve.
"""

from __future__ import annotations

# torch first: its OpenMP runtime must be the one that our extension binds to (two pools would fight for the cores).
import torch as _torch  # noqa: F401

from fastattn.attention import attention
from fastattn.backends import available_backends
from fastattn.backends.cpu import cpu_isa, cpu_isas
from fastattn.kvcache import attention_with_kvcache
from fastattn.merge import merge_states
from fastattn.nn import MultiheadAttention
from fastattn.sampling import SampledTokens, sample
from fastattn.sdpa import scaled_dot_product_attention
from fastattn.token_counts import TokenCounts
from fastattn.varlen import attention_varlen

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "MultiheadAttention",
    "SampledTokens",
    "TokenCounts",
    "__version__",
    "attention",
    "attention_varlen",
    "attention_with_kvcache",
    "available_backends",
    "cpu_isa",
    "cpu_isas",
    "load_model",
    "merge_states",
    "sample",
    "scaled_dot_product_attention",
]


def __getattr__(name: str) -> object:
    """``load_model`` and ``LLM`` live one floor up and load the model's packages: import them when asked for."""
    if name in ("load_model", "LLM"):
        from fastattn import generate

        return getattr(generate, name)
    raise AttributeError(f"module 'fastattn' has no attribute {name!r}")
