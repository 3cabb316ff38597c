"""The second half of flash-decoding: partial attentions over parts of the keys, merged by their log-sum-exps."""

import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels import primitives as P
from fastattn.kernels.launch import padded, strides, tuned

CONFIGS = [{"BLOCK_S": 16, "num_warps": 4, "num_stages": 1}]


@tuned(CONFIGS, key=["headdim_v"])
@triton.jit(do_not_specialize=["seqlen_q", "splits"])
def combine_kernel(
    parts, lses, sinks, out, lse, out_batch, out_row, out_head,
    nheads, seqlen_q, splits, headdim_v,
    BLOCK_DV: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One program per row of (batch, nheads, seqlen_q), flattened; parts (splits, rows, headdim_v) in order."""
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0).to(tl.int64)
    i = row % seqlen_q
    head = row // seqlen_q % nheads
    b = row // seqlen_q // nheads
    d = tl.arange(0, BLOCK_DV)
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([BLOCK_DV], tl.float32)
    for first in range(0, splits, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)  # (BLOCK_S,)
        part = tl.load(lses + split * rows + row, mask=split < splits, other=float("-inf")) * P.LOG2E
        new_top = tl.maximum(top, tl.max(part, 0))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight = tl.exp2(part - safe)  # (BLOCK_S,)
        shrink = tl.exp2(top - safe)
        # An empty part has weight 0 and was never written.
        used = (weight > 0)[:, None] & (d < headdim_v)[None, :]
        values = tl.load(parts + (split * rows + row)[:, None] * headdim_v + d[None, :], mask=used, other=0.0)
        acc = acc * shrink + tl.sum(values * weight[:, None], 0)
        total = total * shrink + tl.sum(weight, 0)
        top = new_top
    state = P.State(top, total, acc[None, :])
    if sinks is not None:
        state = P.add_sink(state, tl.load(sinks + head) + tl.zeros([1], tl.float32))
    values, log_sum = P.finish(state, 1.0)
    one = tl.arange(0, 1)
    at = b * out_batch + i * out_row + head * out_head + d  # (BLOCK_DV,)
    tl.store(out + at[None, :], values.to(out.dtype.element_ty), mask=(d < headdim_v)[None, :])
    tl.store(lse + row + one, log_sum)


def combine(parts: Tensor, lses: Tensor, sinks: Tensor | None, out: Tensor, lse: Tensor) -> None:
    """Fill ``out (batch, seqlen_q, nheads, headdim_v)`` and ``lse (batch, nheads, seqlen_q)``.

    From ``parts (splits, batch, nheads, seqlen_q, headdim_v)`` and ``lses (splits, batch, nheads, seqlen_q)``, float32.
    """
    splits, batch, nheads, seqlen_q, headdim_v = parts.shape
    combine_kernel.launch(
        lambda blocks: (batch * nheads * seqlen_q,), CONFIGS[0],
        parts=parts, lses=lses, sinks=sinks, out=out, lse=lse, **strides(out, "out_batch", "out_row", "out_head"),
        nheads=nheads, seqlen_q=seqlen_q, splits=splits, headdim_v=headdim_v, BLOCK_DV=padded(headdim_v),
    )  # fmt: skip
