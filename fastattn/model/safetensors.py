"""Hugging Face folders: model.safetensors, or the shards that model.safetensors.index.json lists."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastattn.model.config import shown
from fastattn.model.weights import ModelFileError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = ("F64", "F32", "F16", "BF16")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} if there is no such file.

    Raises:
        ModelFileError: not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise ModelFileError(path, f"not a JSON file: {error}", getattr(error, "pos", None)) from error
    if not isinstance(value, dict):
        raise ModelFileError(path, f"expected a JSON object, got {type(value).__name__}")
    return value


class SafetensorsSource:
    """The tensors of a folder, through the safetensors package's memory maps (a ``weights.TensorSource``).

    Args:
        folder: of the model.
        prefix: dropped from the names that have it, as checkpoints of bare models lack it.

    Raises:
        ModelFileError: a shard that is missing, broken or named outside the folder.
        ImportError: the safetensors package is not installed.
    """

    def __init__(self, folder: Path, prefix: str) -> None:
        self.path = folder
        self.files: dict[Path, Any] = {}
        self._where: dict[str, tuple[Path, str]] = {}  # our name -> file, its name there
        self._shapes: dict[str, tuple[int, ...]] = {}
        if (folder / SINGLE).is_file():
            names = {name: folder / SINGLE for name in self._open(folder / SINGLE).keys()}  # noqa: SIM118
        elif (folder / INDEX).is_file():
            names = self._read_index(folder / INDEX)
        else:
            raise ModelFileError(folder, f"neither {SINGLE} nor {INDEX} is there")
        for name, path in names.items():
            self._add(name, path, name.removeprefix(prefix))

    @property
    def nbytes(self) -> int:
        """Size of the files."""
        return sum(path.stat().st_size for path in self.files)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor in the folder, without the prefix."""
        return self._shapes

    def read_into(self, name: str, out: Tensor) -> None:
        """Convert the tensor into ``out``."""
        path, stored = self._where[name]
        try:
            out.copy_(self.files[path].get_tensor(stored))
        except Exception as error:  # SafetensorError is not part of the package's documented classes
            raise self.error(name, f"cannot be read: {error}") from error

    def error(self, name: str, problem: str) -> ModelFileError:
        """An error that names the tensor and its file."""
        path, stored = self._where[name]
        return ModelFileError(path, f"tensor '{stored}': {problem}")

    def _read_index(self, index: Path) -> dict[str, Path]:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ModelFileError(index, "key 'weight_map': expected an object of tensor names and file names")
        names = {}
        for name, shard in weight_map.items():
            # A shard is a file in this folder: a path could point anywhere on the machine.
            if not isinstance(shard, str) or Path(shard).name != shard:
                problem = f"expected a file name in this folder, got {shown(shard)}"
                raise ModelFileError(index, f"tensor '{name}': {problem}")
            path = self.path / shard
            if path not in self.files and not path.is_file():
                raise ModelFileError(index, f"tensor '{name}': shard {shard} is missing")
            self._open(path)
            names[name] = path
        return names

    def _open(self, path: Path) -> Any:
        if path not in self.files:
            try:
                from safetensors import safe_open
            except ImportError as error:
                message = f"reading {path} needs the package 'safetensors': pip install 'fastattn[model]'"
                raise ImportError(message) from error
            try:
                self.files[path] = safe_open(path, framework="pt")
            except Exception as error:
                raise ModelFileError(path, f"not a valid safetensors file: {error}") from error
        return self.files[path]

    def _add(self, stored: str, path: Path, name: str) -> None:
        if name in self._where:
            twin = self._where[name][1]
            raise ModelFileError(path, f"tensor '{stored}': the same as '{twin}' but for the prefix")
        try:
            info = self.files[path].get_slice(stored)
        except Exception as error:
            raise ModelFileError(path, f"tensor '{stored}' is missing: {error}") from error
        self._where[name] = path, stored
        if info.get_dtype() not in DTYPES:
            raise self.error(name, f"expected dtype {', '.join(DTYPES)}, got {info.get_dtype()}")
        self._shapes[name] = tuple(info.get_shape())
