"""From a path to a decoder: which architecture, which kind of file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fastattn.model import (
    bloom,
    falcon,
    gemma2,
    gemma3,
    gpt2,
    gpt_neox,
    gptj,
    llama,
    mistral,
    opt,
    phi,
    qwen2,
    qwen3,
)
from fastattn.model.blocks import Decoder
from fastattn.model.config import Fields, shown
from fastattn.model.gguf import GGUFFile
from fastattn.model.safetensors import SafetensorsSource, read_json
from fastattn.model.weights import ModelFileError, WeightReader

# A row is a module with HF_CLASSES, GGUF_ARCHS, tables of keys and names, hf_config, build, and gguf_config unless
# GGUF_ARCHS is empty.
GATED = (llama, mistral, qwen2, qwen3, gemma2, gemma3)  # gated.py
PLAIN = (gpt2, gpt_neox, gptj, opt, phi, bloom, falcon)  # gpt.py
ARCHITECTURES: dict[str, ModuleType] = {module.NAME: module for module in (*GATED, *PLAIN)}

# The JSON files of a folder, without their ending.
FOLDER_METADATA = ("config", "generation_config", "tokenizer_config")

DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class ModelFile:
    """What else a model's files say, for the tokenizer and the prompt templates."""

    path: Path
    kind: str  # "gguf" or "hf"
    metadata: dict[str, Any]  # GGUF key/values; of a folder its JSON files: FOLDER_METADATA -> object
    tokenizer_json: Path | None  # of a folder that has one
    nbytes: int  # of the weight files on disk


def load_decoder(path: str | Path, dtype: torch.dtype = torch.float32) -> tuple[Decoder, ModelFile]:
    """Read a model.

    Args:
        path: a GGUF file, or a Hugging Face folder with config.json and safetensors.
        dtype: of the matrices and the KV cache, float32 or bfloat16; quantised weights are expanded to it.

    Returns:
        the decoder, and what the tokenizer needs.

    Raises:
        FileNotFoundError: no such path.
        ModelFileError: the files are broken, incomplete or not supported; names file, key or tensor, offset.
        ImportError: the package that reads this kind of file is not installed.
        ValueError: another dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected float32 or bfloat16, got {dtype}")
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"path: expected a GGUF file or a model folder, {path} does not exist")
    return _load_folder(path, dtype) if path.is_dir() else _load_gguf(path, dtype)


def _load_gguf(path: Path, dtype: torch.dtype) -> tuple[Decoder, ModelFile]:
    source = GGUFFile(path)
    fields = Fields(path, source.metadata, source.offsets)
    name = fields.text("general.architecture")
    arch = find_architecture("GGUF_ARCHS", name)
    if arch is None:
        fields.fail("general.architecture", f"expected one of {known_names('GGUF_ARCHS')}, got {shown(name)}")
    config = arch.gguf_config(fields, source)
    weights = WeightReader(source, {part: names[1] for part, names in arch.NAMES.items()}, dtype)
    decoder = arch.build(config, weights)
    weights.finish()
    return decoder, ModelFile(path, "gguf", source.metadata, None, source.nbytes)


def _load_folder(path: Path, dtype: torch.dtype) -> tuple[Decoder, ModelFile]:
    if not (path / "config.json").is_file():
        raise ModelFileError(path, "config.json is missing")
    metadata = {name: read_json(path / f"{name}.json") for name in FOLDER_METADATA}
    fields = Fields(path / "config.json", metadata["config"])
    classes = metadata["config"].get("architectures")
    name = classes[0] if isinstance(classes, list) and classes else None
    arch = find_architecture("HF_CLASSES", name)
    if arch is None:
        fields.fail("architectures", f"expected one of {known_names('HF_CLASSES')}, got {shown(name)}")
    if fields.has("quantization_config"):
        fields.fail("quantization_config", "quantised checkpoints are not supported in this format, GGUF is")
    config = arch.hf_config(fields, Fields(path / "generation_config.json", metadata["generation_config"]))
    source = SafetensorsSource(path, arch.HF_PREFIX)
    names = {part: names[0] for part, names in arch.NAMES.items()}
    weights = WeightReader(source, names, dtype, arch.HF_TRANSPOSED, arch.IGNORED)
    decoder = arch.build(config, weights)
    weights.finish()
    tokenizer = path / "tokenizer.json"
    file = ModelFile(path, "hf", metadata, tokenizer if tokenizer.is_file() else None, source.nbytes)
    return decoder, file


def find_architecture(column: str, name: object) -> ModuleType | None:
    """The row whose ``column``, HF_CLASSES or GGUF_ARCHS, has this name."""
    return next((module for module in ARCHITECTURES.values() if name in getattr(module, column)), None)


def known_names(column: str) -> str:
    """All names of that column, for messages."""
    return ", ".join(name for module in ARCHITECTURES.values() for name in getattr(module, column))
