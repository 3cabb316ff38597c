"""The CUDA kernels (``csrc/cuda``), for compute capability 8.0 and later: attention on tensor cores, and sampling."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastattn import calls
from fastattn.gradient_sums import scores_to_bias, sinks_gradient

try:
    from fastattn import _cuda
except ImportError as error:
    _cuda = None  # type: ignore[assignment]
    _IMPORT_ERROR = str(error)

if TYPE_CHECKING:
    from fastattn.args import AttentionArgs, KVAppendArgs, SamplingArgs

NAME = "cuda"
FEATURES = frozenset(
    {"window", "softcap", "alibi", "bias", "relative_bias", "mask", "sinks", "dropout", "varlen", "leftpad",
     "cache_batch_idx", "paged", "gradients", "survivors", "penalties", "logit_bias", "allowed", "logprobs"}
)  # fmt: skip
_NO_GRADIENTS_WITH = frozenset({"leftpad", "cache_batch_idx", "paged"})
MAX_HEADDIM = 256  # csrc/cuda/launch.cu, FASTATTN_CUDA_HEADDIMS
_ATTENTION_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MAX_VOCAB = 1 << 22  # csrc/params.h, kMaxVocab
_CHUNK = 8  # elements that one copy moves: 16 bytes
_Logprobs = tuple[Tensor, Tensor, Tensor]  # of the drawn tokens (batch,), the best ids (batch, n) and theirs


@functools.cache  # every call asks
def unavailable() -> str | None:
    """None if the module imports and a GPU is there, else the reason."""
    if _cuda is None:
        return f"fastattn._cuda cannot be imported: {_IMPORT_ERROR} (FASTATTN_CUDA=on builds it, with nvcc)"
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA"
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    return None


def is_misforced() -> bool:
    """No environment variable chooses among this backend's kernels."""
    return False


def supports(args: AttentionArgs | KVAppendArgs | SamplingArgs) -> str | None:
    """None if this backend can serve the call, else why not."""
    tensor = args.subject
    if tensor.device.type != "cuda":
        return f"lacks device '{tensor.device.type}'"
    if torch.cuda.get_device_capability(tensor.device) < (8, 0):
        return "lacks GPUs below compute capability 8.0"
    return _lacks(args)


def _lacks(args: AttentionArgs | KVAppendArgs | SamplingArgs) -> str | None:
    """What no GPU would change."""
    tensor = args.subject
    are_logits = tensor.dim() == 2
    if tensor.dtype not in (calls.FLOAT_DTYPES if are_logits else _ATTENTION_DTYPES):
        return f"lacks dtype '{str(tensor.dtype).removeprefix('torch.')}'"
    if are_logits and tensor.shape[1] > _MAX_VOCAB:
        return f"lacks vocabularies above {_MAX_VOCAB}"
    features = args.features()
    if not are_logits and max(tensor.shape[-1], getattr(args, "v", tensor).shape[-1]) > MAX_HEADDIM:
        return f"lacks headdim above {MAX_HEADDIM}"
    lacking = sorted(features - FEATURES)
    if "gradients" in features and features & _NO_GRADIENTS_WITH:
        lacking.append("gradients")
    if {"paged", "dropout"} <= features:
        lacking.append("dropout with pages")
    return f"lacks {', '.join(map(repr, lacking))}" if lacking else None


def attention(args: AttentionArgs) -> tuple[Tensor, Tensor | None]:
    """``out (batch, seqlen_q, nheads, headdim_v)`` in q's dtype and ``lse (batch, nheads, seqlen_q)`` float32.

    Packed sequences: out (1, total_q, nheads, headdim_v) and lse (nheads, total_q). Nothing waits for the GPU.
    """
    headdim_v = args.v.shape[3]
    q, k, v = _aligned(args.q), _aligned(args.k), _aligned(args.v)
    rows, seqlen_q, nheads, _ = q.shape
    out = q.new_empty((rows, seqlen_q, nheads, v.shape[3]))
    lse = None
    if args.return_lse:
        shape = (nheads, seqlen_q) if args.cu_seqlens_q is not None else (rows, nheads, seqlen_q)
        lse = q.new_empty(shape, dtype=torch.float32)
    modifiers = calls.Modifiers(args) if args.features() else None
    call = calls.attention_call(args, q, k, v, modifiers)
    splits, padded_rows = _cuda.plan_splits(call)
    # Where blocks share the keys of a row, each leaves its part here.
    parts = splits * args.batch * k.shape[2] * padded_rows if splits > 1 else 0
    partial_out = q.new_empty((parts, v.shape[3]), dtype=torch.float32)
    partial_lse = q.new_empty(parts, dtype=torch.float32)
    with _on_device(q):
        _cuda.attention_forward(
            call,
            calls.view(out),
            (calls.address(lse), nheads * seqlen_q, seqlen_q),
            calls.address(partial_out),
            calls.address(partial_lse),
            _stream(q),
        )
    return _narrowed(out, headdim_v), lse


def forward_kernel(args: AttentionArgs) -> str:
    """Which forward kernel the current device gives a call: ``wgmma`` (Hopper) or ``mma``; ``csrc/cuda/launch.h``."""
    q, k, v = _aligned(args.q), _aligned(args.k), _aligned(args.v)
    modifiers = calls.Modifiers(args) if args.features() else None
    return _cuda.forward_kernel(calls.attention_call(args, q, k, v, modifiers))


def attention_backward(
    args: AttentionArgs, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, *, needs_dbias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """``dq, dk, dv, dbias, dsinks`` of a call of ``attention`` that gave ``out`` and ``lse``.

    dbias takes (batch, nheads, seqlen_q, seqlen_k) float32 of memory on the way.
    """
    q, k, v, out, dout = (_aligned(x) for x in (args.q, args.k, args.v, out, dout))
    lse = lse.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    nheads, seqlen_q = lse.shape[-2:]
    delta = lse.new_empty(lse.shape)
    # Tokens that no sequence holds are not visited.
    some_queries = args.cu_seqlens_q is not None
    some_keys = some_queries or args.seqlens_k is not None
    dq = (q.new_zeros if some_queries else q.new_empty)(q.shape)
    dk, dv = ((x.new_zeros if some_keys else x.new_empty)(x.shape) for x in (k, v))
    dbias = None
    if needs_dbias and args.attn_bias is not None:
        dbias = q.new_zeros(calls.scores_shape(args), dtype=torch.float32)
    modifiers = calls.Modifiers(args) if args.features() else None
    with _on_device(q):
        _cuda.attention_backward(
            calls.attention_call(args, q, k, v, modifiers),
            calls.view(out),
            (calls.address(lse), nheads * seqlen_q, seqlen_q),
            calls.view(dout),
            calls.address(dlse),
            calls.address(delta),
            calls.view(dq),
            calls.view(dk),
            calls.view(dv),
            None if dbias is None else (calls.address(dbias), *dbias.stride(), calls.DTYPES[torch.float32]),
            _stream(q),
        )
    if args.attn_bias is not None and dbias is not None:
        dbias = scores_to_bias(dbias, args.attn_bias, args.bias_is_relative)
    dsinks = None if args.sinks is None else sinks_gradient(args.sinks, lse, delta)
    headdim, headdim_v = args.q.shape[3], args.v.shape[3]
    return _narrowed(dq, headdim), _narrowed(dk, headdim), _narrowed(dv, headdim_v), dbias, dsinks


def append_kv(args: KVAppendArgs) -> tuple[Tensor, Tensor]:
    """Write the new (rotated) k and v at ``cache_seqlens``; returns rotated q and the new lengths (batch,)."""
    append = calls.AppendCall(args)
    with _on_device(args.q):
        _cuda.append_kv(append.call, _stream(args.q))
    return append.q_out, append.seqlens


def _narrowed(x: Tensor, dims: int) -> Tensor:
    """x (batch, seqlen, heads, padded) without its padding."""
    return x if x.shape[3] == dims else x[..., :dims].contiguous()


def sample(args: SamplingArgs) -> tuple[Tensor, _Logprobs | None]:
    """One token per row, (batch,) int64, -1 for a row that has none; and log-probabilities (batch,), ids, (batch, n).

    Nothing waits for the GPU. A row of which there is no softmax has no token, NaN for log-probabilities, and ids -1.
    """
    tokens, logprobs = tokens_or_errors(args)
    return tokens.clamp_(min=-1), logprobs


def tokens_or_errors(args: SamplingArgs) -> tuple[Tensor, _Logprobs | None]:
    """As ``sample``, but of a row without a token the negative reason: csrc/params.h, SamplingError."""
    batch, n = args.logits.shape[0], args.logprobs
    tokens = args.logits.new_empty(batch, dtype=torch.int64)
    logprobs = None
    if n:
        logprobs = (
            args.logits.new_empty(batch, dtype=torch.float32),
            args.logits.new_empty((batch, n), dtype=torch.int64),
            args.logits.new_empty((batch, n), dtype=torch.float32),
        )
    _sample(args, tokens=tokens, logprobs=logprobs)
    return tokens, logprobs


def survivors(args: SamplingArgs) -> Tensor:
    """Which tokens the filters keep, (batch, vocab) bool; a greedy row keeps one, a row without a token none."""
    kept = args.logits.new_empty(args.logits.shape, dtype=torch.bool)
    _sample(args, kept=kept)
    return kept


def _sample(
    args: SamplingArgs,
    tokens: Tensor | None = None,
    kept: Tensor | None = None,
    logprobs: _Logprobs | None = None,
) -> None:
    logits = args.logits
    board = logits.new_empty(_cuda.plan_sampling(*logits.shape)[1], dtype=torch.int64)
    edited, best = None, None
    if args.edits is not None:
        args = args._replace(edits=args.edits.with_ascending_bias())
        edited = logits.new_empty(logits.shape, dtype=torch.float32)
    if logprobs is not None:
        ranks = logits.new_empty(logprobs[1].shape, dtype=torch.int64)
        best = (args.logprobs, *map(calls.address, (*logprobs, ranks)))
    with _on_device(logits):
        _cuda.sample(
            *calls.sampling_call(args),
            *map(calls.address, (tokens, kept)),
            best,
            *map(calls.address, (edited, board)),
            _stream(logits),
        )


def _on_device(x: Tensor) -> torch.cuda.device:
    return torch.cuda.device(x.device)


def _stream(x: Tensor) -> int:
    return torch.cuda.current_stream(x.device).cuda_stream


def _aligned(x: Tensor) -> Tensor:
    """x (batch, seqlen, heads, dim) as 16-byte copies can read it: padded with zeros, or copied, where they cannot."""
    if x.shape[3] % _CHUNK:
        return pad(x, (0, -x.shape[3] % _CHUNK))
    dense = x.stride(3) == 1 and all(s % _CHUNK == 0 or n <= 1 for s, n in zip(x.stride()[:3], x.shape[:3]))
    return x if dense and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)
