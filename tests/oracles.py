"""Float64 truth, written apart from the library: numpy, an explicit mask, one head of one batch row at a time."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastattn.linear import PackedLinear

MASK = np.uint64(0xFFFFFFFF)


def attention64(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    seqlens_k: list[int] | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    attn_bias: Tensor | None = None,
    attn_mask: Tensor | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``out (batch, seqlen_q, nheads, headdim_v)`` and ``lse (batch, nheads, seqlen_q)``, float64."""
    batch, seqlen_q, nheads, headdim = q.shape
    group = nheads // k.shape[2]
    scale = headdim**-0.5 if softmax_scale is None else softmax_scale
    out = np.zeros((batch, seqlen_q, nheads, v.shape[3]))
    lse = np.full((batch, nheads, seqlen_q), -np.inf)
    full = (batch, nheads, seqlen_q, k.shape[1])
    bias = None if attn_bias is None else attn_bias.double().expand(full).numpy()
    mask = None if attn_mask is None else attn_mask.expand(full).numpy()
    for b in range(batch):
        used = k.shape[1] if seqlens_k is None else seqlens_k[b]
        if seqlen_q == 0 or (used == 0 and sinks is None):
            continue
        for h in range(nheads):
            qh = q[b, :, h].double().numpy()
            kh = k[b, :used, h // group].double().numpy()
            vh = v[b, :used, h // group].double().numpy()
            scores = scale * (qh @ kh.T)
            distance = np.arange(seqlen_q)[:, None] + used - seqlen_q - np.arange(used)[None, :]
            if softcap:
                scores = softcap * np.tanh(scores / softcap)
            if bias is not None:
                scores = scores + bias[b, h, :, :used]
            if alibi_slopes is not None:
                slope = alibi_slopes[h] if alibi_slopes.dim() == 1 else alibi_slopes[b, h]
                scores = scores - float(slope) * np.abs(distance)
            banned = np.zeros(scores.shape, bool)
            left, right = window_size
            if causal:
                banned |= distance < 0
            if left >= 0:
                banned |= distance > left
            if right >= 0:
                banned |= distance < -right
            if mask is not None:
                banned |= ~mask[b, h, :, :used]
            scores[banned] = -np.inf
            top = scores.max(axis=1, initial=-np.inf)
            if sinks is not None:
                top = np.maximum(top, float(sinks[h]))
            safe = np.where(np.isfinite(top), top, 0.0)
            weights = np.exp(scores - safe[:, None])
            total = weights.sum(axis=1)
            if sinks is not None:
                total = total + np.exp(float(sinks[h]) - safe)
            seen = total > 0
            out[b, seen, h] = weights[seen] @ vh / total[seen, None]
            lse[b, h, seen] = safe[seen] + np.log(total[seen])
    return torch.from_numpy(out), torch.from_numpy(lse)


def philox(counter, key):
    """Philox4x32-10 in numpy, 32-bit words in uint64."""
    c, k = [np.asarray(x, np.uint64) for x in counter], [np.uint64(x) for x in key]
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(b >> np.uint64(32)) ^ c[1] ^ k[0], b & MASK, (a >> np.uint64(32)) ^ c[3] ^ k[1], a & MASK]
        k = [(k[0] + np.uint64(0x9E3779B9)) & MASK, (k[1] + np.uint64(0xBB67AE85)) & MASK]
    return c


def keep_oracle(state, batch, nheads, seqlen_q, seqlen_k, p):
    """Which probabilities csrc/rng.h keeps, (batch, nheads, seqlen_q, seqlen_k) bool."""
    seed, offset = (int(x) % 2**64 for x in state)
    zero, domain = np.uint64(0), np.uint64(0x64726F70)
    call = philox((offset % 2**32, offset >> 32, zero, domain), (seed % 2**32, seed >> 32))[:2]
    head, i, block = np.meshgrid(
        np.arange(batch * nheads), np.arange(seqlen_q), np.arange((seqlen_k + 3) // 4), indexing="ij"
    )
    words = np.stack(philox((block, i, head, np.full_like(block, int(domain))), call), -1)
    words = words.reshape(batch, nheads, seqlen_q, (seqlen_k + 3) // 4 * 4)[..., :seqlen_k]
    return torch.from_numpy(words >= int(p * 2**32))


def attention_same_dtype(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
    """What a PyTorch user would write by hand, all of it in q's dtype: the yardstick of the tolerance rule."""
    group = q.shape[2] // k.shape[2]
    qt = q.transpose(1, 2)
    kt, vt = (x.transpose(1, 2).repeat_interleave(group, dim=1) for x in (k, v))
    scores = (qt @ kt.transpose(-1, -2)) * q.shape[3] ** -0.5
    if causal:
        seqlen_q, seqlen_k = scores.shape[-2:]
        visible = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool).tril(seqlen_k - seqlen_q)
        scores = scores.masked_fill(~visible, float("-inf"))
    return (torch.softmax(scores, dim=-1).nan_to_num(0.0) @ vt).transpose(1, 2)


def weight_of(linear: PackedLinear) -> Tensor:
    """(out, in) float32, read back through the layer itself: products with the identity are exact."""
    zero = linear(torch.zeros(1, linear.in_features))
    return (linear(torch.eye(linear.in_features)) - zero).T
