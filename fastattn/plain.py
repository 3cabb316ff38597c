"""Calls on dense CPU tensors without a tour through Python: the interpreter hands them to the kernel as they are.

``attention`` answers None to whatever is not for it: the public functions then check, choose and explain at length.
With gradients the kernel's lse is kept, and the backward pass is as short. See csrc/plain_attention.cpp.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastattn import ops
from fastattn.args import AttentionArgs, top_left
from fastattn.attention_checks import checked_scale
from fastattn.backends import cpu

# How the tensors lie, csrc/plain_attention.cpp, Layout.
ROWS_FIRST = 0  # (batch, seqlen, heads, dim)
TORCH = 1  # (batch, heads, seqlen, dim), as torch's own attention: the causal corner is top-left
TRANSFORMERS = 2  # the same, but the result is (batch, seqlen_q, nheads, headdim_v)

NO_WINDOW = (-1, -1)


def attention(
    layout: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    softmax_scale: float | None,
    shares_heads: bool,
    window_size: tuple[int, int],
    softcap: float,
    bias: Tensor | None,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    return_lse: bool,
) -> Any:
    """``fastattn.attention`` of a call that needs no explanation; nothing is checked before, all of it here.

    Args:
        layout: of q, k, v and the result, one of the above.
        shares_heads: k and v may have more than one head and fewer than q.
        mask: with heads first also float, and then a bias.

    Returns:
        out, or (out, lse) with return_lse; None where the call is not for here.
    """
    if cpu.plain_attention is None or ops.is_watched() or torch.is_autocast_enabled("cpu"):
        return None
    call = (
        q, k, v, causal, softmax_scale, torch.get_num_threads(), layout, shares_heads, torch.is_grad_enabled(),
        return_lse, window_size, softcap, bias, mask, alibi_slopes, sinks,
    )  # fmt: skip
    found = cpu.plain_attention(*call)
    if found is not False:
        return found
    return None if return_lse else _Recorded.apply(*call)  # type: ignore[no-untyped-call]


# Where things are in a call.
_CAUSAL, _SCALE, _LAYOUT, _RECORDS, _WANTS_LSE, _WINDOW, _SOFTCAP, _TENSORS = 3, 4, 6, 8, 9, 10, 11, 12
_BIAS, _MASK, _ALIBI, _SINKS = range(_TENSORS, 16)


class _Recorded(torch.autograd.Function):
    """A call that autograd wants to hear of."""

    @staticmethod
    def forward(ctx: Any, *call: Any) -> Tensor:
        quiet = (*call[:_RECORDS], False, True, *call[_WINDOW:])  # does not ask for gradients, wants lse
        out, lse = cpu.plain_attention(*quiet)
        ctx.save_for_backward(*call[:3], *call[_TENSORS:], out, lse)
        ctx.numbers = quiet[3:_TENSORS]
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        q, k, v, *modifiers, out, lse = ctx.saved_tensors
        call = (q, k, v, *ctx.numbers, *modifiers)
        wanted = ctx.needs_input_grad
        if not (torch.is_grad_enabled() or wanted[_BIAS] or wanted[_MASK] or wanted[_SINKS]):
            dout = dout if dout.stride(-1) == 1 else dout.contiguous()
            unseen = call[_LAYOUT] != ROWS_FIRST and call[_CAUSAL] and q.shape[2] < k.shape[2]
            new = torch.zeros_like if unseen else torch.empty_like  # keys that nobody sees are not visited
            dq = torch.empty_like(q, dtype=lse.dtype)
            dk, dv, delta = new(k), new(v), torch.empty_like(lse)
            if cpu.plain_attention_backward(*call, dout, out, lse, delta, dq, dk, dv):
                return dq.to(q.dtype), dk, dv, *(None,) * (len(call) - 3)
        return _gradients(call, dout, out, lse, wanted)


def _gradients(call: Any, dout: Tensor, out: Tensor, lse: Tensor, wanted: Any) -> tuple[Any, ...]:
    """Those of ``call``'s arguments the long way: for bias and sinks too, and recorded where autograd records."""
    q, k, v = call[:3]
    bias, mask, alibi, sinks = call[_TENSORS:]
    causal, window, keys = call[_CAUSAL], call[_WINDOW], k.shape[1]
    given = bias if mask is None or mask.dtype == torch.bool else mask
    if mask is given:
        mask = None
    cropped = given
    heads_first = call[_LAYOUT] != ROWS_FIRST
    if heads_first:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (batch, seqlen, nheads, headdim)
        keys = k.shape[1]
        if causal:
            used, causal, window = top_left(q.shape[1], keys)
            k, v = k[:, :used], v[:, :used]
            cropped, mask = (
                x if x is None or x.dim() == 0 or x.shape[-1] == 1 else x[..., :used] for x in (given, mask)
            )
    if call[_LAYOUT] == TORCH:
        out, dout = out.transpose(1, 2), dout.transpose(1, 2)
    args = AttentionArgs(
        q=q, k=k, v=v, softmax_scale=checked_scale(call[_SCALE], q.shape[3]), causal=causal, window_size=window,
        softcap=call[_SOFTCAP], alibi_slopes=alibi, attn_bias=cropped, attn_mask=mask, sinks=sinks,
    )  # fmt: skip
    needs_dbias = wanted[_BIAS] or wanted[_MASK]
    dq, dk, dv, dbias, dsinks = ops.attention_backward(args, dout, out, lse, needs_dbias=needs_dbias)
    if missing := keys - k.shape[1]:
        dk, dv = (pad(x, (0, 0, 0, 0, 0, missing)) for x in (dk, dv))
        if needs_dbias and cropped is not given:
            dbias = pad(dbias, (0, missing))
    if heads_first:
        dq, dk, dv = (x.transpose(1, 2) for x in (dq, dk, dv))
    grads = [dq, dk, dv, *(None,) * (len(call) - 3)]
    grads[_BIAS if wanted[_BIAS] else _MASK] = dbias if needs_dbias else None
    grads[_SINKS] = dsinks if wanted[_SINKS] else None
    return tuple(grads)
