"""From logits to one token per row, without sorting: SEMANTICS of ``fastattn.sample``, one program per row.

Each filter is a cut of the one total order (larger logit first, then lower id). A cut is found by a search over the
bits of the logits' sort keys, which sums counts (top_k) or integer masses (top_p) above a few thresholds per read of
the row. Masses and scores are the CPU's, double for double (csrc/cpu/sampling_filters.h): the kept sets are the same.
The draw is the Gumbel-max trick on Philox noise (csrc/rng.h).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels.launch import strides, tuned

CONFIGS = [
    {"BLOCK": 2048, "num_warps": 8, "num_stages": 1},
    {"BLOCK": 1024, "num_warps": 4, "num_stages": 1},
    {"BLOCK": 4096, "num_warps": 16, "num_stages": 1},
]
GROUP_DOMAIN: tl.constexpr = tl.constexpr(0x73616D70)  # csrc/rng.h, kGroupDomain
TOKEN_DOMAIN: tl.constexpr = tl.constexpr(0x746F6B6E)  # csrc/rng.h, kTokenDomain
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LARGEST: tl.constexpr = tl.constexpr(3.4028234663852886e38)
SMALLEST_SCALE: tl.constexpr = tl.constexpr(2.0**-1000)
LARGEST_SCALE: tl.constexpr = tl.constexpr(2.0**1000)
# 2^r on [-1/2, 1/2]: the coefficients of csrc/cpu/sampling_filters.h.
P2: tl.constexpr = tl.constexpr(float.fromhex("0x1.ebfbdff823cedp-3"))
P3: tl.constexpr = tl.constexpr(float.fromhex("0x1.c6b08d7047e52p-5"))
P4: tl.constexpr = tl.constexpr(float.fromhex("0x1.3b2ab7181b755p-7"))
P5: tl.constexpr = tl.constexpr(float.fromhex("0x1.5d87fe86fe88ep-10"))
P6: tl.constexpr = tl.constexpr(float.fromhex("0x1.4308ac85aa947p-13"))
P7: tl.constexpr = tl.constexpr(float.fromhex("0x1.ffcb9515a8016p-17"))
P8: tl.constexpr = tl.constexpr(float.fromhex("0x1.63d136366db24p-20"))
P9: tl.constexpr = tl.constexpr(float.fromhex("0x1.b63880a30e9ffp-24"))


@triton.jit
def load_logits(logits, ids, vocab):
    """(BLOCK,) float32, -inf beyond the row; -0 becomes +0, their order is by id."""
    x = tl.load(logits + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
    return tl.where(x == 0.0, 0.0, x)


@triton.jit
def sort_key(x):
    """uint32 keys ordered as the floats are."""
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def mass_of(x, top, log2_scale):
    """Integer mass round(2^41 exp((x - top) / temperature)): csrc/cpu/sampling_filters.h, Softmax::mass."""
    round_to_integer = tl.full([1], 6755399441055744.0, tl.float64)  # 1.5 * 2^52
    t = tl.maximum((x.to(tl.float64) - top) * log2_scale, -64.0)
    shifted = t + round_to_integer
    r = t - (shifted - round_to_integer)
    r2 = r * r
    r4 = r2 * r2
    p01 = r * 0.6931471805599453 + 1.0
    p23 = r * P3 + P2
    p45 = r * P5 + P4
    p67 = r * P7 + P6
    p89 = r * P9 + P8
    p = (p01 + p23 * r2) + ((p45 + p67 * r2) + p89 * r4) * r4
    power = (p.to(tl.int64, bitcast=True) + (shifted.to(tl.int64, bitcast=True) << 52)).to(
        tl.float64, bitcast=True
    )
    unit = tl.full([1], 2048.0, tl.float64)  # 2^52 / 2^41: its last place is one unit of mass
    return (power + unit).to(tl.int64, bitcast=True) - unit.to(tl.int64, bitcast=True)


@triton.jit
def weights_of(x, key, cut_key, cut_id, ids, top, log2_scale, BY_MASS: tl.constexpr):
    """(BLOCK,) int64: 1 or the mass of tokens that an earlier cut keeps, 0 of the others."""
    kept = (x > float("-inf")) & ((key > cut_key) | ((key == cut_key) & (ids <= cut_id)))
    if BY_MASS:
        return tl.where(kept, mass_of(x, top, log2_scale), 0)
    return tl.where(kept, 1, 0).to(tl.int64)


@triton.jit
def total_weight(logits, vocab, cut_key, cut_id, top, log2_scale, BLOCK: tl.constexpr):
    """Mass of what the cut keeps."""
    total = tl.zeros([BLOCK], tl.int64)
    for first in range(0, vocab, BLOCK):
        ids = first + tl.arange(0, BLOCK)
        x = load_logits(logits, ids, vocab)
        total += weights_of(x, sort_key(x), cut_key, cut_id, ids, top, log2_scale, True)
    return tl.sum(total, 0)


@triton.jit
def find_cut(
    logits, vocab, target, cut_key, cut_id, top, log2_scale, BY_MASS: tl.constexpr, BLOCK: tl.constexpr
):
    """The shortest prefix of the total order, inside an earlier cut, whose weight is >= target; as (key, last id).

    Two bits of the key a round: invariant: weight(keys > high) < target <= weight(keys >= low).
    """
    low = tl.zeros([], tl.uint32)  # the crossing's key has these leading bits
    above = tl.zeros([], tl.int64)  # weight of everything larger than the current range
    for round in range(16):
        shift = tl.zeros([], tl.uint32) + (30 - 2 * round)
        w1 = tl.zeros([BLOCK], tl.int64)
        w2 = tl.zeros([BLOCK], tl.int64)
        w3 = tl.zeros([BLOCK], tl.int64)
        for first in range(0, vocab, BLOCK):
            ids = first + tl.arange(0, BLOCK)
            x = load_logits(logits, ids, vocab)
            key = sort_key(x)
            weight = weights_of(x, key, cut_key, cut_id, ids, top, log2_scale, BY_MASS)
            inside = ((key ^ low) >> shift) < 4  # the bits decided so far agree
            own = (key >> shift) & 3
            w1 += tl.where(inside & (own == 1), weight, 0)
            w2 += tl.where(inside & (own == 2), weight, 0)
            w3 += tl.where(inside & (own == 3), weight, 0)
        s3 = above + tl.sum(w3, 0)
        s2 = s3 + tl.sum(w2, 0)
        s1 = s2 + tl.sum(w1, 0)
        digit = tl.where(s3 >= target, 3, tl.where(s2 >= target, 2, tl.where(s1 >= target, 1, 0)))
        above = tl.where(digit == 3, above, tl.where(digit == 2, s3, tl.where(digit == 1, s2, s1)))
        low = low | (digit.to(tl.uint32) << shift)
    return low, last_tie(logits, vocab, low, target - above, cut_key, cut_id, top, log2_scale, BY_MASS, BLOCK)


@triton.jit
def last_tie(
    logits, vocab, key, target, cut_key, cut_id, top, log2_scale, BY_MASS: tl.constexpr, BLOCK: tl.constexpr
):
    """Of the tokens whose key this is, by ascending id: where their weight reaches the target."""
    found = vocab - 1
    before = tl.zeros([], tl.int64)
    for first in range(0, vocab, BLOCK):
        ids = first + tl.arange(0, BLOCK)
        x = load_logits(logits, ids, vocab)
        own = sort_key(x)
        weight = weights_of(x, own, cut_key, cut_id, ids, top, log2_scale, BY_MASS)
        weight = tl.where(own == key, weight, 0)
        total = tl.sum(weight, 0)
        if (before < target) & (before + total >= target):
            running = before + tl.cumsum(weight, 0)
            found = tl.min(tl.where((running >= target) & (weight > 0), ids, vocab - 1), 0)
        before += total
    return found


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
        x = load_logits(logits, ids, vocab)
        key = sort_key(x)
        kept = (x > float("-inf")) & ((key > cut_key) | ((key == cut_key) & (ids <= cut_id)))
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


@tuned(CONFIGS, key=["vocab"], enable_fp_fusion=False)
@triton.jit(do_not_specialize=["vocab"])
def sample_kernel(
    logits, temperatures, top_ks, top_ps, min_ps, seeds, positions, tokens, logits_row,
    temperature_row, top_k_row, top_p_row, min_p_row, seed_row, position_row, vocab, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row; tokens (batch,) int64, -1 for a row with NaN, with +inf or without a finite logit."""
    row = tl.program_id(0).to(tl.int64)
    logits = logits + row * logits_row
    temperature = tl.load(temperatures + row * temperature_row)
    top_k = tl.load(top_ks + row * top_k_row)
    top_p = tl.load(top_ps + row * top_p_row)
    min_p = tl.load(min_ps + row * min_p_row)
    seed = tl.load(seeds + row * seed_row)
    position = tl.load(positions + row * position_row).to(tl.uint64, bitcast=True)

    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    where = tl.full([BLOCK], 0, tl.int32)
    finite = tl.zeros([BLOCK], tl.int32)
    bad = tl.zeros([BLOCK], tl.int32)
    for first in range(0, vocab, BLOCK):
        ids = first + tl.arange(0, BLOCK)
        x = load_logits(logits, ids, vocab)
        where = tl.where(x > largest, ids, where)
        largest = tl.where(x > largest, x, largest)
        finite += (x > float("-inf")).to(tl.int32)
        bad = bad | ((x != x) | (x == float("inf"))).to(tl.int32)
    top = tl.max(largest, 0)
    best = tl.min(tl.where(largest == top, where, vocab), 0)
    count = tl.sum(finite, 0)
    token = best
    if (tl.max(bad, 0) != 0) | (count == 0):
        token = tl.full([], -1, tl.int32)
    elif (temperature > 0) & (top_k != 1) & (top_p > 0):
        wide = top.to(tl.float64)
        log2_scale = tl.full([], LOG2E, tl.float64) / temperature
        log2_scale = tl.minimum(tl.maximum(log2_scale, SMALLEST_SCALE), LARGEST_SCALE)
        cut_key = tl.zeros([], tl.uint32)
        cut_id = vocab - 1
        if (top_k > 0) & (top_k < count):
            cut_key, cut_id = find_cut(logits, vocab, top_k, cut_key, cut_id, wide, log2_scale, False, BLOCK)
        if top_p < 1:
            total = total_weight(logits, vocab, cut_key, cut_id, wide, log2_scale, BLOCK)
            target = tl.ceil(top_p * total.to(tl.float64)).to(tl.int64)
            target = tl.minimum(tl.maximum(target, 1), total)
            cut_key, cut_id = find_cut(logits, vocab, target, cut_key, cut_id, wide, log2_scale, True, BLOCK)
        log_min_p = tl.where(min_p > 0, tl.log(tl.where(min_p > 0, min_p, 1.0)), float("-inf"))
        token = race(logits, vocab, seed, position, cut_key, cut_id, log_min_p, wide, temperature, BLOCK)
    tl.store(tokens + row, token.to(tl.int64))


def sample(args: Any) -> Tensor:
    """One token per row, (batch,) int64, -1 for a row that has none; ``args`` is a ``SamplingArgs``."""
    logits = args.logits
    batch, vocab = logits.shape
    tokens = torch.empty(batch, dtype=torch.int64, device=logits.device)
    call: dict[str, Any] = {}
    for name, value, dtype in (
        ("temperature", args.temperature, torch.float64), ("top_k", args.top_k, torch.int64),
        ("top_p", args.top_p, torch.float64), ("min_p", args.min_p, torch.float64),
        ("seed", args.seeds, torch.int64), ("position", args.positions, torch.int64),
    ):  # fmt: skip
        given = (
            value if isinstance(value, Tensor) else torch.full((1,), value, dtype=dtype, device=logits.device)
        )
        call |= {name + "s": given, name + "_row": int(isinstance(value, Tensor))}
    if batch:
        sample_kernel.launch(
            lambda blocks: (batch,), CONFIGS[0], logits=logits, tokens=tokens, vocab=vocab,
            **strides(logits, "logits_row"), **call,
        )  # fmt: skip
    return tokens
