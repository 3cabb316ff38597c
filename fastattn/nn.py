"""``MultiheadAttention``: torch.nn.MultiheadAttention's arguments, parameters and results, on our kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from fastattn import ops
from fastattn.args import top_left
from fastattn.attention import attention
from fastattn.backends.reference_dropout import dropout_keep
from fastattn.checks import check_like


def multi_head_attention(
    module: torch.nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The forward pass of ``module``, with the arguments of its own ``forward``.

    Args:
        module: whose parameters to use.
        query: (seqlen_q, batch, embed_dim); batch first if the module says so; without a batch (seqlen_q, embed_dim).
        key: (seqlen_k, batch, kdim), likewise.
        value: (seqlen_k, batch, vdim), likewise.
        key_padding_mask: (batch, seqlen_k), bool, True = ignore the key; or float, added to the scores.
        need_weights: also return the attention weights, which are otherwise never in memory.
        attn_mask: (seqlen_q, seqlen_k) or (batch * nheads, seqlen_q, seqlen_k), bool, True = may **not** attend; or
            float, added to the scores, with a gradient.
        average_attn_weights: mean of the weights over the heads.
        is_causal: a promise that attn_mask, which must be given, is the causal mask (corner top-left).

    Returns:
        The output in query's layout, and the weights (batch, seqlen_q, seqlen_k), per head
        (batch, nheads, seqlen_q, seqlen_k), after dropout as torch's; None without ``need_weights``.

    Raises:
        ValueError, TypeError: an argument's shape or dtype; the message names it.
    """
    _check_inputs(module, query, key, value, key_padding_mask)
    is_batched = query.dim() == 3
    self_attention = query is key is value
    if not is_batched:
        query, key, value = (x[None] for x in (query, key, value))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
    batch_first = module.batch_first or not is_batched
    q, k, v = _projections(
        module, query, key, value, self_attention
    )  # as they came in, (.., .., nheads * headdim)
    q, k, v = (_heads_of(module, x, batch_first) for x in (q, k, v))  # (batch, seqlen, nheads, headdim)
    masks = _masks(module, q, k, key_padding_mask, attn_mask, is_causal)
    k, v = _extra_keys(module, k, v)
    dropout_p = module.dropout if module.training else 0.0
    rng_state = ops.checked_rng_state(dropout_p, None, q.device)
    keys = masks.keys
    out = attention(
        q, k[:, :keys], v[:, :keys], causal=masks.causal, window_size=masks.window_size, attn_bias=masks.bias,
        attn_mask=masks.mask, dropout_p=dropout_p, rng_state=rng_state, return_lse=need_weights,
    )  # fmt: skip
    weights = None
    if need_weights:
        out, lse = out
        weights = _weights(q, k, lse, masks, dropout_p, rng_state)  # (batch, nheads, seqlen_q, seqlen_k)
        weights = weights.mean(dim=1) if average_attn_weights else weights
        weights = weights if is_batched else weights[0]
    assert isinstance(out, Tensor)
    out = out if batch_first else out.transpose(0, 1)
    out = linear(out.flatten(2), module.out_proj.weight, module.out_proj.bias)
    return (out if is_batched else out[0]), weights


class MultiheadAttention(torch.nn.MultiheadAttention):
    """Multi-head attention (arXiv 1706.03762) with the constructor and state_dict of ``torch.nn.MultiheadAttention``.

    What differs: a query that sees no key has attention output 0 and weights 0, never NaN; ``need_weights`` changes
    nothing about the output, which comes from the fused kernel either way; ``is_causal`` is honoured together with
    ``key_padding_mask`` too.
    """

    forward = multi_head_attention


class _Masks(NamedTuple):
    """What hides keys, in the terms of ``attention``; beyond ``keys`` nobody sees any."""

    mask: Tensor | None = None  # broadcastable to (batch, nheads, seqlen_q, seqlen_k), True = may attend
    bias: Tensor | None = None  # the same, float
    keys: int | None = None
    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)


def _check_inputs(
    module: torch.nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None
) -> None:
    widths = (module.embed_dim, module.kdim, module.vdim)
    if query.is_nested or key.is_nested or value.is_nested:
        raise TypeError("query, key, value: expected dense tensors, got a nested one")
    if query.dim() not in (2, 3):
        raise ValueError(f"query: expected 2 or 3 dimensions, got {tuple(query.shape)}")
    for name, x, width in zip(("query", "key", "value"), (query, key, value), widths):
        if x.dim() != query.dim() or x.shape[-1] != width:
            raise ValueError(
                f"{name}: expected {query.dim()} dimensions, the last of {width}, got {tuple(x.shape)}"
            )
    if key.shape[:-1] != value.shape[:-1]:
        raise ValueError(f"value: expected (*{tuple(key.shape[:-1])}, {widths[2]}), got {tuple(value.shape)}")
    lead = () if query.dim() == 2 else (query.shape[0 if module.batch_first else 1],)
    if lead and key.shape[0 if module.batch_first else 1] != lead[0]:
        raise ValueError(f"key: expected batch={lead[0]}, got {tuple(key.shape)}")
    if padding is not None:
        seqlen_k = key.shape[1 if module.batch_first and query.dim() == 3 else 0]
        if tuple(padding.shape) != (*lead, seqlen_k):
            raise ValueError(f"key_padding_mask: expected {(*lead, seqlen_k)}, got {tuple(padding.shape)}")


def _projections(
    module: torch.nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, self_attention: bool
) -> tuple[Tensor, ...]:
    biases = module.in_proj_bias
    if module.in_proj_weight is None:
        weights: Any = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    elif self_attention:
        return linear(query, module.in_proj_weight, biases).chunk(3, dim=-1)
    else:
        weights = module.in_proj_weight.chunk(3)
    parts = (None, None, None) if biases is None else biases.chunk(3)
    return tuple(linear(x, w, b) for x, w, b in zip((query, key, value), weights, parts))


def _heads_of(module: torch.nn.MultiheadAttention, x: Tensor, batch_first: bool) -> Tensor:
    x = x.unflatten(-1, (module.num_heads, module.head_dim))  # type: ignore[no-untyped-call]
    return x if batch_first else x.transpose(0, 1)


def _extra_keys(module: torch.nn.MultiheadAttention, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """``add_bias_kv``'s learnt key and value, and ``add_zero_attn``'s zeros, after the others."""
    batch, _, nheads, headdim = k.shape
    if module.bias_k is not None and module.bias_v is not None:
        one = (1, 1, nheads, headdim)
        k, v = (
            torch.cat([x, b.view(one).expand(batch, -1, -1, -1).to(x.dtype)], dim=1)
            for x, b in ((k, module.bias_k), (v, module.bias_v))
        )
    if module.add_zero_attn:
        k, v = (pad(x, (0, 0, 0, 0, 0, 1)) for x in (k, v))
    return k, v


def _masks(
    module: torch.nn.MultiheadAttention,
    q: Tensor,
    k: Tensor,
    padding: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
) -> _Masks:
    batch, seqlen_q, nheads, _ = q.shape
    seqlen_k = k.shape[1]
    extra = int(module.bias_k is not None) + int(module.add_zero_attn)
    if is_causal and attn_mask is None:
        raise ValueError("is_causal: expected False without attn_mask, of which it is a hint, got True")
    given: list[Tensor] = []
    if attn_mask is not None:
        shapes = ((seqlen_q, seqlen_k), (batch * nheads, seqlen_q, seqlen_k))
        if tuple(attn_mask.shape) not in shapes:
            raise ValueError(f"attn_mask: expected {shapes[0]} or {shapes[1]}, got {tuple(attn_mask.shape)}")
        if not is_causal or extra:
            given.append(attn_mask.view(-1, nheads if attn_mask.dim() == 3 else 1, seqlen_q, seqlen_k))
    if padding is not None:
        given.append(padding[:, None, None])  # (batch, 1, 1, seqlen_k)
    for name, x in (("key_padding_mask", padding), ("attn_mask", attn_mask)):
        if x is not None and not (x.dtype == torch.bool or x.is_floating_point()):
            raise TypeError(f"{name}: expected a bool or float dtype, got {x.dtype}")
        if x is not None and x.device != q.device:
            check_like(name, x.to(q.dtype), "query", q)
    given = [pad(x, (0, extra)) if extra else x for x in given]  # False and 0: the extra keys are seen
    bools, floats = ([x for x in given if (x.dtype == torch.bool) == kind] for kind in (True, False))
    hidden = bools[0] | bools[1] if len(bools) == 2 else (bools[0] if bools else None)
    bias = floats[0] + floats[1] if len(floats) == 2 else (floats[0] if floats else None)
    masks = _Masks(None if hidden is None else ~hidden, bias)
    if not is_causal or extra:
        return masks
    keys, causal, window = top_left(seqlen_q, seqlen_k)
    mask, bias = (None if x is None else x[..., :keys] for x in (masks.mask, masks.bias))
    return _Masks(mask, bias, keys, causal, window)


def _weights(
    q: Tensor, k: Tensor, lse: Tensor, masks: _Masks, dropout_p: float, rng_state: Tensor | None
) -> Tensor:
    """(batch, nheads, seqlen_q, seqlen_k): what the kernel weighed the values with, from its log-sum-exp."""
    batch, seqlen_q, nheads, headdim = q.shape
    seqlen_k, dtype = k.shape[1], q.dtype
    keys = seqlen_k if masks.keys is None else masks.keys
    q, k = q.to(lse.dtype), k[:, :keys].to(lse.dtype)  # rounded scores would not cancel against lse
    scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * headdim**-0.5  # (batch, nheads, seqlen_q, keys)
    if masks.bias is not None:
        scores = scores + masks.bias
    if masks.mask is not None:
        scores = scores.masked_fill(~masks.mask, -torch.inf)
    if masks.keys is not None:
        corner = torch.ones(seqlen_q, keys, dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~corner, -torch.inf)
    # A query that sees nothing has lse = -inf: of +inf no score is left.
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    weights = torch.exp(scores - lse[..., None])
    if rng_state is not None:
        keep = dropout_keep(rng_state, batch, nheads, seqlen_q, keys, dropout_p)
        weights = weights * keep * (1 / (1 - dropout_p) if dropout_p < 1 else 0.0)
    return pad(weights, (0, seqlen_k - keys)).to(dtype)
