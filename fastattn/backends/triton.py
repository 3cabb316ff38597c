"""The Triton kernels (``kernels/``) for tensors on NVIDIA and AMD GPUs. Triton is imported at the first call."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastattn.gradient_sums import scores_to_bias

if TYPE_CHECKING:
    from fastattn.args import AttentionArgs, KVAppendArgs, SamplingArgs

NAME = "triton"
FEATURES = frozenset(
    {"window", "softcap", "alibi", "bias", "relative_bias", "mask", "sinks", "dropout", "varlen", "leftpad",
     "cache_batch_idx", "paged", "gradients", "survivors", "penalties", "logit_bias", "allowed", "logprobs"}
)  # fmt: skip
_NO_GRADIENTS_WITH = frozenset({"leftpad", "cache_batch_idx", "paged"})
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_VOCAB = (1 << 22) - 1  # masses of 2^41 sum to less than 2^63


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
    if tensor.dim() == 2:  # logits
        dtypes = (*dtypes, torch.float64)
        if tensor.shape[1] > _MAX_VOCAB:
            return f"lacks vocabularies above {_MAX_VOCAB}"
    if tensor.dtype not in dtypes:
        return f"lacks dtype '{str(tensor.dtype).removeprefix('torch.')}'"
    features = args.features()
    lacking = sorted(features - FEATURES)
    if "gradients" in features and features & _NO_GRADIENTS_WITH:
        lacking.append("gradients")
    return f"lacks {', '.join(map(repr, lacking))}" if lacking else None


def attention(args: AttentionArgs) -> tuple[Tensor, Tensor | None]:
    """``out (batch, seqlen_q, nheads, headdim_v)`` in q's dtype and ``lse (batch, nheads, seqlen_q)`` float32.

    Packed sequences: out (1, total_q, nheads, headdim_v) and lse (nheads, total_q).
    """
    from fastattn.kernels import attention, decode

    out, lse = decode.decode(args) if decode.serves(args) else attention.forward(args)
    return out, (lse if args.return_lse else None)


def attention_backward(
    args: AttentionArgs, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, *, needs_dbias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """``dq, dk, dv, dbias, dsinks`` of a call of ``attention`` that gave ``out`` and ``lse``.

    dbias takes (batch, nheads, seqlen_q, seqlen_k) float32 of memory on the way.
    """
    from fastattn.kernels.attention_backward import backward

    wanted = needs_dbias and args.attn_bias is not None
    dq, dk, dv, dbias, dsinks = backward(args, out, lse, dout, dlse, needs_dbias=wanted)
    if args.attn_bias is not None and dbias is not None:
        dbias = scores_to_bias(dbias, args.attn_bias, args.bias_is_relative)
    return dq, dk, dv, dbias, dsinks


def append_kv(args: KVAppendArgs) -> tuple[Tensor, Tensor]:
    """Write the new (rotated) k and v at ``cache_seqlens``; returns rotated q and the new lengths (batch,)."""
    from fastattn.kernels import decode

    q, seqlens = decode.append(args)
    return q, seqlens


def sample(args: SamplingArgs) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor] | None]:
    """One token per row, (batch,) int64, -1 for a row that has none; and log-probabilities (batch,), ids, (batch, n).

    Nothing waits for the GPU. A row of which there is no softmax has no token, NaN for log-probabilities, and ids -1.
    """
    from fastattn.kernels import sampling

    return sampling.sample(args)


def survivors(args: SamplingArgs) -> Tensor:
    """Which tokens the filters keep, (batch, vocab) bool; a greedy row keeps one, a row without a token none."""
    from fastattn.kernels import sampling

    return sampling.survivors(args)
