"""Decoder-only models on the attention kernels, from GGUF and safetensors: one file per architecture."""

from __future__ import annotations

from fastattn.model.blocks import Decoder
from fastattn.model.config import ModelConfig, RopeConfig, RopeScaling
from fastattn.model.kv_cache import KVCache
from fastattn.model.registry import ARCHITECTURES, ModelFile, load_decoder
from fastattn.model.weights import ModelFileError

__all__ = [
    "ARCHITECTURES",
    "Decoder",
    "KVCache",
    "ModelConfig",
    "ModelFile",
    "ModelFileError",
    "RopeConfig",
    "RopeScaling",
    "load_decoder",
]
