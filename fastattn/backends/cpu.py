"""The C++ kernels for CPUs, one table of function pointers per ISA (``csrc/cpu``)."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastattn.backends.cpu_sampling import sample, speculative_sample, survivors
from fastattn.calls import (
    DTYPES,
    AppendCall,
    Modifiers,
    address,
    attention_call,
    scores_shape,
    statistics,
    unit_stride,
    view,
)
from fastattn.gradient_sums import BiasSums, DiagonalSums, sinks_gradient

try:
    from fastattn import _C
except ImportError as error:
    # A source tree that was never built: doctor and the reference still work, and say so.
    _C = None  # type: ignore[assignment]
    _IMPORT_ERROR = str(error)
    warnings.warn(f"fastattn runs on plain PyTorch, its kernels cannot be imported: {error}", stacklevel=2)

if TYPE_CHECKING:
    from fastattn.args import AttentionArgs, KVAppendArgs, SamplingArgs

__all__ = [
    "FEATURES",
    "NAME",
    "append_kv",
    "attention",
    "attention_backward",
    "sample",
    "speculative_sample",
    "supports",
    "survivors",
    "unavailable",
]

NAME = "cpu"
FEATURES = frozenset(
    {"window", "softcap", "alibi", "bias", "relative_bias", "mask", "sinks", "dropout", "varlen", "leftpad",
     "cache_batch_idx", "paged", "kv_dtype", "gradients", "penalties", "logit_bias", "allowed", "logprobs", "survivors"}
)  # fmt: skip
_NO_GRADIENTS_WITH = frozenset({"leftpad", "cache_batch_idx", "paged", "kv_dtype"})

# The ISA is chosen once, at import; a wrong FASTATTN_CPU_ISA is not a crash but the reason why this backend is off.
_ISA_ERROR: str | None = None
if _C is not None:
    try:
        _C.select_isa(os.environ.get("FASTATTN_CPU_ISA", ""))
    except ValueError as error:
        _ISA_ERROR = str(error)

# The quick ways in for plain calls, csrc/plain_*.cpp: None where there are none.
plain_attention: Any = None
plain_attention_backward: Any = None
plain_kvcache: Callable[..., Tensor | None] | None = None
plain_sample: Any = None
_empty_tokens, _empty_floats = (
    partial(torch.empty, dtype=dtype, device="cpu") for dtype in (torch.int64, torch.float32)
)
if (
    _C is not None
    and _ISA_ERROR is None
    and _C.bind_tensor(Tensor, torch.nn.Parameter, torch.empty_like, _empty_tokens, _empty_floats)
):
    plain_attention, plain_kvcache, plain_sample = _C.plain_attention, _C.plain_kvcache, _C.plain_sample
    plain_attention_backward = _C.plain_attention_backward

_ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}  # csrc/params.h, Activation
_FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # what kernels that compute in float read
_ATTENTION_DTYPES = (*_FLOAT_DTYPES, torch.float64)
_MAX_VOCAB = 1 << 22  # csrc/params.h, kMaxVocab


def cpu_isas() -> list[str]:
    """The instruction sets that are built in and that this machine can run, best first."""
    return [] if _C is None else _C.isas()


def cpu_isa() -> str:
    """The instruction set in use: the best one, or what ``FASTATTN_CPU_ISA`` forces.

    Raises:
        RuntimeError: the extension is not built, or the forced one is unknown or cannot run here.
    """
    if reason := unavailable():
        raise RuntimeError(reason)
    return _C.isa()


def unavailable() -> str | None:
    """None if the extension imports and an ISA can be chosen, else the reason."""
    if _C is None:
        return f"fastattn._C cannot be imported: {_IMPORT_ERROR}"
    return _ISA_ERROR


def is_misforced() -> bool:
    """Whether ``FASTATTN_CPU_ISA`` asks for what cannot be had: nobody else may serve then."""
    return _ISA_ERROR is not None


def supports(args: AttentionArgs | KVAppendArgs | SamplingArgs) -> str | None:
    """None if this backend can serve the call, else why not."""
    tensor = args.subject
    if tensor.device.type != "cpu":
        return f"lacks device '{tensor.device.type}'"
    are_logits = tensor.dim() == 2
    if tensor.dtype not in (_FLOAT_DTYPES if are_logits else _ATTENTION_DTYPES):
        return f"lacks dtype '{str(tensor.dtype).removeprefix('torch.')}'"
    if are_logits and tensor.shape[1] > _MAX_VOCAB:
        return f"lacks vocabularies above {_MAX_VOCAB}"
    features = args.features()
    lacking = sorted(features - FEATURES)
    if "gradients" in features and features & _NO_GRADIENTS_WITH:
        lacking.append("gradients")
    return f"lacks {', '.join(map(repr, lacking))}" if lacking else None


def attention(args: AttentionArgs) -> tuple[Tensor, Tensor | None]:
    """``out (batch, seqlen_q, nheads, headdim_v)`` in q's dtype and ``lse (batch, nheads, seqlen_q)`` float32.

    Packed sequences: out (1, total_q, nheads, headdim_v) and lse (nheads, total_q). float64 for float64.
    """
    q, k, v = unit_stride(args.q), unit_stride(args.k), unit_stride(args.v)
    batch, seqlen_q, nheads, _ = q.shape
    out = q.new_empty((batch, seqlen_q, nheads, v.shape[3]))
    if args.return_lse:
        shape = (nheads, seqlen_q) if args.cu_seqlens_q is not None else (batch, nheads, seqlen_q)
        lse = q.new_empty(shape, dtype=statistics(q))
        lse_view = (lse.data_ptr(), nheads * seqlen_q, seqlen_q)
    else:
        lse, lse_view = None, (0, 0, 0)
    modifiers = Modifiers(args) if args.features() else None
    _C.attention_forward(attention_call(args, q, k, v, modifiers), view(out), lse_view)
    return out, lse


def attention_backward(
    args: AttentionArgs, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, *, needs_dbias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """``dq, dk, dv, dbias, dsinks`` of a call of ``attention`` that gave ``out`` and ``lse``."""
    q, k, v = unit_stride(args.q), unit_stride(args.k), unit_stride(args.v)
    compute, lse = statistics(q), lse.contiguous()
    nheads, seqlen_q = lse.shape[-2:]
    delta = torch.empty_like(lse)
    dbias = None
    if needs_dbias and args.attn_bias is not None:
        kind = DiagonalSums if args.bias_is_relative else BiasSums
        dbias = kind(args.attn_bias, scores_shape(args), compute)
    # Tokens that no sequence holds are not visited.
    some_queries, some_keys = (
        args.cu_seqlens_q is not None,
        (args.seqlens_k, args.cu_seqlens_k) != (None, None),
    )
    dq = (torch.zeros if some_queries else torch.empty)(q.shape, dtype=compute)
    dk, dv = ((torch.zeros if some_keys else torch.empty)(x.shape, dtype=x.dtype) for x in (k, v))
    modifiers = Modifiers(args) if args.features() else None
    out, dout = unit_stride(out), unit_stride(dout)
    dlse = None if dlse is None else dlse.contiguous()
    _C.attention_backward(
        attention_call(args, q, k, v, modifiers),
        view(out),
        (lse.data_ptr(), nheads * seqlen_q, seqlen_q),
        view(dout),
        address(dlse),
        delta.data_ptr(),
        view(dq),
        view(dk),
        view(dv),
        None if dbias is None else (dbias.address, *dbias.strides, DTYPES[compute], dbias.stride_slot),
    )
    dsinks = None if args.sinks is None else sinks_gradient(args.sinks, lse, delta)
    return dq.to(q.dtype), dk, dv, None if dbias is None else dbias.gradient(), dsinks


def append_kv(args: KVAppendArgs) -> tuple[Tensor, Tensor]:
    """Write the new (rotated) k and v at ``cache_seqlens``; returns rotated q and the new lengths (batch,)."""
    append = AppendCall(args)
    _C.append_kv(append.call)
    return append.q_out, append.seqlens


class PackedWeights(NamedTuple):
    """A linear layer's weights and bias in the order of one ISA's kernel; csrc/cpu/linear_pack.h."""

    data: Tensor
    address: int
    isa: str
    in_features: int
    out_features: int
    dtype: int


def pack_linear(weight: Tensor, bias: Tensor | None) -> PackedWeights:
    """``weight (out_features, in_features)`` float32 or bfloat16, ``bias (out_features,)`` float32."""
    weight = unit_stride(weight)
    bias = None if bias is None else bias.contiguous()
    out_features, in_features = weight.shape
    dtype = DTYPES[weight.dtype]
    data = torch.empty(_C.packed_linear_floats(in_features, out_features, dtype), dtype=torch.float32)
    _C.pack_linear(
        weight.data_ptr(),
        weight.stride(0),
        0 if bias is None else bias.data_ptr(),
        data.data_ptr(),
        in_features,
        out_features,
        dtype,
        torch.get_num_threads(),
    )
    return PackedWeights(data, data.data_ptr(), _C.isa(), in_features, out_features, dtype)


def linear(packed: PackedWeights, x: Tensor) -> Tensor:
    """``x (tokens, in_features)`` float32 to ``(tokens, out_features)`` float32."""
    x = unit_stride(x)
    _, weights, isa, in_features, out_features, dtype = packed
    tokens = x.size(0)
    out = torch.empty((tokens, out_features), dtype=torch.float32)
    _C.linear(
        x.data_ptr(),
        x.stride(0),
        weights,
        isa,
        out.data_ptr(),
        out_features,
        tokens,
        in_features,
        out_features,
        dtype,
        torch.get_num_threads(),
    )
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x (tokens, hidden)`` and ``weight (hidden,)`` float32 to (tokens, hidden) float32."""
    x, weight = unit_stride(x), weight.contiguous()
    tokens, hidden = x.shape
    out = torch.empty((tokens, hidden), dtype=torch.float32)
    _C.rms_norm(
        x.data_ptr(),
        x.stride(0),
        weight.data_ptr(),
        out.data_ptr(),
        tokens,
        hidden,
        eps,
        torch.get_num_threads(),
    )
    return out


def activate(x: Tensor, kind: str, gated: bool) -> Tensor:
    """``x (tokens, ffn)``, or if gated ``(tokens, 2 * ffn)``, float32 to (tokens, ffn) float32."""
    x = unit_stride(x)
    tokens, ffn = x.shape[0], x.shape[1] // 2 if gated else x.shape[1]
    out = torch.empty((tokens, ffn), dtype=torch.float32)
    threads = torch.get_num_threads()
    _C.activate(x.data_ptr(), x.stride(0), out.data_ptr(), tokens, ffn, _ACTIVATIONS[kind], gated, threads)
    return out
