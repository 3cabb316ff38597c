"""A row of logits without sorting it: its tokens in the one total order, what each weighs, and where a cut falls.

A cut keeps a prefix of the order (larger logit first, then lower id): it is the key and the id of the last token kept.
It is found by a search over the bits of the logits' sort keys, which sums counts or integer masses above a few
thresholds per read of the row. Masses are the CPU's, double for double (csrc/sampling_order.h): so are the kept sets.
"""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LOWEST_KEY: tl.constexpr = tl.constexpr(0x00800000)  # of -FLT_MAX, the last that may be drawn
# 2^r on [-1/2, 1/2]: the coefficients of csrc/sampling_order.h.
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
    """Integer mass round(2^41 exp((x - top) / temperature)): csrc/sampling_order.h, mass_of."""
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
def is_kept(key, ids, cut_key, cut_id):
    """(BLOCK,) bool, which tokens are no further down the order than a cut."""
    return (key > cut_key) | ((key == cut_key) & (ids <= cut_id))


@triton.jit
def weights_of(x, key, cut_key, cut_id, ids, top, log2_scale, BY_MASS: tl.constexpr):
    """(BLOCK,) int64: 1 or the mass of tokens that an earlier cut keeps, 0 of the others."""
    kept = is_kept(key, ids, cut_key, cut_id)
    if BY_MASS:
        return tl.where(kept, mass_of(x, top, log2_scale), 0)
    return tl.where(kept, 1, 0).to(tl.int64)


@triton.jit
def summarize(logits, vocab, BLOCK: tl.constexpr):
    """The largest logit, the lowest id that has it, how many are finite, and whether there is NaN or +inf."""
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
    return top, best, tl.sum(finite, 0), tl.max(bad, 0) != 0


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
