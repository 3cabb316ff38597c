"""Public attention: checks once, chooses a backend, calls it.

Causal masks are aligned bottom-right: query i of seqlen_q sees key j of seqlen_k iff ``j <= i + seqlen_k - seqlen_q``::

    seqlen_q=2, seqlen_k=5     seqlen_q=5, seqlen_k=2
      1 1 1 1 0                   0 0
      1 1 1 1 1                   0 0
                                  0 0
                                  1 0
                                  1 1
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn import ops, plain
from fastattn.args import AttentionArgs
from fastattn.attention_checks import (
    check_modifiers,
    check_qkv,
    checked_causal,
    checked_relative_bias,
    checked_scale,
    checked_window,
)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    attn_bias: Tensor | None = None,
    relative_bias: Tensor | None = None,
    attn_mask: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Fused softmax attention ``softmax(softmax_scale * q k^T + ...) v`` (FlashAttention, arXiv 2205.14135).

    Args:
        q: (batch, seqlen_q, nheads, headdim), any strides; float32, bfloat16, float16 or float64.
        k: (batch, seqlen_k, nheads_k, headdim); nheads must be a multiple of nheads_k (GQA, MQA).
        v: (batch, seqlen_k, nheads_k, headdim_v).
        causal: bottom-right aligned causal mask, see the module.
        softmax_scale: default 1 / sqrt(headdim).
        window_size: (left, right) keys around ``i + seqlen_k - seqlen_q``, inclusive, -1 = unlimited.
        softcap: scores become ``softcap * tanh(score / softcap)``; 0 = off.
        alibi_slopes: (nheads,) or (batch, nheads) float32; adds ``-slope * |i + seqlen_k - seqlen_q - j|``.
        attn_bias: float, broadcastable to (batch, nheads, seqlen_q, seqlen_k), added to the scores.
        relative_bias: float, broadcastable to (batch, nheads, seqlen_q + seqlen_k - 1): what is added to the score of
            query i and key j stands at ``j - i + seqlen_q - 1``, as in T5 (arXiv 1910.10683). No matrix of biases is in
            memory; of their gradients none on a CPU. Not together with attn_bias.
        attn_mask: bool, broadcastable to (batch, nheads, seqlen_q, seqlen_k), True = may attend.
        sinks: (nheads,) logits of one more column without a value in every softmax.
        dropout_p: probability of dropping an attention weight.
        rng_state: (2,) int64, seed and offset: the same mask every time; default: new ones from torch's generator.
        return_lse: also return the log-sum-exp of the scores.
        backend: "auto", or a name of ``available_backends()``, which then does it or raises.

    Returns:
        out (batch, seqlen_q, nheads, headdim_v) in q's dtype; with return_lse also lse (batch, nheads, seqlen_q),
        natural log, float32 (float64 for float64). A row that sees no key has out = 0, lse = -inf and gradients 0.
        Gradients flow to q, k, v, attn_bias, relative_bias and sinks, from out and from lse, to any order.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or range; the message names it.
        NotImplementedError: the forced backend, or every backend, lacks a feature of this call.
    """
    if backend in ("auto", "cpu") and dropout_p == 0.0 and rng_state is None and relative_bias is None:
        quick = plain.attention(
            plain.ROWS_FIRST, q, k, v, causal, softmax_scale, True, window_size, softcap, attn_bias, attn_mask,
            alibi_slopes, sinks, return_lse,
        )  # fmt: skip
        if quick is not None:
            return quick  # type: ignore[no-any-return]
    if torch.is_autocast_enabled("cpu"):
        q, k, v, attn_bias, relative_bias = ops.autocast(q, k, v, attn_bias, relative_bias)
    check_qkv(q, k, v)
    if relative_bias is not None:
        attn_bias = checked_relative_bias(relative_bias, attn_bias, q, k)
    args = AttentionArgs(
        q=q,
        k=k,
        v=v,
        softmax_scale=checked_scale(softmax_scale, q.shape[3]),
        causal=checked_causal(causal),
        window_size=checked_window(window_size),
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        attn_bias=attn_bias,
        bias_is_relative=relative_bias is not None,
        attn_mask=attn_mask,
        sinks=sinks,
        dropout_p=dropout_p,
        rng_state=ops.checked_rng_state(dropout_p, rng_state, q.device),
        return_lse=return_lse,
        needs_grad=ops.needs_grad(q, k, v, attn_bias, sinks),
    )
    if args.features():
        check_modifiers(args)
    out, lse = ops.attention(args, backend)
    return (out, lse) if return_lse else out  # type: ignore[return-value]  # lse is there when it is asked for
