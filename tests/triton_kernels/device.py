"""Where the Triton kernels run in this process: a GPU, ttsem's imitation of one, or Triton's interpreter.

These files are written for a GPU. Without one, ``tests/test_triton.py`` runs them twice in processes of their own:
under ``ttsem.sanitize``, which executes the compiled kernels on the CPU and stops at accesses out of bounds and at
races, and in the interpreter, whose bfloat16 is wrong and is left out.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from nested import map_tensors

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("no GPU; tests/test_triton.py runs these in other processes", allow_module_level=True)

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]


def there(x: Any) -> Any:
    """The tensors of a call's arguments, on the device that kernels run on; strides stay."""
    return x if DEVICE == "cpu" else map_tensors(x, moved)


def moved(x: torch.Tensor) -> torch.Tensor:
    if x.requires_grad:
        return x.to(DEVICE)
    base = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    return base.to(DEVICE).as_strided(x.shape, x.stride(), x.storage_offset())
