"""The Triton kernels (``kernels/``) for tensors on NVIDIA and AMD GPUs. Triton is imported at the first call."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastattn.args import AttentionArgs, KVAppendArgs, SamplingArgs

NAME = "triton"
FEATURES = frozenset(
    {"window", "softcap", "alibi", "bias", "mask", "sinks", "dropout", "varlen", "leftpad", "cache_batch_idx", "paged"}
)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unavailable() -> str | None:
    """None if Triton is installed and there is a GPU, else what is missing."""
    if not _has_triton():
        return "triton is not installed (pip install 'fastattn[triton]')"
    if not torch.cuda.is_available() and not _interpreted():
        return f"no GPU: torch {torch.__version__} finds neither CUDA nor ROCm"
    return None


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _interpreted() -> bool:
    """``TRITON_INTERPRET=1`` runs kernels on CPU tensors, to debug them: bfloat16 is wrong there."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def is_misforced() -> bool:
    """Nothing about it can be forced."""
    return False


def supports(args: AttentionArgs | KVAppendArgs | SamplingArgs) -> str | None:
    """None if this backend can serve the call, else why not."""
    tensor = args.subject
    device, dtypes = ("cpu", _DTYPES[::2]) if _interpreted() else ("cuda", _DTYPES)
    if tensor.device.type != device:
        return f"lacks device '{tensor.device.type}'"
    if tensor.dtype not in dtypes:
        return f"lacks dtype '{str(tensor.dtype).removeprefix('torch.')}'"
    lacking = sorted(args.features() - FEATURES)
    return f"lacks {', '.join(map(repr, lacking))}" if lacking else None


def attention(args: AttentionArgs) -> tuple[Tensor, Tensor | None]:
    """``out (batch, seqlen_q, nheads, headdim_v)`` in q's dtype and ``lse (batch, nheads, seqlen_q)`` float32.

    Packed sequences: out (1, total_q, nheads, headdim_v) and lse (nheads, total_q).
    """
    from fastattn.kernels.attention import forward

    out, lse = forward(args)
    return out, (lse if args.return_lse else None)
