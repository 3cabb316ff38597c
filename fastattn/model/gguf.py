"""GGUF files (versions 2 and 3, little-endian): a header walker that trusts nothing, tensors over a mapping.

    "GGUF"  version u32  tensor_count u64  kv_count u64
    kv_count times:      key string, type u32, value            (string = length u64 + UTF-8)
    tensor_count times:  name string, n_dims u32, dims u64 each (innermost first), type u32, offset u64
    padding to general.alignment, then the tensors' data at their offsets

Every count and length is held against what is left of the file before anything of that size is made, so that
memory stays proportional to the file. The ``gguf`` package's numpy code decodes the blocks, rows at a time.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastattn.model.config import Fields, shown
from fastattn.model.weights import ModelFileError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMS = 4
MAX_TENSOR_NAME = 64  # bytes, as ggml
MAX_KEY = 65535  # bytes, by the specification
DEFAULT_ALIGNMENT = 32

# Value type id: struct code. 7 is bool, 8 string, 9 array.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}
BOOL, STRING, ARRAY = 7, 8, 9

# The tensor types that can be decoded, by ggml's names.
TENSOR_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")

CHUNK = 1 << 18  # elements decoded at a time: the pieces stay in the cache on their way to the weights


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies and how it is packed."""

    shape: tuple[int, ...]  # outermost first, as torch has it
    type_id: int  # ggml's
    offset: int  # of the data, from the start of the file
    nbytes: int
    info_offset: int  # of the entry in the header


class GGUFFile:
    """An open GGUF file (a ``weights.TensorSource``).

    Args:
        path: the file.

    Attributes:
        metadata: key -> str, int, float, bool, or a list of one of these.
        offsets: key -> byte offset of its value.
        tensors: name -> TensorInfo.
        nbytes: size of the file.

    Raises:
        ModelFileError: the file is not GGUF, is truncated, contradicts itself or has an unsupported type.
        ImportError: the gguf package is not installed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._gguf = _import_gguf(path)
        with path.open("rb") as file:
            self.nbytes = file.seek(0, 2)
            # An empty file cannot be mapped; the walker then says what is missing.
            self._data: Any = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.nbytes else b""
        walker = _Walker(path, self._data, self._gguf)
        tensor_count, kv_count = walker.header()
        self.metadata, self.offsets = walker.key_values(kv_count)
        alignment = _alignment(Fields(path, self.metadata, self.offsets))
        self.tensors = walker.tensors(tensor_count, alignment)
        self._shapes = {name: info.shape for name, info in self.tensors.items()}

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor in the file."""
        return self._shapes

    def error(self, name: str, problem: str) -> ModelFileError:
        """An error that names the tensor and its entry in the header."""
        return ModelFileError(self.path, f"tensor '{name}': {problem}", self.tensors[name].info_offset)

    def read_into(self, name: str, out: Tensor) -> None:
        """Decode the tensor into ``out``, which has its shape (one or two dimensions)."""
        import numpy as np

        info = self.tensors[name]
        kind = self._gguf.GGMLQuantizationType(info.type_id)
        rows, cols = math.prod(info.shape[:-1]), info.shape[-1]
        raw = np.frombuffer(self._data, np.uint8, info.nbytes, info.offset)  # (nbytes,)
        packed = raw.reshape(rows, -1)  # (rows, bytes per row)
        target = out.view(1, cols) if out.dim() == 1 else out  # (rows, cols)
        step = max(1, CHUNK // cols)
        # A scale that is not finite is the file's affair: numpy need not warn about the products.
        with np.errstate(all="ignore"):
            for start in range(0, rows, step):
                piece = packed[start : start + step]  # (step, bytes per row)
                block = self._gguf.quants.dequantize(piece, kind)  # (step, cols) float32
                # float32 comes back as a view of the read-only map, which torch does not take.
                block = block if block.flags.writeable else block.copy()
                target[start : start + step].copy_(torch.from_numpy(block))


def _import_gguf(path: Path) -> Any:
    try:
        import gguf
    except ImportError as error:
        message = f"reading {path} needs the package 'gguf': pip install 'fastattn[model]'"
        raise ImportError(message) from error
    return gguf


def _alignment(fields: Fields) -> int:
    if fields.has("split.count") and fields.integer("split.count", low=0) > 1:
        fields.fail("split.count", "split files are not supported, merge them (llama-gguf-split --merge)")
    alignment = fields.integer("general.alignment", DEFAULT_ALIGNMENT, low=8)
    if alignment & (alignment - 1):
        fields.fail("general.alignment", f"expected a power of two, got {alignment}")
    return alignment


class _Walker:
    """A cursor over the header. ``where`` says what is being read, for messages."""

    def __init__(self, path: Path, data: Any, gguf: Any) -> None:
        self.path = path
        self.data = data
        self.size = len(data)
        self.offset = 0
        self.where = "header"
        self.types = {int(kind): kind.name for kind in gguf.GGMLQuantizationType}
        self.block_sizes = {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}

    def fail(self, problem: str, offset: int | None = None) -> NoReturn:
        raise ModelFileError(self.path, f"{self.where}: {problem}", self.offset if offset is None else offset)

    def take(self, nbytes: int, what: str) -> int:
        """Step over ``nbytes``; returns where they start."""
        start, left = self.offset, self.size - self.offset
        if nbytes > left:
            self.fail(f"{what} takes {nbytes} bytes, but the file has {left} left")
        self.offset = start + nbytes
        return start

    def number(self, code: str, what: str) -> Any:
        """One little-endian value of a struct code."""
        return struct.unpack_from("<" + code, self.data, self.take(struct.calcsize("<" + code), what))[0]

    def count(self, least: int, what: str) -> int:
        """A u64 count of things that take at least ``least`` bytes each."""
        start = self.offset
        count = int(self.number("Q", what))
        left = self.size - self.offset
        if count * least > left:
            self.fail(f"{what} is {count}, but the file has only {left} bytes left", start)
        return count

    def string(self, what: str, limit: int | None = None) -> str:
        """A length and so many bytes of UTF-8."""
        start = self.offset
        nbytes = self.count(1, f"the length of {what}")
        if limit is not None and nbytes > limit:
            self.fail(f"{what} has {nbytes} bytes, at most {limit} are allowed", start)
        begin = self.take(nbytes, what)
        try:
            return str(self.data[begin : self.offset], "utf-8")
        except UnicodeDecodeError as error:
            self.fail(f"{what} is not UTF-8: {error.reason}", begin + error.start)

    def header(self) -> tuple[int, int]:
        """(tensor_count, kv_count)."""
        magic = self.data[self.take(4, "the magic number") : 4]
        if magic != MAGIC:
            self.fail(f"not a GGUF file: the magic number is {magic!r}, expected {MAGIC!r}", 0)
        version = self.number("I", "the version")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            hint = " (a big-endian file?)" if swapped in VERSIONS else ""
            self.fail(f"version {version} is not supported, only 2 and 3 are{hint}", 4)
        tensor_count = self.count(8 + 4 + 8 + 4 + 8, "the tensor count")
        return tensor_count, self.count(8 + 4 + 1, "the key count")

    def key_values(self, count: int) -> tuple[dict[str, Any], dict[str, int]]:
        """(metadata, byte offsets of the values)."""
        metadata: dict[str, Any] = {}
        offsets: dict[str, int] = {}
        for i in range(count):
            self.where = f"key {i + 1} of {count}"
            start = self.offset
            key = self.string("the key", MAX_KEY)
            self.where = f"key {shown(key)}"
            if key in metadata:
                self.fail("given twice", start)
            type_start = self.offset
            type_id = self.number("I", "the value's type")
            offsets[key] = self.offset
            metadata[key] = self.array() if type_id == ARRAY else self.scalar(type_id, type_start)
        return metadata, offsets

    def scalar(self, type_id: int, type_start: int) -> Any:
        """A value that is not an array."""
        if type_id == STRING:
            return self.string("the value")
        if type_id == BOOL:
            value = self.number("B", "the value")
            if value > 1:
                self.fail(f"expected a bool, 0 or 1, got {value}", self.offset - 1)
            return bool(value)
        if type_id not in SCALARS:
            self.fail(f"unknown value type {type_id}", type_start)
        return self.number(SCALARS[type_id], "the value")

    def array(self) -> list[Any]:
        """A value that is an array of scalars."""
        type_start = self.offset
        type_id = self.number("I", "the array's type")
        if type_id == ARRAY:
            self.fail("nested arrays are not supported", type_start)
        if type_id == STRING:
            return self.strings(self.count(8, "the array's length"))
        if type_id != BOOL and type_id not in SCALARS:
            self.fail(f"unknown array type {type_id}", type_start)
        code = SCALARS.get(type_id, "B")
        itemsize = struct.calcsize("<" + code)
        count = self.count(itemsize, "the array's length")
        start = self.take(count * itemsize, "the array")
        values = list(struct.unpack_from(f"<{count}{code}", self.data, start))
        if type_id != BOOL:
            return values
        if any(value > 1 for value in values):
            self.fail("expected bools, 0 or 1", start)
        return [bool(value) for value in values]

    def strings(self, count: int) -> list[str]:
        """Strings in a tight loop, as a vocabulary has 100,000 of them; ``string`` words the errors."""
        data, size, offset = self.data, self.size, self.offset
        unpack = struct.Struct("<Q").unpack_from
        strings = []
        for _ in range(count):
            begin = offset + 8
            end = begin + unpack(data, offset)[0] if begin <= size else size + 1
            try:
                if end > size:
                    raise ValueError
                strings.append(data[begin:end].decode())
            except ValueError:
                self.offset = offset
                self.string(f"item {len(strings)} of the array")
                raise AssertionError("string() accepts what strings() refuses") from None
            offset = end
        self.offset = offset
        return strings

    def tensors(self, count: int, alignment: int) -> dict[str, TensorInfo]:
        """name -> info; the data of all of them is inside the file and nowhere overlaps."""
        infos: dict[str, TensorInfo] = {}
        for i in range(count):
            self.where = f"tensor {i + 1} of {count}"
            start = self.offset
            name = self.string("the name", MAX_TENSOR_NAME)
            self.where = f"tensor {shown(name)}"
            if name in infos:
                self.fail("given twice", start)
            infos[name] = self.tensor(start, alignment)
        data_start = -(-self.offset // alignment) * alignment
        return self.placed(infos, data_start)

    def tensor(self, start: int, alignment: int) -> TensorInfo:
        """One entry; its offset is still relative to the start of the data."""
        dims_start = self.offset
        ndims = self.number("I", "n_dims")
        if not 1 <= ndims <= MAX_DIMS:
            self.fail(f"expected 1 to {MAX_DIMS} dimensions, got {ndims}", dims_start)
        dims = [int(self.number("Q", "a dimension")) for _ in range(ndims)]
        if min(dims) < 1:
            self.fail(f"expected dimensions of at least 1, got {dims}", dims_start)
        type_id = self.number("I", "the type")
        type_name = self.types.get(type_id, f"number {type_id}")
        if type_name not in TENSOR_TYPES:
            self.fail(f"type {type_name} is not supported; {', '.join(TENSOR_TYPES)} are", self.offset - 4)
        block, block_bytes = self.block_sizes[type_id]
        if dims[0] % block:
            self.fail(f"expected rows of whole {type_name} blocks of {block}, got {dims[0]}", dims_start)
        nbytes = math.prod(dims) // block * block_bytes
        if nbytes > self.size:
            problem = f"dimensions {dims} of {type_name} take {nbytes} bytes, the file has {self.size}"
            self.fail(problem, dims_start)
        offset = self.number("Q", "the offset")
        if offset % alignment:
            self.fail(f"expected an offset that is a multiple of {alignment}, got {offset}", self.offset - 8)
        return TensorInfo(tuple(reversed(dims)), type_id, offset, nbytes, start)

    def placed(self, infos: dict[str, TensorInfo], data_start: int) -> dict[str, TensorInfo]:
        """The entries with absolute offsets.

        Tensors that share bytes would let a small file ask for the memory of a large model: refused.
        """
        placed: dict[str, TensorInfo] = {}
        before, end = "", data_start
        for name, info in sorted(infos.items(), key=lambda item: item[1].offset):
            self.where = f"tensor {shown(name)}"
            begin = data_start + info.offset
            if begin + info.nbytes > self.size:
                problem = f"its data is at bytes {begin} to {begin + info.nbytes}, the file has {self.size}"
                self.fail(problem, info.info_offset)
            if begin < end:
                self.fail(f"its data at byte {begin} overlaps that of {shown(before)}", info.info_offset)
            placed[name] = TensorInfo(info.shape, info.type_id, begin, info.nbytes, info.info_offset)
            before, end = name, begin + info.nbytes
        return placed
