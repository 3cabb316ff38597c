"""What is in a model's files, without reading its weights."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastattn.model.config import Fields, ModelConfig
from fastattn.model.gguf import GGUFFile
from fastattn.model.kv_cache import tokens_kept
from fastattn.model.registry import find_architecture, known_names
from fastattn.model.safetensors import SafetensorsSource, read_json
from fastattn.model.weights import ModelFileError
from fastattn.vocabulary import from_folder, from_gguf

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


def describe(path: Path) -> dict[str, Any]:
    """The facts of a GGUF file or a Hugging Face folder, by label; the values are JSON.

    Raises:
        ModelFileError: the files are broken, or of an architecture that is not supported.
        ImportError: the package that reads them is not installed.
    """
    return _describe_folder(path) if path.is_dir() else _describe_gguf(path)


def _describe_gguf(path: Path) -> dict[str, Any]:
    source = GGUFFile(path)
    fields = Fields(path, source.metadata, source.offsets)
    name = fields.text("general.architecture")
    arch = _supported(path, "GGUF_ARCHS", name)
    config = arch.gguf_config(fields, source)
    from gguf import GGMLQuantizationType

    types = Counter(GGMLQuantizationType(info.type_id).name for info in source.tensors.values())
    return {
        "path": str(path),
        "name": fields.text("general.name", ""),
        "architecture": name,
        **_sizes(config),
        "tensors": len(source.tensors),
        "tensor types": ", ".join(f"{count} {kind}" for kind, count in types.most_common()),
        "bytes on disk": source.nbytes,
        **_memory(config, source.shapes()),
        "tokenizer": f"{fields.text('tokenizer.ggml.model')}, {fields.text('tokenizer.ggml.pre', 'gpt-2')}",
        "chat template": from_gguf(path, source.metadata).chat_template is not None,
    }


def _describe_folder(path: Path) -> dict[str, Any]:
    config = read_json(path / "config.json")
    classes = config.get("architectures") or [None]
    arch = _supported(path, "HF_CLASSES", classes[0] if isinstance(classes, list) else classes)
    generation = Fields(path / "generation_config.json", read_json(path / "generation_config.json"))
    model = arch.hf_config(Fields(path / "config.json", config), generation)
    source = SafetensorsSource(path, arch.HF_PREFIX)
    tokenizer_json = path / "tokenizer.json"
    vocabulary = None
    if tokenizer_json.is_file():
        vocabulary = from_folder(
            tokenizer_json, {"tokenizer_config": read_json(path / "tokenizer_config.json")}
        )
    return {
        "path": str(path),
        "name": path.resolve().name,
        "architecture": classes[0],
        **_sizes(model),
        "tensors": len(source.shapes()),
        "tensor types": config.get("dtype") or config.get("torch_dtype") or "not said",
        "bytes on disk": source.nbytes,
        **_memory(model, source.shapes()),
        "tokenizer": "none" if vocabulary is None else f"tokenizer.json, {vocabulary.spelling}",
        "chat template": vocabulary is not None and vocabulary.chat_template is not None,
    }


def _supported(path: Path, column: str, name: Any) -> Any:
    arch = find_architecture(column, name)
    if arch is None:
        problem = f"architecture: expected one of {known_names(column)}, got {str(name)[:40]!r}"
        raise ModelFileError(path, problem)
    return arch


def _sizes(config: ModelConfig) -> dict[str, Any]:
    return {
        "layers": config.nlayers,
        "hidden size": config.hidden_size,
        "heads": f"{config.nheads} query, {config.nheads_k} key/value, headdim {config.headdim}",
        "ffn size": config.ffn_size,
        "context": config.max_seqlen,
        "attention": _attention(config),
        "vocabulary": config.vocab_size,
        "positions": _positions(config),
        "embeddings": "tied" if config.tie_embeddings else "separate head",
        "end tokens": list(config.eos_ids),
    }


def _attention(config: ModelConfig) -> str:
    if not config.local_layers:
        return "to all tokens"
    return f"to the last {config.window} tokens in {len(config.local_layers)} of {config.nlayers} layers"


def _positions(config: ModelConfig) -> str:
    if config.rope is None:
        return "ALiBi" if config.alibi else "learned"
    share = "" if config.rope.rotary_dim == config.headdim else f", {config.rope.rotary_dim} dimensions"
    local = "" if config.local_rope is None else f" ({config.local_rope.base:g} in local layers)"
    scaling = config.rope.scaling
    stretch = "" if scaling is None else f", {scaling.kind} scaling by {scaling.factor:g}"
    return f"rotary, base {config.rope.base:g}{local}{share}{stretch}"


def _memory(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Parameters, and the bytes of weights and of a thousand cached tokens in every dtype."""
    matrices = sum(math.prod(shape) for shape in shapes.values() if len(shape) > 1)
    vectors = sum(math.prod(shape) for shape in shapes.values() if len(shape) <= 1)  # always float32
    tokens = sum(tokens_kept(config, layer, 1000) for layer in range(config.nlayers))
    cached = 2 * tokens * config.nheads_k * config.headdim
    facts: dict[str, Any] = {"parameters": matrices + vectors}
    for dtype, size in DTYPE_BYTES.items():
        facts[f"weights in {dtype}"] = matrices * size + vectors * 4
    for dtype, size in DTYPE_BYTES.items():
        facts[f"1000 cached tokens in {dtype}"] = cached * size
    return facts


def readable(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The facts as label and text: bytes as MB, counts with separators."""
    rows = []
    for label, value in facts.items():
        if isinstance(value, bool):
            text = "yes" if value else "no"
        elif isinstance(value, int):
            is_bytes = label == "bytes on disk" or " in " in label
            text = f"{value / 1e6:,.1f} MB" if is_bytes else f"{value:,}"
        elif isinstance(value, list):
            text = ", ".join(map(str, value)) or "none"
        else:
            text = str(value)
        rows.append((label.replace("bytes on disk", "on disk"), text))
    return rows
