"""Who else samples on a CPU: transformers' processors, torch.topk, and llama.cpp's way in C++ of our own."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCE = Path(__file__).resolve().parent / "partial_sort.cpp"
FLAGS = ["-O3", "-march=native", "-std=c++17", "-shared", "-fPIC"]


def transformers_chain(
    temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Any:
    """The processors that ``generate`` would build, softmax and multinomial: logits (1, vocab) to a token."""
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    chain = LogitsProcessorList()
    if temperature != 1.0:
        chain.append(TemperatureLogitsWarper(temperature))
    if top_k:
        chain.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        chain.append(TopPLogitsWarper(top_p))
    if min_p:
        chain.append(MinPLogitsWarper(min_p))
    ids = torch.zeros(1, 1, dtype=torch.int64)
    return lambda logits: torch.multinomial(chain(ids, logits).softmax(-1), 1)


def torch_topk(temperature: float, top_k: int, top_p: float) -> Callable[[Tensor], Tensor]:
    """What a careful user writes: the k best, top_p among them, multinomial."""

    def draw(logits: Tensor) -> Tensor:
        values, ids = logits.topk(top_k)  # (1, top_k), sorted
        probs = (values / temperature).softmax(-1)
        probs = torch.where(probs.cumsum(-1) - probs < top_p, probs, 0.0)
        return ids.gather(1, torch.multinomial(probs, 1))

    return draw


def partial_sort(temperature: float, top_k: int, top_p: float) -> Callable[[Tensor, int], int]:
    """llama.cpp's way, compiled from ``partial_sort.cpp``."""
    library = _library()

    def draw(logits: Tensor, seed: int) -> int:
        return library.sample_top_k_top_p(logits.data_ptr(), logits.shape[1], temperature, top_k, top_p, seed)

    return draw


@cache
def _library() -> Any:
    """Compiled once per source, compiler and flags; kept in the temporary folder.

    Raises:
        SystemExit: no C++ compiler, or one that fails.
    """
    names = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    compiler = next((found for name in names if name and (found := shutil.which(name))), None)
    if compiler is None:
        raise SystemExit(
            f"{SOURCE.name} needs a C++ compiler: none of c++, g++, clang++ is on PATH; set CXX, or install one"
        )
    key = hashlib.sha256(SOURCE.read_bytes() + " ".join([compiler, *FLAGS]).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"fastattn-benchmarks-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f"partial_sort-{key}.so"
    if not library.exists():
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".so", delete=False) as made:
            command = [compiler, *FLAGS, str(SOURCE), "-o", made.name]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            Path(made.name).unlink()
            raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
        os.replace(made.name, library)
    loaded = ctypes.CDLL(str(library))
    loaded.sample_top_k_top_p.argtypes = [
        ctypes.c_void_p, ctypes.c_int32, ctypes.c_float, ctypes.c_int32, ctypes.c_float, ctypes.c_uint32,
    ]  # fmt: skip
    loaded.sample_top_k_top_p.restype = ctypes.c_int32
    return loaded
