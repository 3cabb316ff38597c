"""The C++ kernels for CPUs, one table of function pointers per ISA (``csrc/cpu``)."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastattn.backends.cpu_gradients import bias_gradient, bias_sums, broadcast_strides, sinks_gradient
from fastattn.backends.cpu_sampling import sample, survivors

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
    "supports",
    "survivors",
    "unavailable",
]

NAME = "cpu"
FEATURES = frozenset(
    {"window", "softcap", "alibi", "bias", "mask", "sinks", "dropout", "varlen", "leftpad", "cache_batch_idx", "paged",
     "kv_dtype", "gradients", "penalties", "logit_bias", "allowed", "logprobs", "survivors"}
)  # fmt: skip
_NO_GRADIENTS_WITH = frozenset({"leftpad", "cache_batch_idx", "paged", "kv_dtype"})

# The ISA is chosen once, at import; a wrong FASTATTN_CPU_ISA is not a crash but the reason why this backend is off.
_ISA_ERROR: str | None = None
if _C is not None:
    try:
        _C.select_isa(os.environ.get("FASTATTN_CPU_ISA", ""))
    except ValueError as error:
        _ISA_ERROR = str(error)

# The quick ways in for plain calls, csrc/plain_attention.cpp: None where there are none.
plain_attention: Any = None
plain_attention_backward: Any = None
plain_kvcache: Callable[..., Tensor | None] | None = None
_empty_float = partial(torch.empty, dtype=torch.float32, device="cpu")
if (
    _C is not None
    and _ISA_ERROR is None
    and _C.bind_tensor(Tensor, torch.nn.Parameter, torch.empty_like, _empty_float)
):
    plain_attention, plain_kvcache = _C.plain_attention, _C.plain_kvcache
    plain_attention_backward = _C.plain_attention_backward

_DTYPES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float64: 3,
    torch.int8: 4,
}  # csrc/params.h, DType
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
    q, k, v = _unit_stride(args.q), _unit_stride(args.k), _unit_stride(args.v)
    batch, seqlen_q, nheads, _ = q.shape
    out = q.new_empty((batch, seqlen_q, nheads, v.shape[3]))
    if args.return_lse:
        shape = (nheads, seqlen_q) if args.cu_seqlens_q is not None else (batch, nheads, seqlen_q)
        lse = q.new_empty(shape, dtype=_statistics(q))
        lse_view = (lse.data_ptr(), nheads * seqlen_q, seqlen_q)
    else:
        lse, lse_view = None, (0, 0, 0)
    modifiers = _Modifiers(args) if args.features() else None
    _C.attention_forward(_call(args, q, k, v, modifiers), _view(out), lse_view)
    return out, lse


def attention_backward(
    args: AttentionArgs, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, *, needs_dbias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """``dq, dk, dv, dbias, dsinks`` of a call of ``attention`` that gave ``out`` and ``lse``."""
    q, k, v = _unit_stride(args.q), _unit_stride(args.k), _unit_stride(args.v)
    compute, lse = _statistics(q), lse.contiguous()
    nheads, seqlen_q = lse.shape[-2:]
    delta = torch.empty_like(lse)
    dbias = None
    if needs_dbias and args.attn_bias is not None:
        dbias = bias_sums(args.attn_bias, _scores_shape(args), compute)
    # Tokens that no sequence holds are not visited.
    some_queries, some_keys = (
        args.cu_seqlens_q is not None,
        (args.seqlens_k, args.cu_seqlens_k) != (None, None),
    )
    dq = (torch.zeros if some_queries else torch.empty)(q.shape, dtype=compute)
    dk, dv = ((torch.zeros if some_keys else torch.empty)(x.shape, dtype=x.dtype) for x in (k, v))
    modifiers = _Modifiers(args) if args.features() else None
    out, dout = _unit_stride(out), _unit_stride(dout)
    dlse = None if dlse is None else dlse.contiguous()
    _C.attention_backward(
        _call(args, q, k, v, modifiers),
        _view(out),
        (lse.data_ptr(), nheads * seqlen_q, seqlen_q),
        _view(dout),
        _address(dlse),
        delta.data_ptr(),
        _view(dq),
        _view(dk),
        _view(dv),
        None if dbias is None else (dbias.data_ptr(), *broadcast_strides(dbias), _DTYPES[compute]),
    )
    if args.attn_bias is not None and dbias is not None:
        dbias = bias_gradient(args.attn_bias, dbias)
    dsinks = None if args.sinks is None else sinks_gradient(args.sinks, lse, delta)
    return dq.to(q.dtype), dk, dv, dbias, dsinks


def _scores_shape(args: AttentionArgs) -> tuple[int, int, int, int]:
    return (args.batch, args.q.shape[2], args.max_seqlen_q or args.q.shape[1], _keys(args))


def append_kv(args: KVAppendArgs) -> tuple[Tensor, Tensor]:
    """Write the new (rotated) k and v at ``cache_seqlens``; returns rotated q and the new lengths (batch,)."""
    q = _unit_stride(args.q)
    batch, seqlen_q, nheads, headdim = q.shape
    nheads_k, headdim_v = args.v_cache.shape[2:]
    # Without new tokens k and v stand in with zero rows.
    k = q[:, :0] if args.k is None else _unit_stride(args.k)
    v = q[:, :0] if args.v is None else _unit_stride(args.v)
    cos = None if args.rotary_cos is None else args.rotary_cos.float().contiguous()
    sin = None if args.rotary_sin is None else args.rotary_sin.float().contiguous()
    q_out = q if cos is None else torch.empty_like(q, memory_format=torch.contiguous_format)
    sizes = (
        batch,
        seqlen_q,
        k.shape[1],
        nheads,
        nheads_k,
        headdim,
        headdim_v,
        0 if cos is None else cos.shape[1],
    )
    _C.append_kv(
        _view(q),
        _view(q_out),
        _view(k),
        _view(v),
        _view(args.k_cache),
        _view(args.v_cache),
        _kv(args, args.k_cache, args.cache_seqlens),
        _address(cos),
        _address(sin),
        sizes,
        args.rotary_interleaved,
        args.rotary_per_row,
        _DTYPES[q.dtype],
        _DTYPES[args.k_cache.dtype],
        torch.get_num_threads(),
    )
    return q_out, args.cache_seqlens if args.k is None else args.cache_seqlens + k.shape[1]


def _statistics(q: Tensor) -> torch.dtype:
    """What scores, lse and accumulators are."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


class _Modifiers:
    """What a call needs beyond plain attention, as the kernels read it; keeps the converted tensors alive."""

    def __init__(self, args: AttentionArgs) -> None:
        compute = _statistics(args.q)
        shape = _scores_shape(args)
        slopes = None if args.alibi_slopes is None else args.alibi_slopes.to(compute).contiguous()
        sinks = None if args.sinks is None else args.sinks.to(compute).contiguous()
        bias, mask = args.attn_bias, args.attn_mask
        if bias is not None:
            # Kernels read float32 and the 16-bit floats as they are; everything else becomes what they compute in.
            if compute == torch.float64 or bias.dtype not in _FLOAT_DTYPES:
                bias = bias.to(compute)
            bias = bias.resolve_neg().expand(shape)
        if mask is not None:
            mask = mask.expand(shape)
        seed, offset = (0, 0) if args.rng_state is None else args.rng_state.tolist()
        self.tensors = (slopes, sinks, bias, mask)
        self.call = (
            args.softcap,
            _address(slopes),
            slopes.shape[1] if slopes is not None and slopes.dim() == 2 else 0,
            None if bias is None else (bias.data_ptr(), *bias.stride(), _DTYPES[bias.dtype]),
            None if mask is None else (mask.data_ptr(), *mask.stride(), _DTYPES[torch.int8]),
            _address(sinks),
            args.dropout_p,
            seed,
            offset,
        )


def _keys(args: AttentionArgs) -> int:
    """The keys of the longest sequence, or room for them."""
    if args.cu_seqlens_q is not None:
        return args.max_seqlen_k
    return args.k.shape[1] if args.block_table is None else args.block_table.shape[1] * args.k.shape[1]


def _call(
    args: AttentionArgs, q: Tensor, k: Tensor, v: Tensor, modifiers: _Modifiers | None
) -> tuple[object, ...]:
    """What forward and backward share; csrc/bindings.cpp, attention_params."""
    packed = args.cu_seqlens_q is not None
    _, seqlen_q, nheads, headdim = q.shape
    nheads_k, headdim_v = v.shape[2:]
    left, right = args.window_size
    return (
        _view(q),
        _view(k),
        _view(v),
        (
            args.batch,
            args.max_seqlen_q if packed else seqlen_q,
            _keys(args),
            nheads,
            nheads_k,
            headdim,
            headdim_v,
        ),
        args.softmax_scale,
        left,
        0 if args.causal else right,
        _DTYPES[q.dtype],
        _DTYPES[k.dtype],
        torch.get_num_threads(),
        _address(args.cu_seqlens_q),
        None if modifiers is None and args.seqlens_k is None else _kv(args, k, args.seqlens_k),
        None if modifiers is None else modifiers.call,
    )


def _kv(args: AttentionArgs | KVAppendArgs, k: Tensor, seqlens: Tensor | None) -> tuple[object, ...]:
    """Where the keys of each sequence are; csrc/bindings.cpp, fill_kv."""
    table = args.block_table
    scales = [None if s is None else (s.data_ptr(), *s.stride()) for s in (args.k_scale, args.v_scale)]
    return (
        _address(getattr(args, "cu_seqlens_k", None)),
        _address(seqlens),
        _address(args.k_leftpad),
        _address(args.cache_batch_idx),
        _address(table),
        0 if table is None else table.stride(0),
        k.shape[1],
        *scales,
    )


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


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
    weight = _unit_stride(weight)
    bias = None if bias is None else bias.contiguous()
    out_features, in_features = weight.shape
    dtype = _DTYPES[weight.dtype]
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
    x = _unit_stride(x)
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
    x, weight = _unit_stride(x), weight.contiguous()
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


def silu_mul(gate_up: Tensor) -> Tensor:
    """``gate_up (tokens, 2 * ffn)`` float32 to (tokens, ffn) float32."""
    gate_up = _unit_stride(gate_up)
    tokens, ffn = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((tokens, ffn), dtype=torch.float32)
    _C.silu_mul(gate_up.data_ptr(), gate_up.stride(0), out.data_ptr(), tokens, ffn, torch.get_num_threads())
    return out


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _view(x: Tensor) -> tuple[int, int, int, int]:
    """Address and strides of a (batch, seqlen, heads, dim) tensor; csrc/params.h, TensorView."""
    stride = x.stride()
    return (x.data_ptr(), stride[0], stride[1], stride[2])
