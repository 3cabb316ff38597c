"""From logits to one token per row, without sorting: SEMANTICS of ``fastattn.sample``, one program per row.

Each filter is a cut of the one total order (``sampling_row.py``), by counts (top_k) or integer masses (top_p); scores
are the CPU's, double for double. The draw is the Gumbel-max trick on Philox noise (csrc/rng.h). Penalties, bias and
mask come before (``sampling_edits.py``), log-probabilities after (``sampling_logprobs.py``).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels import sampling_row as R
from fastattn.kernels.launch import per_row, strides, tuned
from fastattn.kernels.sampling_edits import edited
from fastattn.kernels.sampling_logprobs import rank

CONFIGS = [
    {"BLOCK": 2048, "num_warps": 8, "num_stages": 1},
    {"BLOCK": 1024, "num_warps": 4, "num_stages": 1},
    {"BLOCK": 4096, "num_warps": 16, "num_stages": 1},
]
GROUP_DOMAIN: tl.constexpr = tl.constexpr(0x73616D70)  # csrc/rng.h, kGroupDomain
TOKEN_DOMAIN: tl.constexpr = tl.constexpr(0x746F6B6E)  # csrc/rng.h, kTokenDomain
LARGEST: tl.constexpr = tl.constexpr(3.4028234663852886e38)
SMALLEST_SCALE: tl.constexpr = tl.constexpr(2.0**-1000)
LARGEST_SCALE: tl.constexpr = tl.constexpr(2.0**1000)


@triton.jit
def noise(seed, position, counter, domain: tl.constexpr):
    """Three words of the Philox block of this counter; csrc/rng.h says what they make."""
    zero = tl.zeros_like(counter).to(tl.uint32)
    w0, w1, w2, _ = tl.philox(
        seed,
        counter.to(tl.uint32),
        zero + (position & 0xFFFFFFFF).to(tl.uint32),
        zero + (position >> 32).to(tl.uint32),
        zero + domain,
    )
    return w0, w1, w2


@triton.jit
def one_minus(word):
    """1 - uniform in float32, from below, of the uniform whose upper half this is."""
    return ((word ^ 0xFFFFFFFF) >> 1).to(tl.float32) * 4.656612873077393e-10  # 2^-31


@triton.jit
def exponential(high, low):
    """-log of the 52-bit uniform of two words."""
    bits = (high.to(tl.uint64) << 20) | (low >> 12).to(tl.uint64)
    return -tl.log((bits.to(tl.float64) + 0.5) * 2.220446049250313e-16)  # 2^-52


@triton.jit
def race(logits, vocab, seed, position, cut_key, cut_id, log_min_p, top, temperature, BLOCK: tl.constexpr):
    """argmax of (logit - top) / temperature + Gumbel over what the cut keeps, in double; the lower id among equals.

    Float32 scores come first; only a block where one of them comes near the best so far is scored in double.
    """
    best = tl.full([], float("-inf"), tl.float64)
    winner = vocab
    scale = tl.minimum((2.0 / temperature).to(tl.float32), LARGEST)
    half_top = top.to(tl.float32) * 0.5  # halves: the difference of two finite floats may overflow
    for first in range(0, vocab, BLOCK):
        ids = first + tl.arange(0, BLOCK)
        g0, g1, g2 = noise(seed, position, ids // 256 * 4 + ids % 4, GROUP_DOMAIN)
        t0, t1, _ = noise(seed, position, ids, TOKEN_DOMAIN)
        follows = ((ids // 4).to(tl.uint32) ^ g2) % 64 != 0  # has not the least clock of its group
        x = R.load_logits(logits, ids, vocab)
        kept = R.is_kept(R.sort_key(x), ids, cut_key, cut_id)
        # An upper bound in float32: -log(uniform) >= 1 - uniform, and 2^-8 covers the rounding.
        least = one_minus(g0) * 0.015625 + tl.where(follows, one_minus(t0), 0.0)
        bound = (x * 0.5 - half_top) * scale - tl.log(least)
        bound = tl.where(kept, bound + 0.00390625 + tl.abs(bound) * 1e-6, float("-inf"))
        if tl.max(bound, 0).to(tl.float64) >= best:
            clock = exponential(g0, g1) * 0.015625 + tl.where(follows, exponential(t0, t1), 0.0)
            log_odds = (x.to(tl.float64) - top) / temperature
            # min_p: neither normalisation nor the other filters change p / p_max.
            score = tl.where(kept & (log_odds >= log_min_p), log_odds - tl.log(clock), float("-inf"))
            here = tl.max(score, 0)
            if here > best:
                best = here
                winner = tl.min(tl.where(score == here, ids, vocab), 0)
    return winner


@triton.jit
def mark(logits, kept, vocab, is_bad, cut_key, cut_id, log_min_p, top, temperature, BLOCK: tl.constexpr):
    """Which tokens the filters keep, a byte for each; of a bad row none."""
    for first in range(0, vocab, BLOCK):
        ids = first + tl.arange(0, BLOCK)
        x = R.load_logits(logits, ids, vocab)
        log_odds = (
            x.to(tl.float64) - top
        ) / temperature  # of the best in a greedy row NaN, not below anything
        keeps = R.is_kept(R.sort_key(x), ids, cut_key, cut_id) & ~(log_odds < log_min_p)
        tl.store(kept + ids, (keeps & ~is_bad).to(tl.uint8), mask=ids < vocab)


@tuned(CONFIGS, key=["vocab"], enable_fp_fusion=False)
@triton.jit(
    do_not_specialize=[
        "vocab", "temperature_row", "top_k_row", "top_p_row", "min_p_row", "seed_row", "position_row"
    ]
)  # fmt: skip
def sample_kernel(
    logits, temperature, top_k, top_p, min_p, seed, position, tokens, kept, logits_row,
    temperature_row, top_k_row, top_p_row, min_p_row, seed_row, position_row, vocab, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row; tokens (batch,) int64, or instead kept (batch, vocab) bytes.

    A row with NaN, with +inf or without a finite logit has the token -1, and keeps nothing.
    """
    row = tl.program_id(0).to(tl.int64)
    logits = logits + row * logits_row
    temperature = tl.load(temperature + row * temperature_row)
    top_k = tl.load(top_k + row * top_k_row)
    top_p = tl.load(top_p + row * top_p_row)
    min_p = tl.load(min_p + row * min_p_row)
    seed = tl.load(seed + row * seed_row)
    position = tl.load(position + row * position_row).to(tl.uint64, bitcast=True)

    top, best, count, is_bad = R.summarize(logits, vocab, BLOCK)
    is_bad = is_bad | (count == 0)
    wide = top.to(tl.float64)
    log_min_p = tl.where(min_p > 0, tl.log(tl.where(min_p > 0, min_p, 1.0)), float("-inf"))
    token = best
    cut_key = R.sort_key(top)  # a greedy row keeps one
    cut_id = best
    if is_bad:
        token = tl.full([], -1, tl.int32)
    elif (temperature > 0) & (top_k != 1) & (top_p > 0):
        log2_scale = tl.full([], R.LOG2E, tl.float64) / temperature
        log2_scale = tl.minimum(tl.maximum(log2_scale, SMALLEST_SCALE), LARGEST_SCALE)
        cut_key = tl.full([], R.LOWEST_KEY, tl.uint32)
        cut_id = vocab - 1
        if (top_k > 0) & (top_k < count):
            cut_key, cut_id = R.find_cut(
                logits, vocab, top_k, cut_key, cut_id, wide, log2_scale, False, BLOCK
            )
        if top_p < 1:
            total = R.total_weight(logits, vocab, cut_key, cut_id, wide, log2_scale, BLOCK)
            target = tl.ceil(top_p * total.to(tl.float64)).to(tl.int64)
            target = tl.minimum(tl.maximum(target, 1), total)
            cut_key, cut_id = R.find_cut(
                logits, vocab, target, cut_key, cut_id, wide, log2_scale, True, BLOCK
            )
        if kept is None:
            token = race(logits, vocab, seed, position, cut_key, cut_id, log_min_p, wide, temperature, BLOCK)
    if kept is None:
        tl.store(tokens + row, token.to(tl.int64))
    else:
        mark(logits, kept + row * vocab, vocab, is_bad, cut_key, cut_id, log_min_p, wide, temperature, BLOCK)


def sample(args: Any) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor] | None]:
    """One token per row, (batch,) int64, -1 for a row that has none; log-probabilities (batch,), ids, (batch, n).

    ``args`` is a ``SamplingArgs``. A row of which there is no softmax has no token, NaN and ids -1.
    """
    tokens = torch.empty(args.logits.shape[0], dtype=torch.int64, device=args.logits.device)
    draw(args, tokens=tokens)
    return tokens, rank(args, tokens) if args.logprobs else None


def survivors(args: Any) -> Tensor:
    """Which tokens the filters keep, (batch, vocab) bool; a greedy row keeps one, a row without a token none."""
    kept = torch.empty_like(args.logits, dtype=torch.bool, memory_format=torch.contiguous_format)
    draw(args, kept=kept.view(torch.uint8))
    return kept


def draw(args: Any, tokens: Tensor | None = None, kept: Tensor | None = None) -> None:
    """Fills tokens (batch,) or kept (batch, vocab)."""
    logits = args.logits if args.edits is None else edited(args)
    batch, vocab = logits.shape
    if batch:
        sample_kernel.launch(
            lambda blocks: (batch,), CONFIGS[0], logits=logits, tokens=tokens, kept=kept, vocab=vocab,
            **strides(logits, "logits_row"),
            **per_row(
                logits, torch.float64, temperature=args.temperature, top_p=args.top_p, min_p=args.min_p
            ),
            **per_row(logits, torch.int64, top_k=args.top_k, seed=args.seeds, position=args.positions),
        )  # fmt: skip
