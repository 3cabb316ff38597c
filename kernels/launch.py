"""From a call's arguments to a kernel's: addresses, strides, which blocks. The host side that all kernels share."""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor
from torch.library import wrap_triton

_WIDEST = 1 << 30  # a window that no sequence reaches, and whose sums with places fit 32 bits

_PLAIN = (Tensor, torch.nn.Parameter)
_fixed: dict[str, int] = {}


@contextmanager
def fixed_blocks(**blocks: int) -> Iterator[None]:
    """Every launch inside uses these blocks: tests choose small ones, so that small inputs have many tiles."""
    before = dict(_fixed)
    _fixed.update(blocks)
    try:
        yield
    finally:
        _fixed.clear()
        _fixed.update(before)


def chosen(config: dict[str, int]) -> dict[str, int]:
    """A configuration after ``fixed_blocks``."""
    return config | {n: x for n, x in _fixed.items() if n in config}


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def tuned(configs: list[dict[str, int]], key: list[str], **options: Any) -> Callable[[Any], "Kernel"]:
    """A kernel with the configurations that it may be tuned over; see ``Kernel``."""
    return lambda function: Kernel(function, configs, key, options)


class Kernel:
    """A jitted function and its configurations: blocks, num_warps, num_stages.

    A launch takes the configuration it is given, a fixed choice by shape and dtype: results then have the same bits on
    every run and machine. With ``FASTATTN_TRITON_AUTOTUNE=1`` the fastest of ``configs`` is measured, once per shape.
    """

    def __init__(
        self, function: Any, configs: list[dict[str, int]], key: list[str], options: dict[str, Any]
    ) -> None:
        self.function, self.configs, self.options = function, configs, options
        own = ("num_warps", "num_stages")
        choices = [
            triton.Config({n: x for n, x in c.items() if n not in own}, **{n: c[n] for n in own})
            for c in configs
        ]
        self._autotuned = None if is_interpreted() else triton.autotune(choices, key)(function)

    def launch(
        self, grid: Callable[[dict[str, Any]], tuple[int, ...]], config: dict[str, int], **call: Any
    ) -> None:
        """``grid`` gets the chosen blocks by name."""
        autotune = (
            os.environ.get("FASTATTN_TRITON_AUTOTUNE") == "1" and not _fixed and self._autotuned is not None
        )
        target: Any = self._autotuned if autotune else self.function
        if not autotune:
            call |= chosen(config)
        tensors = [x for x in call.values() if isinstance(x, Tensor)]
        if any(type(x) not in _PLAIN for x in tensors):  # somebody traces: torch.compile shall see the kernel
            wrap_triton(target)[grid](**call, **self.options)
            return
        with torch.cuda.device(tensors[0].device) if tensors[0].is_cuda else nullcontext():
            target[grid](**call, **self.options)


def precision(q: Tensor) -> str:
    """How float32 is multiplied: three TF32 products keep its accuracy on NVIDIA's tensor cores."""
    return "ieee" if q.dtype != torch.float32 or torch.version.hip or is_interpreted() else "tf32x3"


def padded(dim: int) -> int:
    """The block that holds a head dimension."""
    return max(16, int(triton.next_power_of_2(dim)))


def unit_stride(x: Tensor) -> Tensor:
    """x, or a copy whose last dimension is contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def strides(x: Tensor | None, *names: str) -> dict[str, int]:
    """Strides of x by the name of each dimension, zeros without x."""
    return dict(zip(names, (0,) * len(names) if x is None else x.stride()[: len(names)]))


def per_row(like: Tensor, dtype: torch.dtype, **numbers: float | Tensor) -> dict[str, Any]:
    """A number, or one for each row, with the stride ``<name>_row``; on the device of ``like``."""
    call: dict[str, Any] = {}
    for name, value in numbers.items():
        if isinstance(value, Tensor):
            call |= {name: value, name + "_row": 1}
        else:
            call |= {name: torch.full((1,), value, dtype=dtype, device=like.device), name + "_row": 0}
    return call


def bias_call(args: Any, scores: tuple[int, ...]) -> dict[str, Any]:
    """The bias and its strides; ``scores`` is (batch, nheads, seqlen_q, seqlen_k)."""
    names, bias = ("bias_batch", "bias_head", "bias_row", "bias_key"), args.attn_bias
    if bias is not None and bias.dtype == torch.float64:
        bias = bias.float()
    if bias is None or not args.bias_is_relative:
        bias = None if bias is None else bias.expand(scores)
        return {"bias": bias, **strides(bias, *names)}
    # One line per head, in which a query stands right of the one before it, and a key left.
    line = bias.flip(3).contiguous()  # (batch or 1, nheads or 1, 1, seqlen_q + seqlen_k - 1)
    line = line.expand(*scores[:2], -1, -1)
    return {"bias": line[..., max(0, scores[3] - 1) :], **dict(zip(names, (*line.stride()[:2], 1, -1)))}


def attention_call(args: Any, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Any]:
    """The arguments that every attention kernel takes; ``args`` is an ``AttentionArgs``."""
    packed = args.cu_seqlens_q is not None
    nheads, nheads_k = q.shape[2], k.shape[2]
    scores = (args.batch, nheads, args.max_seqlen_q or q.shape[1], keys_of(args))
    mask = None if args.attn_mask is None else args.attn_mask.view(torch.uint8).expand(scores)
    slopes = None if args.alibi_slopes is None else args.alibi_slopes.float().contiguous()
    left, right = args.window_size
    right = 0 if args.causal else right
    keep = 1.0 - args.dropout_p
    call = {
        "q": q, "k": k, "v": v,
        "cu_seqlens_q": args.cu_seqlens_q, "cu_seqlens_k": args.cu_seqlens_k, "seqlens_k": args.seqlens_k,
        "leftpad": args.k_leftpad, "batch_idx": args.cache_batch_idx, "table": args.block_table,
        "slopes": slopes, "mask": mask,
        "sinks": None if args.sinks is None else args.sinks.float().contiguous(),
        "rng_state": None if args.rng_state is None else args.rng_state.to(q.device, non_blocking=True),
        **strides(q, "q_batch", "q_row", "q_head"),
        **strides(k, "k_batch", "k_row", "k_head"),
        **strides(v, "v_batch", "v_row", "v_head"),
        **strides(args.block_table, "table_batch"),
        "slopes_batch": slopes.stride(0) if slopes is not None and slopes.dim() == 2 else 0,
        **bias_call(args, scores),
        **strides(mask, "mask_batch", "mask_head", "mask_row", "mask_key"),
        "nheads": nheads, "seqlen_q": q.shape[1], "seqlen_k": k.shape[1], "page_size": k.shape[1],
        "headdim": q.shape[3], "headdim_v": v.shape[3],
        "scale": args.softmax_scale, "softcap": args.softcap or None,
        "left": None if left < 0 else min(left, _WIDEST), "right": None if right < 0 else min(right, _WIDEST),
        "dropout_threshold": threshold_bits(args.dropout_p),
        "dropout_scale": 1.0 / keep if keep > 0 else 0.0,
        "GROUP": nheads // nheads_k,
        "BLOCK_D": padded(q.shape[3]), "BLOCK_DV": padded(v.shape[3]),
        "EVEN_D": padded(q.shape[3]) == q.shape[3], "EVEN_DV": padded(v.shape[3]) == v.shape[3],
        "PRECISION": precision(q),
    }  # fmt: skip
    if packed:  # places in q already say which sequence
        call["q_batch"] = 0
    return call


def threshold_bits(dropout_p: float) -> int:
    """The 32-bit word below which a weight is dropped (csrc/cpu/dropout.h), as a signed number."""
    word = min(math.floor(dropout_p * 2.0**32), 2**32 - 1)
    return word - 2**32 if word >= 2**31 else word


def keys_of(args: Any) -> int:
    """The keys of the longest sequence, or room for them."""
    if args.cu_seqlens_q is not None:
        return int(args.max_seqlen_k)
    return int(args.k.shape[1] if args.block_table is None else args.block_table.shape[1] * args.k.shape[1])


def outputs(args: Any, q: Tensor, headdim_v: int) -> tuple[Tensor, Tensor, dict[str, int]]:
    """``out`` and ``lse`` for a kernel to fill, and their strides."""
    batch, seqlen_q, nheads, _ = q.shape
    out = q.new_empty((batch, seqlen_q, nheads, headdim_v))
    packed = args.cu_seqlens_q is not None
    lse = q.new_empty((nheads, seqlen_q) if packed else (batch, nheads, seqlen_q), dtype=torch.float32)
    given = {
        **strides(out, "out_batch", "out_row", "out_head"),
        "lse_batch": 0 if packed else nheads * seqlen_q,
        "lse_head": seqlen_q,
    }
    if packed:
        given["out_batch"] = 0
    return out, lse, given
