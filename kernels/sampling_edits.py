"""Penalties, bias and mask: a copy of the rows with every logit edited, which sampling then reads in place of them.

One launch goes over the vocabulary, and a second, where tokens come in lists, over those: it writes them anew. Every
token of the lists has one program that writes it; the end of the first launch is the only barrier.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels.launch import per_row, strides, tuned

CONFIGS = [
    {"BLOCK": 1024, "num_warps": 4, "num_stages": 1},
    {"BLOCK": 512, "num_warps": 4, "num_stages": 1},
    {"BLOCK": 2048, "num_warps": 8, "num_stages": 1},
]
LISTED_CONFIGS = [
    {"BLOCK": 128, "num_warps": 4, "num_stages": 1},
    {"BLOCK": 256, "num_warps": 4, "num_stages": 1},
]


class Penalties(NamedTuple):
    """Of one row, float64; csrc/logit_edits.h."""

    repetition: tl.tensor
    presence: tl.tensor
    frequency: tl.tensor


class Dense(NamedTuple):
    """What the rows have for every token; each pointer may be None. A kernel makes it: Triton 3.6 returns no None."""

    row: tl.tensor
    counts: tl.tensor  # pointer to (batch, vocab) int32, how often a row has written each
    prompt: tl.tensor  # to bytes, 1 = it has read it
    bias: tl.tensor  # to float32 or float64
    allowed: tl.tensor  # to bytes, 1 = may be drawn; or to int32 words, a bit each
    counts_row: tl.tensor  # strides
    prompt_row: tl.tensor
    bias_row: tl.tensor
    allowed_row: tl.tensor


class Listed(NamedTuple):
    """Tokens of one row by ascending id, the first n of a list; or None."""

    ids: tl.tensor  # pointer to int32 or int64
    numbers: tl.tensor
    n: tl.tensor


@triton.jit
def penalties_of(row, repetition, presence, frequency, repetition_row, presence_row, frequency_row):
    """The three numbers of a row."""
    return Penalties(
        tl.load(repetition + row * repetition_row),
        tl.load(presence + row * presence_row),
        tl.load(frequency + row * frequency_row),
    )


@triton.jit
def count_below(listed, bound):
    """(BLOCK,) int32, how many of a list's ids are below ``bound (BLOCK,)``."""
    low = tl.zeros_like(bound).to(tl.int32)
    open = listed.n
    while open > 1:
        half = open // 2
        low += tl.where(tl.load(listed.ids + low + half - 1) < bound, half, 0)
        open -= half
    last = tl.load(listed.ids + low, mask=low < listed.n, other=0)
    return low + ((low < listed.n) & (last < bound)).to(tl.int32)


@triton.jit
def look_up(listed, ids, inside):
    """(BLOCK,) each: where in the list ``ids`` are, and whether they are there at all."""
    at = count_below(listed, ids)
    there = inside & (at < listed.n)
    return at, there & (tl.load(listed.ids + at, mask=there, other=-1) == ids)


@triton.jit
def marked(dense, ids, inside):
    """(BLOCK,) each: whether a token was read or written, and how often it was written."""
    count = tl.zeros_like(ids).to(tl.int32)
    is_seen = count > 0
    if dense.counts is not None:
        count = tl.load(dense.counts + dense.row * dense.counts_row + ids, mask=inside, other=0)
        is_seen = count > 0
    if dense.prompt is not None:
        is_seen = is_seen | (
            tl.load(dense.prompt + dense.row * dense.prompt_row + ids, mask=inside, other=0) != 0
        )
    return is_seen, count


@triton.jit
def dense_bias(dense, ids, inside):
    """(BLOCK,) float64."""
    bias = tl.zeros_like(ids).to(tl.float64)
    if dense.bias is not None:
        bias = tl.load(dense.bias + dense.row * dense.bias_row + ids, mask=inside, other=0.0).to(tl.float64)
    return bias


@triton.jit
def is_allowed(dense, ids, inside, PACKED: tl.constexpr):
    """(BLOCK,) bool."""
    allowed = inside
    if dense.allowed is not None:
        line = dense.allowed + dense.row * dense.allowed_row
        if PACKED:
            word = tl.load(line + ids // 32, mask=inside, other=0)
            allowed = (word >> (ids % 32).to(tl.int32)) & 1 != 0
        else:
            allowed = tl.load(line + ids, mask=inside, other=0) != 0
    return allowed


@triton.jit
def write(logits, edited, penalties, dense, ids, inside, is_seen, count, bias, PACKED: tl.constexpr):
    """The edited logits of ``ids (BLOCK,)``: in double, no operation fused, rounded once; csrc/logit_edits.h.

    NaN stays, allowed or not: sampling refuses a row that came with one.
    """
    x = tl.load(logits + ids, mask=inside, other=0.0).to(tl.float64)
    inverse = tl.full([], 1.0, tl.float64) / penalties.repetition
    scaled = x * tl.where(x > 0, inverse, penalties.repetition)
    written = scaled - penalties.frequency * count.to(tl.float64) - penalties.presence
    value = tl.where(is_seen, tl.where(count > 0, written, scaled), x) + bias
    value = tl.where(is_allowed(dense, ids, inside, PACKED) | (x != x), value, float("-inf"))
    tl.store(edited + ids, value.to(tl.float32), mask=inside)


@tuned(CONFIGS, key=["vocab"], enable_fp_fusion=False)
@triton.jit(do_not_specialize=["vocab", "repetition_row", "presence_row", "frequency_row"])
def edit_kernel(
    logits, edited, repetition, presence, frequency, counts, prompt, bias, allowed,
    logits_row, repetition_row, presence_row, frequency_row, counts_row, prompt_row, bias_row, allowed_row, vocab,
    PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row and block of tokens; edited (batch, vocab) float32."""
    row = tl.program_id(0).to(tl.int64)
    penalties = penalties_of(
        row, repetition, presence, frequency, repetition_row, presence_row, frequency_row
    )
    dense = Dense(row, counts, prompt, bias, allowed, counts_row, prompt_row, bias_row, allowed_row)
    ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = ids < vocab
    is_seen, count = marked(dense, ids, inside)
    added = dense_bias(dense, ids, inside)
    write(
        logits + row * logits_row, edited + row * vocab, penalties, dense, ids, inside, is_seen, count, added, PACKED
    )  # fmt: skip


@triton.jit
def sum_of_run(listed, i, leads, ids):
    """(BLOCK,) float64: the values of a token's entries, added up in their order, by the first of them."""
    total = tl.zeros_like(i).to(tl.float64)
    same = leads
    while tl.max(same.to(tl.int32), 0) != 0:
        total += tl.load(listed.numbers + i, mask=same, other=0.0).to(tl.float64)
        i += 1
        same = same & (i < listed.n)
        same = same & (tl.load(listed.ids + i, mask=same, other=-1) == ids)
    return total


@triton.jit
def edit_seen(logits, edited, penalties, dense, seen, biased, i, PACKED: tl.constexpr):
    """Entries ``i (BLOCK,)`` of the seen tokens, but for those that have a bias too."""
    inside = i < seen.n
    ids = tl.load(seen.ids + i, mask=inside, other=0)
    count = tl.load(seen.numbers + i, mask=inside, other=0)
    written = inside
    if biased is not None:
        _, has_bias = look_up(biased, ids, inside)
        written = inside & ~has_bias
    bias = dense_bias(dense, ids, inside)
    write(logits, edited, penalties, dense, ids, written, inside, count, bias, PACKED)


@triton.jit
def edit_biased(logits, edited, penalties, dense, seen, biased, i, PACKED: tl.constexpr):
    """Entries ``i (BLOCK,)`` of the biases: the first of a token's writes it."""
    inside = i < biased.n
    ids = tl.load(biased.ids + i, mask=inside, other=-1)
    before = tl.load(biased.ids + i - 1, mask=inside & (i > 0), other=-1)
    leads = (ids >= 0) & (ids != before)
    bias = sum_of_run(biased, i, leads, ids)
    if seen is not None:
        at, is_seen = look_up(seen, ids, leads)
        count = tl.load(seen.numbers + at, mask=is_seen, other=0)
    else:
        is_seen, count = marked(dense, ids, leads)
    write(logits, edited, penalties, dense, ids, leads, is_seen, count, bias, PACKED)


@tuned(LISTED_CONFIGS, key=["vocab"], enable_fp_fusion=False)
@triton.jit(
    do_not_specialize=["vocab", "seen_capacity", "biases", "repetition_row", "presence_row", "frequency_row"]
)
def edit_listed_kernel(
    logits, edited, repetition, presence, frequency, counts, prompt, bias, allowed,
    seen_ids, seen_counts, seen_lengths, bias_ids, bias_values,
    logits_row, repetition_row, presence_row, frequency_row, counts_row, prompt_row, bias_row, allowed_row,
    seen_ids_row, seen_counts_row, bias_ids_row, bias_values_row, vocab, seen_capacity, biases,
    PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row and block of its seen tokens, then of its biases: those that have a bias are left to these.

    A row with an id that is none, which the host cannot see, gets a NaN.
    """
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    penalties = penalties_of(
        row, repetition, presence, frequency, repetition_row, presence_row, frequency_row
    )
    dense = Dense(row, counts, prompt, bias, allowed, counts_row, prompt_row, bias_row, allowed_row)
    seen = None
    if seen_ids is not None:
        seen = Listed(
            seen_ids + row * seen_ids_row, seen_counts + row * seen_counts_row, tl.load(seen_lengths + row)
        )
    biased = None
    if bias_ids is not None:
        biased = Listed(bias_ids + row * bias_ids_row, bias_values + row * bias_values_row, biases)
        if (tl.load(biased.ids) < -1) | (tl.load(biased.ids + biases - 1) >= vocab):
            tl.store(edited + row * vocab, float("nan"), mask=block == 0)
            return
    logits += row * logits_row
    edited += row * vocab
    seen_blocks = tl.cdiv(seen_capacity, BLOCK)
    if block < seen_blocks:
        if seen_ids is not None:
            i = block * BLOCK + tl.arange(0, BLOCK)
            edit_seen(logits, edited, penalties, dense, seen, biased, i, PACKED)
    elif bias_ids is not None:
        i = (block - seen_blocks) * BLOCK + tl.arange(0, BLOCK)
        edit_biased(logits, edited, penalties, dense, seen, biased, i, PACKED)


def edited(args: Any) -> Tensor:
    """Logits after penalties, bias and mask, (batch, vocab) float32; ``args`` is a ``SamplingArgs`` with edits."""
    logits, edits = args.logits, args.edits.with_ascending_bias()
    batch, vocab = logits.shape
    out = torch.empty(batch, vocab, device=logits.device)
    if batch:
        call = {"logits": logits, "edited": out, "vocab": vocab} | strides(logits, "logits_row")
        call |= dense_call(edits, logits)
        edit_kernel.launch(lambda blocks: (batch, triton.cdiv(vocab, blocks["BLOCK"])), CONFIGS[0], **call)
        edit_lists(edits, batch, call)
    return out


def dense_call(edits: Any, logits: Tensor) -> dict[str, Any]:
    """What there is for every token, and the penalties' numbers."""
    counts = edits.token_counts if isinstance(edits.token_counts, Tensor) else None
    bias = edits.logit_bias if isinstance(edits.logit_bias, Tensor) else None
    prompt, allowed = edits.prompt_mask, edits.allowed
    packed = allowed is not None and allowed.dtype == torch.int32
    numbers = {
        "repetition": edits.repetition_penalty,
        "presence": edits.presence_penalty,
        "frequency": edits.frequency_penalty,
    }
    return {
        "counts": counts, "bias": bias, "PACKED": packed,
        "prompt": None if prompt is None else prompt.view(torch.uint8),
        "allowed": allowed if allowed is None or packed else allowed.view(torch.uint8),
        **strides(counts, "counts_row"), **strides(prompt, "prompt_row"), **strides(bias, "bias_row"),
        **strides(allowed, "allowed_row"), **per_row(logits, torch.float64, **numbers),
    }  # fmt: skip


def edit_lists(edits: Any, batch: int, call: dict[str, Any]) -> None:
    """The second launch, if tokens come in lists."""
    seen = None if isinstance(edits.token_counts, Tensor) else edits.token_counts
    ids, counts, lengths = (None, None, None) if seen is None else (seen.ids, seen.counts, seen.lengths)
    capacity = 0 if ids is None else ids.shape[1]
    bias_ids, bias_values = edits.logit_bias if isinstance(edits.logit_bias, tuple) else (None, None)
    biases = 0 if bias_ids is None else bias_ids.shape[1]
    if not biases:
        bias_ids = bias_values = None
    if not capacity + biases:
        return

    def grid(blocks: dict[str, Any]) -> tuple[int, int]:
        return batch, triton.cdiv(capacity, blocks["BLOCK"]) + triton.cdiv(biases, blocks["BLOCK"])

    edit_listed_kernel.launch(
        grid, LISTED_CONFIGS[0], seen_ids=ids, seen_counts=counts, seen_lengths=lengths, bias_ids=bias_ids,
        bias_values=bias_values, seen_capacity=capacity, biases=biases,
        **strides(ids, "seen_ids_row"), **strides(counts, "seen_counts_row"),
        **strides(bias_ids, "bias_ids_row"), **strides(bias_values, "bias_values_row"), **call,
    )  # fmt: skip
