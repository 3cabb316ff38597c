"""What the attention kernels share: where rows and keys lie, what becomes of a score, online softmax, dropout.

Scores are kept in base 2 (multiplied by log2 e), so that exp2 is the only exponential. Optional tensors arrive as
None, which the compiler knows: a feature that is not used leaves no code behind.
"""

from typing import NamedTuple

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
DROPOUT_DOMAIN: tl.constexpr = tl.constexpr(0x64726F70)  # csrc/rng.h, kDropoutDomain


class Rows(NamedTuple):
    """The rows of a tile: with GQA packing several heads of one query lie side by side."""

    i: tl.tensor  # (ROWS,) int32, the query within its sequence
    head: tl.tensor  # (ROWS,) int32
    inside: tl.tensor  # (ROWS,) bool
    first: tl.tensor  # smallest i of the tile
    last: tl.tensor  # largest i of the tile that exists


class Sequence(NamedTuple):
    """One sequence of the batch."""

    q_first: tl.tensor  # int64, the row of q where its queries begin
    seqlen_q: tl.tensor
    seqlen_k: tl.tensor
    k_first: tl.tensor  # int64, the row of k and v (of the pages' list, if paged) where its keys begin
    kv_batch: tl.tensor  # int64, the batch row of k and v


class Modifiers(NamedTuple):
    """What becomes of a score between q.k and softmax; rows of pointers where it depends on the row."""

    scale: tl.tensor  # softmax_scale
    softcap: tl.tensor  # or None
    slope: tl.tensor  # (ROWS,) times log2 e, or None
    bias: tl.tensor  # (ROWS,) pointers, or None
    bias_key: tl.tensor  # stride
    mask: tl.tensor  # (ROWS,) pointers to bytes, or None
    mask_key: tl.tensor
    left: tl.tensor  # or None
    right: tl.tensor  # or None


class State(NamedTuple):
    """Online softmax (Milakov & Gimelshein, arXiv 1805.02867) of a tile of rows."""

    top: tl.tensor  # (ROWS,) largest score so far, base 2
    total: tl.tensor  # (ROWS,) sum of exp2(score - top)
    acc: tl.tensor  # (ROWS, BLOCK_DV) sum of exp2(score - top) * v


class Dropout(NamedTuple):
    """Philox key and threshold: csrc/rng.h says which word decides."""

    low: tl.tensor  # uint32
    high: tl.tensor
    threshold: tl.tensor  # uint32, words below are dropped
    head: tl.tensor  # (ROWS,) uint32, batch * nheads + head


@triton.jit
def sequence_of(b, cu_seqlens_q, cu_seqlens_k, seqlens_k, leftpad, batch_idx, seqlen_q, seqlen_k):
    """Sequence number ``b`` of a call; the sizes given are those of a call whose sequences are all alike."""
    q_first = tl.zeros([], tl.int64)
    k_first = tl.zeros([], tl.int64)
    kv_batch = b.to(tl.int64)
    if cu_seqlens_q is not None:
        begin = tl.load(cu_seqlens_q + b)
        q_first = begin.to(tl.int64)
        seqlen_q = tl.load(cu_seqlens_q + b + 1) - begin
    if cu_seqlens_k is not None:
        begin = tl.load(cu_seqlens_k + b)
        k_first = begin.to(tl.int64)
        seqlen_k = tl.load(cu_seqlens_k + b + 1) - begin
        kv_batch = tl.zeros([], tl.int64)
    else:
        if seqlens_k is not None:
            seqlen_k = tl.load(seqlens_k + b)
        if leftpad is not None:
            begin = tl.load(leftpad + b)
            k_first = begin.to(tl.int64)
            seqlen_k = tl.maximum(seqlen_k - begin, 0)
        if batch_idx is not None:
            kv_batch = tl.load(batch_idx + b).to(tl.int64)
    return Sequence(q_first, seqlen_q, seqlen_k, k_first, kv_batch)


@triton.jit
def rows_of(tile, kv_head, seqlen_q, BLOCK_M: tl.constexpr, GROUP: tl.constexpr):
    """Rows ``tile * BLOCK_M ...`` of the (query, head of the group) pairs that share a KV head."""
    first = tile * BLOCK_M
    r = first + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    i = r // GROUP
    last = tl.minimum((first + BLOCK_M - 1) // GROUP, seqlen_q - 1)
    return Rows(i, kv_head * GROUP + r % GROUP, i < seqlen_q, first // GROUP, last)


@triton.jit
def slopes_of(b, rows, slopes, slopes_batch):
    """(ROWS,) ALiBi slopes, times log2 e."""
    return tl.load(slopes + b * slopes_batch + rows.head, mask=rows.inside, other=0.0) * LOG2E


@triton.jit
def row_pointers(x, b, rows, stride_batch, stride_head, stride_row):
    """(ROWS,) pointers into a (batch, nheads, seqlen_q, seqlen_k) tensor."""
    return x + (
        b.to(tl.int64) * stride_batch
        + rows.head.to(tl.int64) * stride_head
        + rows.i.to(tl.int64) * stride_row
    )


@triton.jit
def key_rows(seq, table, j, inside, page_size, stride_batch, stride_row):
    """Offsets (KEYS,) int64 of keys ``j`` in k or v; ``table`` is the sequence's list of pages, or None."""
    place = seq.k_first + j
    if table is not None:
        page = tl.load(table + place // page_size, mask=inside, other=0).to(tl.int64)
        return page * stride_batch + place % page_size * stride_row
    return seq.kv_batch * stride_batch + place * stride_row


@triton.jit
def load_rows(
    base, offsets, inside, headdim, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr, MASKED: tl.constexpr
):
    """(ROWS, BLOCK_D) from unit-stride rows at ``base + offsets``, zeros outside."""
    d = tl.arange(0, BLOCK_D)
    at = base + offsets[:, None] + d[None, :]
    if MASKED and EVEN_D:
        return tl.load(at, mask=inside[:, None], other=0.0)
    if MASKED:
        return tl.load(at, mask=inside[:, None] & (d < headdim)[None, :], other=0.0)
    if EVEN_D:
        return tl.load(at)
    return tl.load(at, mask=(d < headdim)[None, :], other=0.0)


@triton.jit
def tanh(x):
    """Within 2 units of the last place of 1; the odd series keeps small arguments exact."""
    t = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    far = (1.0 - t) / (1.0 + t)
    far = tl.where(x < 0, -far, far)
    x2 = x * x
    series = x * (
        1.0 + x2 * (-1 / 3 + x2 * (2 / 15 + x2 * (-17 / 315 + x2 * (62 / 2835 + x2 * (-1382 / 155925)))))
    )
    return tl.where(x2 < 0.09, series, far)


@triton.jit
def modify(s, rows, seq, j, modifiers, MASKED: tl.constexpr):
    """From q.k (ROWS, KEYS) to scores in base 2, -inf where not visible; and with softcap d score / d (scale q.k).

    Not MASKED: the caller knows that every key is inside the sequence and the window.
    """
    derivative = s  # without softcap nobody reads it
    if modifiers.softcap is not None:
        t = tanh(s * (modifiers.scale / modifiers.softcap))
        derivative = 1.0 - t * t
        s = t * (modifiers.softcap * LOG2E)
    else:
        s = s * (modifiers.scale * LOG2E)
    offset = seq.seqlen_k - seq.seqlen_q
    ok = rows.inside[:, None] & (j < seq.seqlen_k)[None, :]
    if modifiers.bias is not None:
        at = modifiers.bias[:, None] + j.to(tl.int64)[None, :] * modifiers.bias_key
        s += tl.load(at, mask=ok, other=0.0).to(tl.float32) * LOG2E
    if modifiers.slope is not None:
        distance = rows.i[:, None] + offset - j[None, :]
        s -= modifiers.slope[:, None] * tl.abs(distance).to(tl.float32)
    if modifiers.mask is not None:
        at = modifiers.mask[:, None] + j.to(tl.int64)[None, :] * modifiers.mask_key
        ok = ok & (tl.load(at, mask=ok, other=0) != 0)
    if MASKED:
        distance = rows.i[:, None] + offset - j[None, :]
        if modifiers.left is not None:
            ok = ok & (distance <= modifiers.left)
        if modifiers.right is not None:
            ok = ok & (distance >= -modifiers.right)
    if MASKED or modifiers.mask is not None:
        s = tl.where(ok, s, float("-inf"))
    return s, derivative


@triton.jit
def key_range(rows, seq, left, right, first_key, last_key, BLOCK_N: tl.constexpr):
    """Keys that a tile of rows sees within [first_key, last_key): [begin, end), in blocks from ``begin`` on.

    Blocks in [full_begin, full_end) need no mask. first_key is a multiple of BLOCK_N.
    """
    offset = seq.seqlen_k - seq.seqlen_q
    begin = first_key
    full_begin = first_key
    end = tl.minimum(last_key, seq.seqlen_k)
    full_end = end
    if right is not None:
        end = tl.minimum(end, rows.last + offset + right + 1)
        full_end = tl.minimum(full_end, rows.first + offset + right + 1)
    if left is not None:
        begin = tl.maximum(begin, tl.maximum(rows.first + offset - left, 0) // BLOCK_N * BLOCK_N)
        full_begin = tl.maximum(
            begin, (tl.maximum(rows.last + offset - left, 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
        )
    end = tl.maximum(end, begin)
    full_begin = tl.minimum(full_begin, end)
    full_end = tl.maximum(tl.maximum(full_end, 0) // BLOCK_N * BLOCK_N, full_begin)
    return begin, full_begin, full_end, end


@triton.jit
def query_range(first_key, seq, left, right, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Blocks of queries that see a block of keys: [begin, end), the whole block if no mask applies."""
    offset = seq.seqlen_k - seq.seqlen_q
    begin = 0
    end = seq.seqlen_q
    if right is not None:  # i >= j - offset - right
        begin = tl.maximum(first_key - offset - right, 0) // BLOCK_M * BLOCK_M
    if left is not None:  # i <= j - offset + left
        end = tl.minimum(end, first_key + BLOCK_N - offset + left)
    return begin, end


@triton.jit
def dropout_of(b, nheads, rows, rng_state, threshold):
    """The key of a call from ``rng_state (2,)`` int64, seed and offset."""
    offset = tl.load(rng_state + 1).to(tl.uint64, bitcast=True)
    zero = tl.zeros([], tl.uint32)
    low, high, _, _ = tl.philox(
        tl.load(rng_state).to(tl.uint64, bitcast=True),
        (offset & 0xFFFFFFFF).to(tl.uint32),
        (offset >> 32).to(tl.uint32),
        zero,
        zero + DROPOUT_DOMAIN,
    )
    return Dropout(low, high, threshold.to(tl.uint32, bitcast=True), (b * nheads + rows.head).to(tl.uint32))


@triton.jit
def dropout_keep(dropout, rows, first_key, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(BLOCK_M, BLOCK_N) bool, True = kept, of keys ``first_key ...``, a multiple of 4: one Philox block for four."""
    block = (first_key // 4 + tl.arange(0, BLOCK_N // 4)).to(tl.uint32)  # (BLOCK_N / 4,)
    zero = tl.zeros([BLOCK_M, BLOCK_N // 4], tl.uint32)
    seed = dropout.low.to(tl.uint64) | (dropout.high.to(tl.uint64) << 32)
    w0, w1, w2, w3 = tl.philox(
        seed,
        zero + block[None, :],
        zero + rows.i.to(tl.uint32)[:, None],
        zero + dropout.head[:, None],
        zero + DROPOUT_DOMAIN,
    )
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [BLOCK_M, BLOCK_N])
    return words >= dropout.threshold


@triton.jit
def softmax_step(state, s, v, keep, PRECISION: tl.constexpr):
    """One block of scores (ROWS, KEYS) and values (KEYS, BLOCK_DV); ``keep`` (ROWS, KEYS) or None."""
    top = tl.maximum(state.top, tl.max(s, 1))
    safe = tl.where(top == float("-inf"), 0.0, top)  # a row that has seen nothing yet
    p = tl.exp2(s - safe[:, None])
    shrink = tl.exp2(state.top - safe)
    total = state.total * shrink + tl.sum(p, 1)
    if keep is not None:
        p = tl.where(keep, p, 0.0)
    acc = state.acc * shrink[:, None]
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return State(top, total, acc)


@triton.jit
def add_sink(state, sink):
    """One more column with logit ``sink`` (ROWS,) in the denominator, without a value."""
    sink = sink * LOG2E
    top = tl.maximum(state.top, sink)
    safe = tl.where(top == float("-inf"), 0.0, top)
    shrink = tl.exp2(state.top - safe)
    total = state.total * shrink + tl.exp2(sink - safe)
    return State(top, total, state.acc * shrink[:, None])


@triton.jit
def finish(state, scale):
    """``out (ROWS, BLOCK_DV)`` and ``lse (ROWS,)``, natural log; a row that saw nothing: 0 and -inf."""
    nothing = state.total == 0.0
    total = tl.where(nothing, 1.0, state.total)
    out = state.acc * (scale / total)[:, None]
    lse = tl.where(nothing, float("-inf"), (state.top + tl.log2(total)) * LN2)
    return out, lse
