"""What every attention call must be: shapes, dtypes and ranges of the arguments that the public functions share."""

from __future__ import annotations

import math
from numbers import Integral, Real

import torch
from torch import Tensor

from fastattn.args import MAX_HEADDIM, AttentionArgs
from fastattn.checks import (
    Shapes,
    check_broadcast,
    check_dtype,
    check_float,
    check_like,
    check_range,
    check_tensor,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_WIDEST = 1 << 40


def _fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether q, k, v need no further look: one quick answer for the calls that are right."""
    try:
        batch, _, nheads, headdim = q.shape
        batch_k, seqlen_k, nheads_k, headdim_k = k.shape
        batch_v, seqlen_v, nheads_v, headdim_v = v.shape
    except (AttributeError, ValueError):
        return False
    return (
        batch == batch_k == batch_v
        and seqlen_k == seqlen_v
        and nheads_k == nheads_v > 0
        and nheads > 0
        and nheads % nheads_k == 0
        and 0 < headdim == headdim_k <= MAX_HEADDIM
        and 0 < headdim_v <= MAX_HEADDIM
        and q.dtype == k.dtype == v.dtype
        and q.dtype in DTYPES
        and q.device == k.device == v.device
    )


def check_qkv(q: Tensor, k: Tensor, v: Tensor, names: tuple[str, str] = ("k", "v")) -> None:
    """q, k, v (batch, seqlen, heads, dim) of one dtype and device, heads that divide, dims in range."""
    if _fits(q, k, v):
        return
    shapes = Shapes()
    shapes.match("q", q, "batch seqlen_q nheads headdim")
    shapes.match(names[0], k, "batch seqlen_k nheads_k headdim")
    shapes.match(names[1], v, "batch seqlen_k nheads_k headdim_v")
    check_dtype("q", q, DTYPES)
    check_like(names[0], k, "q", q)
    check_like(names[1], v, "q", q)
    nheads, nheads_k = q.shape[2], k.shape[2]
    if nheads == 0:
        raise ValueError("q: expected at least 1 head, got 0")
    if nheads_k == 0 or nheads % nheads_k:
        raise ValueError(
            f"{names[0]}: expected nheads_k that divides nheads={nheads}, got nheads_k={nheads_k}"
        )
    if not 1 <= q.shape[3] <= MAX_HEADDIM:
        raise ValueError(f"q: expected headdim from 1 to {MAX_HEADDIM}, got {q.shape[3]}")
    raise ValueError(f"{names[1]}: expected headdim_v from 1 to {MAX_HEADDIM}, got {v.shape[3]}")


def check_modifiers(args: AttentionArgs) -> None:
    """Everything beyond q, k, v: only called when a score modifier or a gradient is in use."""
    batch, nheads = args.batch, args.q.shape[2]
    packed = args.cu_seqlens_q is not None
    seqlen_q = args.max_seqlen_q if packed else args.q.shape[1]
    seqlen_k = args.max_seqlen_k if packed else args.k.shape[1]
    scores = (batch, nheads, seqlen_q, seqlen_k)
    for name in ("alibi_slopes", "attn_bias", "attn_mask", "sinks"):
        if (given := getattr(args, name)) is not None:
            check_tensor(name, given, args.q.device)
    check_range("softcap", args.softcap, 0.0, 1e30)  # beyond, float32 has no room for its square
    if args.softcap > 0 and args.dropout_p > 0:
        raise ValueError(f"softcap: expected 0 together with dropout_p={args.dropout_p}, got {args.softcap}")
    if args.attn_bias is not None and not args.bias_is_relative:
        check_float("attn_bias", args.attn_bias, hint=" (bool masks: attn_mask)")
        check_broadcast("attn_bias", args.attn_bias, scores)
    if args.attn_mask is not None:
        check_dtype("attn_mask", args.attn_mask, (torch.bool,))
        check_broadcast("attn_mask", args.attn_mask, scores)
    if args.alibi_slopes is not None:
        if tuple(args.alibi_slopes.shape) not in ((nheads,), (batch, nheads)):
            raise ValueError(
                f"alibi_slopes: expected (nheads={nheads},) or (batch={batch}, nheads={nheads}), "
                f"got {tuple(args.alibi_slopes.shape)}"
            )
        check_float("alibi_slopes", args.alibi_slopes)
        if args.alibi_slopes.requires_grad:
            raise ValueError(
                "alibi_slopes: expected a tensor without requires_grad, its gradient is not defined"
            )
    if args.sinks is not None:
        Shapes(nheads=nheads).match("sinks", args.sinks, "nheads")
        check_float("sinks", args.sinks)


def checked_relative_bias(relative_bias: Tensor, attn_bias: Tensor | None, q: Tensor, k: Tensor) -> Tensor:
    """A value per head and diagonal, as ``AttentionArgs`` has it, and no other bias beside."""
    if attn_bias is not None:
        raise ValueError("relative_bias: expected None together with attn_bias, got both")
    check_tensor("relative_bias", relative_bias, q.device)
    check_float("relative_bias", relative_bias)
    diagonals = max(0, q.shape[1] + k.shape[1] - 1)
    shape = tuple(relative_bias.shape)
    if relative_bias.dim() not in (1, 2, 3) or shape[-1] != diagonals:
        raise ValueError(
            f"relative_bias: expected ([batch,] [nheads,] seqlen_q + seqlen_k - 1 = {diagonals}), got {shape}"
        )
    check_broadcast("relative_bias", relative_bias, (q.shape[0], q.shape[2], diagonals))
    return relative_bias.view(*(1,) * (3 - relative_bias.dim()), *shape)[:, :, None]


def checked_scale(softmax_scale: float | None, headdim: int, name: str = "softmax_scale") -> float:
    """1 / sqrt(headdim), or the finite number given."""
    if softmax_scale is None:
        return 1.0 / math.sqrt(headdim)
    if not isinstance(softmax_scale, Real):
        raise TypeError(f"{name}: expected a number, got {type(softmax_scale).__name__}")
    if not -math.inf < softmax_scale < math.inf:  # no function of math: torch.compile may hold a symbol
        raise ValueError(f"{name}: expected a finite number, got {softmax_scale}")
    return float(softmax_scale)


def checked_window(window_size: tuple[int, int]) -> tuple[int, int]:
    """(left, right), -1 = unlimited; wider than any sequence counts as that, so that no sum of places overflows."""
    if (
        not isinstance(window_size, (tuple, list))
        or len(window_size) != 2
        or not all(isinstance(n, Integral) and n >= -1 for n in window_size)
    ):
        raise ValueError(f"window_size: expected (left, right) with values >= -1, got {window_size}")
    left, right = window_size
    return min(left, _WIDEST), min(right, _WIDEST)


def checked_causal(causal: bool) -> bool:
    """True or False and nothing else: a mask passed by mistake would be true."""
    if type(causal) is not bool:
        raise TypeError(f"causal: expected a bool, got {type(causal).__name__}")
    return causal
