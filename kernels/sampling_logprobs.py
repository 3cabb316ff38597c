"""Log-probabilities of the drawn and of the n most likely tokens, under the softmax of the rows as they came.

The n best are a cut by counts. One launch finds it and writes down their ranks, in any order; the next places each of
them behind as many as are ahead of it.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels import sampling_row as R
from fastattn.kernels.launch import strides, tuned

CONFIGS = [
    {"BLOCK": 2048, "num_warps": 8, "num_stages": 1},
    {"BLOCK": 1024, "num_warps": 4, "num_stages": 1},
    {"BLOCK": 4096, "num_warps": 16, "num_stages": 1},
]
PLACE_CONFIGS = [
    {"RANKS": 32, "num_warps": 4, "num_stages": 1},
    {"RANKS": 64, "num_warps": 4, "num_stages": 1},
]
ID_BITS: tl.constexpr = tl.constexpr(22)  # csrc/cuda/sampling_row.cuh, kIdBits
ID_MASK: tl.constexpr = tl.constexpr((1 << 22) - 1)


@tuned(CONFIGS, key=["vocab"], enable_fp_fusion=False)
@triton.jit(do_not_specialize=["vocab", "n"])
def rank_kernel(logits, tokens, logprobs, norms, ranks, logits_row, vocab, n, BLOCK: tl.constexpr):
    """One program per row: logprobs (batch,), norms (batch,) float64, ranks (batch, n) int64 of the n best.

    A row that has no softmax: token -1, NaN for its norm.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_row
    top, _, count, is_bad = R.summarize(logits, vocab, BLOCK)
    if is_bad | (count == 0):
        tl.store(tokens + row, -1)
        tl.store(logprobs + row, float("nan"))
        tl.store(norms + row, float("nan"))
    else:
        wide = top.to(tl.float64)
        log2_scale = tl.full([], R.LOG2E, tl.float64)
        cut_key = tl.zeros([], tl.uint32)  # everything: what is not finite comes last
        cut_id = vocab - 1
        mass = R.total_weight(logits, vocab, cut_key, cut_id, wide, log2_scale, BLOCK)
        norm = wide + tl.log(mass.to(tl.float64) * 4.547473508864641e-13)  # 2^-41
        target = n.to(tl.int64)
        cut_key, cut_id = R.find_cut(logits, vocab, target, cut_key, cut_id, wide, log2_scale, False, BLOCK)
        before = tl.zeros([], tl.int32)
        for first in range(0, vocab, BLOCK):
            ids = first + tl.arange(0, BLOCK)
            key = R.sort_key(R.load_logits(logits, ids, vocab))
            among = R.is_kept(key, ids, cut_key, cut_id) & (ids < vocab)
            here = tl.sum(among.to(tl.int32), 0)
            if here > 0:
                place = before + tl.cumsum(among.to(tl.int32), 0) - 1
                rank = (key.to(tl.int64) << ID_BITS) | (ids ^ ID_MASK)
                tl.store(ranks + row * n + place, rank, mask=among)
            before += here
        token = tl.load(tokens + row)
        logit = tl.load(logits + token, mask=token >= 0, other=float("nan")).to(tl.float64)
        tl.store(logprobs + row, (logit - norm).to(tl.float32))
        tl.store(norms + row, norm)


@tuned(PLACE_CONFIGS, key=["n"])
@triton.jit(do_not_specialize=["n"])
def place_kernel(logits, norms, ranks, best_ids, best_logprobs, logits_row, n, RANKS: tl.constexpr):
    """One program per row and block of its ranks; best_ids (batch, n) int64 and best_logprobs (batch, n)."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * RANKS + tl.arange(0, RANKS)  # (RANKS,)
    norm = tl.load(norms + row)
    has_norm = norm == norm
    at = row * n + i
    if has_norm:
        mine = tl.load(ranks + at, mask=i < n, other=0)
        ahead = tl.zeros([RANKS], tl.int32)
        for first in range(0, n, RANKS):
            j = first + tl.arange(0, RANKS)  # (RANKS,)
            other = tl.load(ranks + row * n + j, mask=j < n, other=-1)
            ahead += tl.sum((other[None, :] > mine[:, None]).to(tl.int32), 1)
        ids = (mine & ID_MASK) ^ ID_MASK
        logit = tl.load(logits + row * logits_row + ids, mask=i < n, other=0.0).to(tl.float64)
        tl.store(best_ids + row * n + ahead, ids, mask=i < n)
        tl.store(best_logprobs + row * n + ahead, (logit - norm).to(tl.float32), mask=i < n)
    else:
        tl.store(best_ids + at, tl.full([RANKS], -1, tl.int64), mask=i < n)
        tl.store(best_logprobs + at, tl.full([RANKS], float("nan"), tl.float32), mask=i < n)


def rank(args: Any, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the tokens (batch,), the best ids (batch, n) and theirs; ``args`` is a ``SamplingArgs``.

    Rows without a softmax lose their token.
    """
    logits, n = args.logits, args.logprobs
    batch, vocab = logits.shape
    logprobs, norms = (logits.new_empty(batch, dtype=x) for x in (torch.float32, torch.float64))
    ranks, best_ids = (logits.new_empty((batch, n), dtype=torch.int64) for _ in range(2))
    best_logprobs = logits.new_empty((batch, n), dtype=torch.float32)
    call = {"logits": logits, "norms": norms, "ranks": ranks, "n": n, **strides(logits, "logits_row")}
    if batch:
        rank_kernel.launch(
            lambda blocks: (batch,), CONFIGS[0], tokens=tokens, logprobs=logprobs, vocab=vocab, **call
        )
        place_kernel.launch(
            lambda blocks: (batch, triton.cdiv(n, blocks["RANKS"])), PLACE_CONFIGS[0], best_ids=best_ids,
            best_logprobs=best_logprobs, **call,
        )  # fmt: skip
    return logprobs, best_ids, best_logprobs
