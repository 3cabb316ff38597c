"""The seven functions of flash_attn 2.8, by their names, arguments and return values, on this library's kernels.

=================================  ======================================================
``flash_attn_func``                q, k, v (batch, seqlen, nheads, headdim)
``flash_attn_qkvpacked_func``      qkv (batch, seqlen, 3, nheads, headdim)
``flash_attn_kvpacked_func``       q, and kv (batch, seqlen_k, 2, nheads_k, headdim)
``flash_attn_varlen_func``         q, k, v (total, nheads, headdim) and cu_seqlens
``flash_attn_varlen_qkvpacked_func``  qkv (total, 3, nheads, headdim)
``flash_attn_varlen_kvpacked_func``   q, and kv (total_k, 2, nheads_k, headdim)
``flash_attn_with_kvcache``        a cache that grows in place, see ``fastattn.attention_with_kvcache``
=================================  ======================================================

Facts from flash_attn's public interface (Dao-AILab/flash-attention, flash_attn_interface.py). What differs: it runs on
a CPU, in float32 and float64 too, for any head dimension up to 512, and is always deterministic; no probability is
dropped in two different ways on two machines. As there, a row that sees no key has out = 0 and lse = +inf, and with
``return_attn_probs`` a call returns ``(out, softmax_lse, S_dmask)``: S_dmask (batch, nheads, seqlen_q, seqlen_k, both
rounded up to 128), the probabilities before dropout, negative where dropout dropped; without dropout a tensor of no
elements.
"""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from fastattn import ops
from fastattn.attention import attention
from fastattn.backends.reference_dropout import dropout_keep
from fastattn.checks import check_range
from fastattn.kvcache import attention_with_kvcache
from fastattn.varlen import attention_varlen

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

Result = Any  # out; or (out, softmax_lse, S_dmask) with return_attn_probs


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """``fastattn.attention``; q (batch, seqlen_q, nheads, headdim), k, v (batch, seqlen_k, nheads_k, headdim)."""
    rng_state = _rng_state(dropout_p)
    call = _modifiers(causal, softmax_scale, window_size, softcap, alibi_slopes)
    if not return_attn_probs:
        return attention(q, k, v, dropout_p=dropout_p, rng_state=rng_state, **call)
    out, lse = _pair(attention(q, k, v, dropout_p=dropout_p, rng_state=rng_state, return_lse=True, **call))
    return out, _their_lse(lse), _dropped_probabilities(q, k, dropout_p, rng_state, call)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """``flash_attn_func`` of q and kv (batch, seqlen_k, 2, nheads_k, headdim)."""
    k, v = _unpack("kv", kv, 5, 2)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """``flash_attn_func`` of qkv (batch, seqlen, 3, nheads, headdim)."""
    q, k, v = _unpack("qkv", qkv, 5, 3)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Result:
    """``fastattn.attention_varlen``; softmax_lse (nheads, total_q). S_dmask is of sequences padded to the longest."""
    rng_state = _rng_state(dropout_p)
    call = _modifiers(causal, softmax_scale, window_size, softcap, alibi_slopes)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    given: dict[str, Any] = {
        "dropout_p": dropout_p,
        "rng_state": rng_state,
        "block_table": block_table,
        **call,
    }
    if not return_attn_probs:
        return attention_varlen(q, k, v, *lengths, **given)
    out, lse = _pair(attention_varlen(q, k, v, *lengths, return_lse=True, **given))
    probs = q.new_empty(0)
    if rng_state is not None:
        probs = _varlen_probabilities(q, k, lengths, block_table, dropout_p, rng_state, call)
    return out, _their_lse(lse), probs


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """``flash_attn_varlen_func`` of q and kv (total_k, 2, nheads_k, headdim)."""
    k, v = _unpack("kv", kv, 4, 2)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """``flash_attn_varlen_func`` of qkv (total, 3, nheads, headdim)."""
    q, k, v = _unpack("qkv", qkv, 4, 3)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """``fastattn.attention_with_kvcache``: out, with return_softmax_lse also softmax_lse (batch, nheads, seqlen_q)."""
    result = attention_with_kvcache(
        q,
        k_cache,
        v_cache,
        k,
        v,
        cache_seqlens=cache_seqlens,
        block_table=block_table,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        rotary_interleaved=rotary_interleaved,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        num_splits=num_splits,
        return_lse=return_softmax_lse,
        **_modifiers(causal, softmax_scale, window_size, softcap, alibi_slopes),
    )
    if not return_softmax_lse:
        return result
    out, lse = _pair(result)
    return out, _their_lse(lse)


def _modifiers(
    causal: bool,
    softmax_scale: float | None,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
) -> dict[str, Any]:
    """What all seven take. Any negative number switches a window or the softcap off there; here -1 and 0 do."""
    window: Any = window_size  # what is none is refused further down
    if isinstance(window, (tuple, list)):
        window = tuple(max(n, -1) if isinstance(n, Integral) else n for n in window)
    return {
        "causal": causal,
        "softmax_scale": softmax_scale,
        "window_size": window,
        "softcap": 0.0 if isinstance(softcap, Real) and softcap < 0 else softcap,
        "alibi_slopes": alibi_slopes,
    }


def _rng_state(dropout_p: float) -> Tensor | None:
    check_range("dropout_p", dropout_p, 0.0, 1.0)
    return ops.new_rng_state() if dropout_p > 0 else None


def _pair(result: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    assert isinstance(result, tuple)
    return result


def _unpack(name: str, packed: Tensor, dims: int, parts: int) -> tuple[Tensor, ...]:
    if not isinstance(packed, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(packed).__name__}")
    if packed.dim() != dims or packed.shape[-3] != parts:
        lead = "(batch, seqlen, " if dims == 5 else "(total, "
        raise ValueError(f"{name}: expected {lead}{parts}, nheads, headdim), got {tuple(packed.shape)}")
    return packed.unbind(-3)


def _their_lse(lse: Tensor) -> Tensor:
    """+inf, not -inf, for rows that see no key."""
    return lse.masked_fill(lse == -math.inf, math.inf)


def _probabilities(q: Tensor, k: Tensor, call: dict[str, Any]) -> Tensor:
    """(batch, nheads, seqlen_q, seqlen_k) of q, k (batch, seqlen, heads, headdim), materialised.

    Probabilities are attention to the identity: every key's weight comes out in a dimension of its own.
    """
    batch, seqlen_k, nheads_k, _ = k.shape
    eye = torch.eye(seqlen_k, dtype=q.dtype).view(1, seqlen_k, 1, seqlen_k).expand(batch, -1, nheads_k, -1)
    parts = [
        attention(q, k, part.contiguous(), **call)
        for part in eye.split(512, dim=-1)  # type: ignore[no-untyped-call]
    ]  # each (batch, seqlen_q, nheads, at most 512)
    if not parts:
        return q.new_zeros((batch, q.shape[2], q.shape[1], 0))
    return torch.cat([x if isinstance(x, Tensor) else x[0] for x in parts], dim=-1).transpose(1, 2)


def _signed(probs: Tensor, keep: Tensor) -> Tensor:
    """Negative where dropped, both sizes rounded up to 128 as the CUDA kernels lay them out."""
    rounded = [-(-n // 128) * 128 for n in probs.shape[2:]]
    signed = probs.new_zeros((*probs.shape[:2], *rounded))
    signed[..., : probs.shape[2], : probs.shape[3]] = torch.where(keep, probs, -probs)
    return signed


def _dropped_probabilities(
    q: Tensor, k: Tensor, dropout_p: float, rng_state: Tensor | None, call: dict[str, Any]
) -> Tensor:
    if rng_state is None:
        return q.new_empty(0)
    with torch.no_grad():
        probs = _probabilities(q, k, call)
        batch, nheads, seqlen_q, seqlen_k = probs.shape
        return _signed(probs, dropout_keep(rng_state, batch, nheads, seqlen_q, seqlen_k, dropout_p))


def _varlen_probabilities(
    q: Tensor,
    k: Tensor,
    lengths: tuple[Tensor, Tensor, int, int],
    block_table: Tensor | None,
    dropout_p: float,
    rng_state: Tensor,
    call: dict[str, Any],
) -> Tensor:
    cu_q, cu_k, max_q, max_k = lengths
    batch, nheads = len(cu_q) - 1, q.shape[1]
    probs = q.new_zeros((batch, nheads, max_q, max_k))
    slopes = call["alibi_slopes"]
    with torch.no_grad():
        for b in range(batch):
            rows, keys = slice(int(cu_q[b]), int(cu_q[b + 1])), slice(int(cu_k[b]), int(cu_k[b + 1]))
            if block_table is None:
                own_k = k[keys]
            else:
                seqlen_k = keys.stop - keys.start
                pages = block_table[b, : -(-seqlen_k // k.shape[1])].long()
                own_k = k[pages].flatten(0, 1)[:seqlen_k]  # (seqlen_k, nheads_k, headdim)
            own = {**call, "alibi_slopes": slopes[b] if slopes is not None and slopes.dim() == 2 else slopes}
            one = _probabilities(q[None, rows], own_k[None], own)
            probs[b, :, : one.shape[2], : one.shape[3]] = one[0]
        return _signed(probs, dropout_keep(rng_state, batch, nheads, max_q, max_k, dropout_p))
