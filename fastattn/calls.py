"""How a call becomes what the compiled modules read, addresses, sizes and strides: csrc/binding_params.h."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastattn.args import AttentionArgs, KVAppendArgs, LogitBias, LogitEdits, SamplingArgs

DTYPES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float64: 3,
    torch.int8: 4,
}  # csrc/params.h, DType
_PerRow = float | tuple[int]
_SamplingCall = tuple[
    int, int, int, int, int, _PerRow, _PerRow, _PerRow, _PerRow, _PerRow, _PerRow, tuple[Any, ...] | None
]  # fmt: skip
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # what kernels that compute in float read


def unit_stride(x: Tensor) -> Tensor:
    """x, or a copy whose last dimension is dense."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def address(x: Tensor | None) -> int:
    """Where x lies; 0 for None."""
    return 0 if x is None else x.data_ptr()


def view(x: Tensor) -> tuple[int, int, int, int]:
    """Address and strides of a (batch, seqlen, heads, dim) tensor; csrc/params.h, TensorView."""
    stride = x.stride()
    return (address(x), stride[0], stride[1], stride[2])


def scores_shape(args: AttentionArgs) -> tuple[int, int, int, int]:
    """(batch, nheads, seqlen_q, seqlen_k) of the longest sequence."""
    return (args.batch, args.q.shape[2], args.max_seqlen_q or args.q.shape[1], longest_keys(args))


def statistics(q: Tensor) -> torch.dtype:
    """What scores, lse and accumulators are."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


class Modifiers:
    """What a call needs beyond plain attention, as the kernels read it; keeps the converted tensors alive."""

    def __init__(self, args: AttentionArgs) -> None:
        compute = statistics(args.q)
        shape = scores_shape(args)
        slopes = None if args.alibi_slopes is None else args.alibi_slopes.to(compute).contiguous()
        sinks = None if args.sinks is None else args.sinks.to(compute).contiguous()
        bias, bias_call, mask = args.attn_bias, None, args.attn_mask
        if bias is not None:
            # Kernels read float32 and the 16-bit floats as they are; everything else becomes what they compute in.
            if compute == torch.float64 or bias.dtype not in FLOAT_DTYPES:
                bias = bias.to(compute)
            spread = _by_diagonal if args.bias_is_relative else _by_score
            bias, bias_call = spread(bias.resolve_neg(), shape)
        if mask is not None:
            mask = mask.expand(shape)
        seed, offset = (0, 0) if args.rng_state is None else args.rng_state.tolist()
        self.tensors = (slopes, sinks, bias, mask)
        self.call = (
            args.softcap,
            address(slopes),
            slopes.shape[1] if slopes is not None and slopes.dim() == 2 else 0,
            bias_call,
            None if mask is None else (address(mask), *mask.stride(), DTYPES[torch.int8]),
            address(sinks),
            args.dropout_p,
            seed,
            offset,
        )


def _by_score(bias: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, tuple[int, ...]]:
    """A tensor to keep alive, and what csrc/params.h, ScoreView, holds."""
    bias = bias.expand(shape)
    return bias, (address(bias), *bias.stride(), DTYPES[bias.dtype])


def _by_diagonal(bias: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, tuple[int, ...]]:
    """One line per head, in which a query stands right of the one before it: a call may have a stride of -1."""
    batch, nheads, _, seqlen_k = shape
    line = bias.flip(3).contiguous()  # (batch or 1, nheads or 1, 1, seqlen_q + seqlen_k - 1), by i - j
    line = line.expand(batch, nheads, -1, -1)
    start = address(line) + max(0, seqlen_k - 1) * line.element_size()
    return line, (start, *line.stride()[:2], 1, -1, DTYPES[line.dtype])


def longest_keys(args: AttentionArgs) -> int:
    """The keys of the longest sequence, or room for them."""
    if args.cu_seqlens_q is not None:
        return args.max_seqlen_k
    return args.k.shape[1] if args.block_table is None else args.block_table.shape[1] * args.k.shape[1]


def attention_call(
    args: AttentionArgs, q: Tensor, k: Tensor, v: Tensor, modifiers: Modifiers | None
) -> tuple[object, ...]:
    """What forward and backward share; csrc/binding_params.h, attention_params."""
    packed = args.cu_seqlens_q is not None
    _, seqlen_q, nheads, headdim = q.shape
    nheads_k, headdim_v = v.shape[2:]
    left, right = args.window_size
    return (
        view(q),
        view(k),
        view(v),
        (
            args.batch,
            args.max_seqlen_q if packed else seqlen_q,
            longest_keys(args),
            nheads,
            nheads_k,
            headdim,
            headdim_v,
        ),
        args.softmax_scale,
        left,
        0 if args.causal else right,
        DTYPES[q.dtype],
        DTYPES[k.dtype],
        torch.get_num_threads(),
        address(args.cu_seqlens_q),
        None if modifiers is None and args.seqlens_k is None else keys_call(args, k, args.seqlens_k),
        None if modifiers is None else modifiers.call,
    )


def keys_call(args: AttentionArgs | KVAppendArgs, k: Tensor, seqlens: Tensor | None) -> tuple[object, ...]:
    """Where the keys of each sequence are; csrc/binding_params.h, fill_kv."""
    table = args.block_table
    scales = [None if s is None else (address(s), *s.stride()) for s in (args.k_scale, args.v_scale)]
    return (
        address(getattr(args, "cu_seqlens_k", None)),
        address(seqlens),
        address(args.k_leftpad),
        address(args.cache_batch_idx),
        address(table),
        0 if table is None else table.stride(0),
        k.shape[1],
        *scales,
    )


class AppendCall:
    """An append as the kernels read it; keeps the converted tensors alive."""

    def __init__(self, args: KVAppendArgs) -> None:
        q = unit_stride(args.q)
        batch, seqlen_q, nheads, headdim = q.shape
        nheads_k, headdim_v = args.v_cache.shape[2:]
        # Without new tokens k and v stand in with zero rows.
        k = q[:, :0] if args.k is None else unit_stride(args.k)
        v = q[:, :0] if args.v is None else unit_stride(args.v)
        cos = None if args.rotary_cos is None else args.rotary_cos.float().contiguous()
        sin = None if args.rotary_sin is None else args.rotary_sin.float().contiguous()
        half_rotary = 0 if cos is None else cos.shape[1]
        self.q_out = q if cos is None else torch.empty_like(q, memory_format=torch.contiguous_format)
        self.seqlens = args.cache_seqlens if args.k is None else args.cache_seqlens + k.shape[1]
        self.tensors = (q, k, v, cos, sin)
        self.call = (
            view(q),
            view(self.q_out),
            view(k),
            view(v),
            view(args.k_cache),
            view(args.v_cache),
            keys_call(args, args.k_cache, args.cache_seqlens),
            address(cos),
            address(sin),
            (batch, seqlen_q, k.shape[1], nheads, nheads_k, headdim, headdim_v, half_rotary),
            args.rotary_interleaved,
            args.rotary_per_row,
            DTYPES[q.dtype],
            DTYPES[args.k_cache.dtype],
            torch.get_num_threads(),
        )


def sampling_call(args: SamplingArgs) -> _SamplingCall:
    """What comes in of a call; csrc/binding_params.h, sampling_params."""
    logits = args.logits
    batch, vocab = logits.shape
    return (
        address(logits),
        logits.stride(0),
        batch,
        vocab,
        DTYPES[logits.dtype],
        number_or_address(args.temperature),
        number_or_address(args.top_k),
        number_or_address(args.top_p),
        number_or_address(args.min_p),
        number_or_address(args.seeds),
        number_or_address(args.positions),
        None if args.edits is None else _edits(args.edits),
    )


def number_or_address(value: float | Tensor) -> float | tuple[int]:
    """What csrc/binding_params.h, per_row, reads."""
    return (address(value),) if isinstance(value, Tensor) else value


def _edits(edits: LogitEdits) -> tuple[Any, ...]:
    """csrc/binding_params.h, fill_edits."""
    return (
        number_or_address(edits.repetition_penalty),
        number_or_address(edits.presence_penalty),
        number_or_address(edits.frequency_penalty),
        *_seen(edits),
        *_bias(edits.logit_bias),
        *_allowed(edits.allowed),
    )


def _seen(edits: LogitEdits) -> tuple[Any, ...]:
    counts = edits.token_counts
    if counts is None or isinstance(counts, Tensor):
        return _rows(counts), _rows(edits.prompt_mask), None, None, 0, None
    lists = _rows(counts.ids), _rows(counts.counts), address(counts.lengths), _rows(counts.unseen)
    return None, None, *lists


def _bias(bias: LogitBias | None) -> tuple[Any, ...]:
    if isinstance(bias, tuple):
        ids, values = bias
        return None, _rows(ids), _rows(values), ids.shape[1]
    return _rows(bias), None, None, 0


def _allowed(allowed: Tensor | None) -> tuple[Any, ...]:
    if allowed is None or allowed.dtype == torch.bool:
        return _rows(allowed), None
    return None, (address(allowed), 4 * allowed.stride(0))  # bytes


def _rows(x: Tensor | None) -> tuple[int, int] | None:
    return None if x is None else (address(x), x.stride(0))
