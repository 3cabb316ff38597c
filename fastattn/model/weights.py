"""From named tensors in a file to the tensors that the blocks multiply with.

A ``TensorSource`` (``gguf.py``, ``safetensors.py``) knows names and shapes and writes one tensor into memory
that it is given. ``WeightReader`` puts the parts of a fused matrix (q, k, v; gate, up) straight into their
rows of it, so that every weight is written once. Nothing is allocated before the file has shown its shape.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor


class ModelFileError(ValueError):
    """A model file that is broken, incomplete or not supported: says which file, what in it, and where."""

    def __init__(self, path: Path, problem: str, offset: int | None = None) -> None:
        where = "" if offset is None else f" (at byte {offset})"
        super().__init__(f"{path}: {problem}{where}")


class TensorSource(Protocol):
    """Tensors by name, rows first: a linear layer's weight is (out, in)."""

    path: Path

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor in the file."""

    def read_into(self, name: str, out: Tensor) -> None:
        """Decode the tensor into ``out``: its shape, any strides, float32 or bfloat16."""

    def error(self, name: str, problem: str) -> ModelFileError:
        """An error that names the tensor, its file and where it starts."""


class WeightReader:
    """Reads an architecture's parts by our names for them.

    Args:
        source: the file.
        names: part -> name in the file without ".weight" or ".bias"; ``{}`` stands for the layer.
        dtype: of the matrices; norms and biases are always float32.
        transposed: parts that the file stores as (in, out).
        ignored: endings of tensors that carry no weight (buffers of old checkpoints).
    """

    def __init__(
        self,
        source: TensorSource,
        names: Mapping[str, str],
        dtype: torch.dtype,
        transposed: Collection[str] = (),
        ignored: tuple[str, ...] = (),
    ) -> None:
        self.source = source
        self.names = names
        self.dtype = dtype
        self.transposed = transposed
        self.ignored = ignored
        self.unused = dict.fromkeys(source.shapes())

    def has(self, part: str, layer: int | None = None) -> bool:
        """Whether the file has this part; False too for a part that the architecture does not name."""
        return part in self.names and f"{self._name(part, layer)}.weight" in self.source.shapes()

    def linear(
        self, rows: Mapping[str, int], cols: int, layer: int | None = None, *, needs_bias: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The parts of ``rows``, each (rows[part], cols), one below the other.

        Biases are read where the file has them, for all parts or none; with ``needs_bias`` it must.

        Returns:
            weight (sum of rows, cols) in the model's dtype; bias (sum of rows,) float32, or None.
        """
        names = {self._name(part, layer): count for part, count in rows.items()}
        transposed = any(part in self.transposed for part in rows)
        weight = self._stack({f"{name}.weight": n for name, n in names.items()}, cols, self.dtype, transposed)
        if not needs_bias and not any(f"{name}.bias" in self.source.shapes() for name in names):
            return weight, None
        return weight, self._stack({f"{name}.bias": n for name, n in names.items()}, None, torch.float32)

    def matrix(self, part: str, rows: int, cols: int) -> Tensor:
        """(rows, cols) in the model's dtype."""
        return self._stack({f"{self._name(part)}.weight": rows}, cols, self.dtype)

    def vector(self, part: str, size: int, layer: int | None = None, suffix: str = "weight") -> Tensor:
        """(size,) float32."""
        return self._stack({f"{self._name(part, layer)}.{suffix}": size}, None, torch.float32)

    def head(self, embedding: Tensor, tied: bool) -> tuple[Tensor, Tensor | None]:
        """The LM head's weight (vocab, hidden) and its bias (vocab,), or None, where the file has none.

        If tied, the weight is the embedding itself, even where the file repeats it.
        """
        name, vocab = self.names["head"], embedding.shape[0]
        bias = self.vector("head", vocab, suffix="bias") if f"{name}.bias" in self.source.shapes() else None
        if tied:
            self.unused.pop(f"{name}.weight", None)
            return embedding, bias
        return self.matrix("head", *embedding.shape), bias

    def finish(self) -> None:
        """Refuse a file with tensors that nothing has read: a result without them would be wrong."""
        left = [name for name in self.unused if not name.endswith(self.ignored)]
        if left:
            raise self.source.error(left[0], f"not a part of this architecture ({len(left)} such tensors)")

    def _name(self, part: str, layer: int | None = None) -> str:
        return self.names[part].format(layer)

    def _stack(
        self, rows: Mapping[str, int], cols: int | None, dtype: torch.dtype, transposed: bool = False
    ) -> Tensor:
        """Tensors (rows[name], cols), or (rows[name],), one below the other."""
        for name, count in rows.items():
            shape = (count,) if cols is None else (cols, count) if transposed else (count, cols)
            self._check(name, shape)
        total = sum(rows.values())
        out = torch.empty(total if cols is None else (total, cols), dtype=dtype)  # (total,) or (total, cols)
        for name, part in zip(rows, torch.split(out, list(rows.values()))):
            self.source.read_into(name, part.T if transposed else part)
            self.unused.pop(name, None)
        return out

    def _check(self, name: str, wanted: Sequence[int]) -> None:
        shape = self.source.shapes().get(name)
        if shape is None:
            raise ModelFileError(self.source.path, f"tensor '{name}' is missing")
        if shape != tuple(wanted):
            raise self.source.error(name, f"expected shape {tuple(wanted)}, got {shape}")


def split_pairs(rows: Tensor, headdim: int, rotary_dim: int) -> None:
    """In place: of each head's first ``rotary_dim`` rows, the even ones first, then the odd ones.

    Args:
        rows: (heads * headdim, hidden), or a bias (heads * headdim,).
        headdim: rows per head.
        rotary_dim: how many of them are rotated.
    """
    turned = rows.view(-1, headdim, *rows.shape[1:])[:, :rotary_dim]  # (heads, rotary_dim, ...)
    turned.copy_(torch.cat((turned[:, ::2], turned[:, 1::2]), dim=1))


def ungroup_qkv(rows: Tensor, nheads_k: int, headdim: int) -> Tensor:
    """All queries, then all keys, then all values, from groups of one KV head's queries, key and value.

    Args:
        rows: ((nheads + 2 * nheads_k) * headdim, hidden), or a bias.
        nheads_k: KV heads, the number of groups.
        headdim: rows per head.
    """
    groups = rows.view(
        nheads_k, -1, headdim, *rows.shape[1:]
    )  # (nheads_k, nheads / nheads_k + 2, headdim, ...)
    q, k, v = groups[:, :-2], groups[:, -2], groups[:, -1]  # (nheads_k, ..., headdim, ...)
    return torch.cat([part.reshape(-1, *rows.shape[1:]) for part in (q, k, v)])  # as rows
