// From logits to tokens, without a sort and without the host: a row is worked at in steps, each of which reads it once.
//
// Filters are cuts of the total order, kept as ranks: a token's sort key and, turned around, its id in one integer. A
// cut is found by radix selection over ranks, eight bits a step, of counts (top_k) or integer masses (top_p). The draw
// is the race of rng.h. What a step finds out about a row, every block of the row works out for itself at the begin of
// the next step, from what all of them left on the board: so a row has one block, which goes from step to step by a
// barrier, or several, for which the next launch is the barrier. Nothing depends on how many.
#pragma once

#include "cuda/sampling_reduce.cuh"
#include "sampling_order.h"

namespace fastattn {
namespace {

// A parameter: one for all rows, or one for each.
template <class T>
struct RowNumber {
  const T* data;  // null = `number`
  T number;

  FASTATTN_DEVICE T of(int row) const { return data ? load_global(data + row) : number; }
};

struct SampleParams {
  const void* logits;  // (batch, vocab)
  int64_t stride_batch;
  RowNumber<double> temperature, top_p, min_p;
  RowNumber<int64_t> top_k, seeds, positions;
  int64_t* tokens;  // (batch,)
  uint8_t* kept;    // (batch, vocab); null = tokens are wanted
  uint64_t* board;  // (batch, 2, board_words(blocks)): what a step leaves for the next, by turns
  int vocab, blocks;
  int slice;                  // the tokens of a block, whole noise blocks
  int first_step, last_step;  // of this launch
};

enum class Stage : int32_t { kSummarize, kSearch, kWeigh, kRace, kMark, kDone };

// What is known about a row, and what the step does with it.
struct RowState {
  uint64_t cut;     // tokens of this rank and above are kept
  uint64_t prefix;  // of the rank that a search looks for: all but the `open` low bits
  uint64_t target;  // what the tokens must weigh, or how many they must be, from the largest with this prefix down
  float max;        // the largest logit,
  int32_t best;     // and the lowest id that has it
  int32_t open;     // 0 = no search
  int32_t by_mass;  // a search of masses, not of counts
  int32_t nucleus;  // a search for top_p, not for top_k
  Stage stage;
};

constexpr int kStateWords = sizeof(RowState) / 8;
struct StateWords {
  uint64_t word[kStateWords];
};
FASTATTN_HOST_DEVICE inline int64_t board_words(int blocks) { return kStateWords + int64_t{blocks} * kBuckets; }

constexpr int kIdBits = 22, kDigitBits = 8;
constexpr uint32_t kIdMask = (1u << kIdBits) - 1;
static_assert(kMaxVocab == int64_t{1} << kIdBits, "ids fit");
static_assert(kBuckets == 1 << kDigitBits && kBuckets == kSampleThreads, "a thread for each bucket");
constexpr int kSearchSteps = (32 + kIdBits + kDigitBits - 1) / kDigitBits;  // one for each digit

FASTATTN_DEVICE uint64_t rank_of(float x, int id) {
  return static_cast<uint64_t>(sort_key(x)) << kIdBits | (kIdMask - static_cast<uint32_t>(id));
}
FASTATTN_DEVICE int id_of(uint64_t rank) { return static_cast<int>(kIdMask - (static_cast<uint32_t>(rank) & kIdMask)); }
FASTATTN_DEVICE float logit_of(uint64_t rank) { return from_sort_key(static_cast<uint32_t>(rank >> kIdBits)); }
FASTATTN_DEVICE bool is_finite(float x) { return x - x == 0.0f; }

template <class T>
class RowSampler {
 public:
  FASTATTN_DEVICE explicit RowSampler(const SampleParams& p)
      : p_(p),
        row_(block_index_x()),
        block_(block_index_y()),
        logits_(static_cast<const T*>(p.logits) + row_ * p.stride_batch),
        temperature_(p.temperature.of(row_)),
        log2_scale_(log2_scale_of(temperature_)) {}

  // Works out what the step before found, and does this one's reading. False once the row is done.
  FASTATTN_DEVICE bool step(int number) {
    number_ = number;
    RowState s{};
    if (number > 0) {
      s = load_state();
      if (s.stage != Stage::kDone) advance(&s);
    }
    if (is_writer()) store_state(s);
    switch (s.stage) {
      case Stage::kSummarize: summarize(); break;
      case Stage::kSearch: weigh_buckets(s); break;
      case Stage::kWeigh: weigh(s); break;
      case Stage::kRace: race(s); break;
      case Stage::kMark: mark(s); break;
      case Stage::kDone: break;
    }
    return s.stage != Stage::kDone;
  }

 private:
  static constexpr int kLaneTokens = kNoiseBlock / 32;  // tokens of a lane: all of one noise group

  FASTATTN_DEVICE uint64_t* slot(int number) const {
    return p_.board + (int64_t{row_} * 2 + number % 2) * board_words(p_.blocks);
  }
  FASTATTN_DEVICE RowState load_state() const {
    StateWords words;
    for (int i = 0; i < kStateWords; ++i) words.word[i] = load_global(slot(number_) + i);
    return bits_as<RowState>(words);
  }
  FASTATTN_DEVICE void store_state(const RowState& s) const {
    const auto words = bits_as<StateWords>(s);
    for (int i = 0; i < kStateWords; ++i) store_global(slot(number_ + 1) + i, words.word[i]);
  }
  FASTATTN_DEVICE const uint64_t* found_by(int block) const {
    return slot(number_) + kStateWords + int64_t{block} * kBuckets;
  }
  FASTATTN_DEVICE uint64_t* findings() const { return slot(number_ + 1) + kStateWords + int64_t{block_} * kBuckets; }
  FASTATTN_DEVICE bool is_writer() const { return block_ == 0 && thread_index() == 0; }

  FASTATTN_DEVICE uint64_t mass(float x, float max) const {
    const double t = (static_cast<double>(x) - static_cast<double>(max)) * log2_scale_;
    return mass_of<uint64_t>(t > -64.0 ? t : -64.0);
  }
  FASTATTN_DEVICE double log_odds(float x, float max) const {
    return (static_cast<double>(x) - static_cast<double>(max)) / temperature_;
  }

  // visit(id, logits) for every noise block of this block's slice: a lane has the tokens id + 32 i, -inf past the end.
  template <class Visit>
  FASTATTN_DEVICE void scan(Visit&& visit) const {
    const int first = block_ * p_.slice, end = p_.vocab - first < p_.slice ? p_.vocab : first + p_.slice;
    const int lane = thread_index() % 32, warp = thread_index() / 32;
    for (int place = first + warp * kNoiseBlock; place < end; place += kSampleWarps * kNoiseBlock) {
      float x[kLaneTokens];
#pragma unroll
      for (int i = 0; i < kLaneTokens; ++i) {
        const int id = place + lane + 32 * i;
        x[i] = id < end ? to_float(load_global(logits_ + id)) + 0.0f : kMinusInfinity;  // -0 becomes +0
      }
      visit(place + lane, x);
    }
  }

  // ---------------------------------------------------------------- readings
  struct Summary {  // best rank, complement of the least key, tokens that are finite, problems
    FASTATTN_DEVICE void operator()(uint64_t (&mine)[4], const uint64_t (&other)[4]) const {
      mine[0] = other[0] > mine[0] ? other[0] : mine[0];
      mine[1] = other[1] > mine[1] ? other[1] : mine[1];
      mine[2] += other[2];
      mine[3] |= other[3];
    }
  };

  FASTATTN_DEVICE void summarize() {
    uint64_t found[4] = {};
    scan([&](int id, const float (&x)[kLaneTokens]) {
#pragma unroll
      for (int i = 0; i < kLaneTokens; ++i) {
        if (is_finite(x[i])) {
          const uint64_t one[4] = {rank_of(x[i], id + 32 * i), ~sort_key(x[i]), 1, 0};
          Summary{}(found, one);
        } else if (x[i] != kMinusInfinity) {
          found[3] |= x[i] != x[i] ? 1u : 2u;
        }
      }
    });
    reduce_block(found, Summary{}, findings());
  }

  struct Sum {
    FASTATTN_DEVICE void operator()(uint64_t (&mine)[1], const uint64_t (&other)[1]) const { mine[0] += other[0]; }
  };

  FASTATTN_DEVICE void weigh(const RowState& s) {
    uint64_t total[1] = {};
    scan([&](int id, const float (&x)[kLaneTokens]) {
#pragma unroll
      for (int i = 0; i < kLaneTokens; ++i)
        if (rank_of(x[i], id + 32 * i) >= s.cut) total[0] += mass(x[i], s.max);
    });
    reduce_block(total, Sum{}, findings());
  }

  // What the tokens with each next digit weigh.
  FASTATTN_DEVICE void weigh_buckets(const RowState& s) {
    Histogram::clear();
    block_barrier();
    const int width = digit_bits(s), shift = s.open - width;
    scan([&](int id, const float (&x)[kLaneTokens]) {
#pragma unroll
      for (int i = 0; i < kLaneTokens; ++i) {
        const uint64_t rank = rank_of(x[i], id + 32 * i);
        if (rank < s.cut || rank >> s.open != s.prefix) continue;
        const uint64_t weight = s.by_mass ? mass(x[i], s.max) : 1;
        if (weight > 0) Histogram::add(static_cast<int>(rank >> shift) & ((1 << width) - 1), weight);
      }
    });
    block_barrier();
    store_global(findings() + thread_index(), Histogram::sum(thread_index()));
  }

  struct Better {  // a score that sorts as an integer, and the complement of the id
    FASTATTN_DEVICE void operator()(uint64_t (&mine)[2], const uint64_t (&other)[2]) const {
      if (other[0] < mine[0] || (other[0] == mine[0] && other[1] <= mine[1])) return;
      mine[0] = other[0];
      mine[1] = other[1];
    }
  };

  FASTATTN_DEVICE static uint64_t sort_key64(double x) {
    const auto bits = bits_as<uint64_t>(x);
    return bits ^ (static_cast<uint64_t>(static_cast<int64_t>(bits) >> 63) | uint64_t{1} << 63);
  }

  // A bound from above of the noise of a group whose least clock has this word, in floats: an exponential -log(1 - v)
  // is at least v + v^2 / 2.
  FASTATTN_DEVICE static float most_noise(uint32_t word) {
    const float v = static_cast<float>(~word >> 1) * 0x1p-31f;
    return -static_cast<float>(0.6931471805599453) * log2_approx(fused_multiply_add(v * v, 0.5f, v) / kNoiseGroup);
  }

  // Groups, and then tokens, are ruled out by bounds in floats, which may round as they like: they never decide.
  FASTATTN_DEVICE void race(const RowState& s) {
    const NoiseStream noise(static_cast<uint64_t>(p_.seeds.of(row_)), static_cast<uint64_t>(p_.positions.of(row_)));
    const double log_min_p = least_log_odds();
    uint64_t best[2] = {};
    float to_beat = kMinusInfinity;
    const auto run = [&](float x, int id, const PhiloxBlock& group) {
      const auto token = static_cast<uint32_t>(id);
      double clock = exponential(group.word[0], group.word[1]) / kNoiseGroup;
      if (!has_least_clock(token, group.word[2])) {
        const PhiloxBlock own = noise.block(token, kTokenDomain);
        clock += exponential(own.word[0], own.word[1]);
      }
      const double score = log_odds(x, s.max) - logarithm(clock);
      const uint64_t one[2] = {sort_key64(score), kIdMask - token};
      Better{}(best, one);
      to_beat = maximum(to_beat, static_cast<float>(score) - 0x1p-8f);  // more than the bounds' rounding
    };
    run(s.max, s.best, noise.block(noise_group(static_cast<uint32_t>(s.best)), kGroupDomain));

    // Halves: the difference of two finite floats may overflow, that of their halves does not.
    const double twice = 2.0 / temperature_;
    // Odds are negative: what is added to the scale's error covers all roundings.
    const float scale = twice < -static_cast<double>(kLowest) ? static_cast<float>(twice * (1.0 - 0x1p-20)) : -kLowest;
    const auto bound = [&](float x) { return (x * 0.5f - s.max * 0.5f) * scale; };
    scan([&](int id, const float (&x)[kLaneTokens]) {
      float top = x[0];
#pragma unroll
      for (int i = 1; i < kLaneTokens; ++i) top = maximum(top, x[i]);
      if (rank_of(top, 0) >= s.cut) {
        const PhiloxBlock group = noise.block(noise_group(static_cast<uint32_t>(id)), kGroupDomain);
        const float most = most_noise(group.word[0]);
        if (bound(top) + most >= to_beat) {
#pragma unroll 1
          for (int i = 0; i < kLaneTokens; ++i) {
            const float logit = select_of(x, i);
            if (rank_of(logit, id + 32 * i) < s.cut || log_odds(logit, s.max) < log_min_p) continue;
            if (bound(logit) + most >= to_beat) run(logit, id + 32 * i, group);
          }
        }
      }
#pragma unroll
      for (int mask = 16; mask > 0; mask /= 2) to_beat = maximum(to_beat, shuffle_xor(to_beat, mask));
    });
    reduce_block(best, Better{}, findings());
  }

  // x[i] without an address: an array that is indexed by a variable would lie in memory.
  FASTATTN_DEVICE static float select_of(const float (&x)[kLaneTokens], int i) {
    float one = x[0];
#pragma unroll
    for (int j = 1; j < kLaneTokens; ++j) one = i == j ? x[j] : one;
    return one;
  }

  FASTATTN_DEVICE void mark(const RowState& s) {
    const double log_min_p = least_log_odds();
    uint8_t* kept = p_.kept + int64_t{row_} * p_.vocab;
    scan([&](int id, const float (&x)[kLaneTokens]) {
#pragma unroll
      for (int i = 0; i < kLaneTokens; ++i)
        if (id + 32 * i < p_.vocab) {  // a greedy row's odds are NaN
          const bool keeps = rank_of(x[i], id + 32 * i) >= s.cut && !(log_odds(x[i], s.max) < log_min_p);
          store_global(kept + id + 32 * i, static_cast<uint8_t>(keeps));
        }
    });
  }

  FASTATTN_DEVICE double least_log_odds() const {
    const double min_p = p_.min_p.of(row_);
    return min_p > 0.0 ? logarithm(min_p) : -__builtin_inf();
  }

  // ---------------------------------------------------------------- conclusions
  template <int n, class Merge>
  FASTATTN_DEVICE void gather(uint64_t (&all)[n], Merge merge) const {
    for (int block = 0; block < p_.blocks; ++block) {
      uint64_t one[n];
#pragma unroll
      for (int i = 0; i < n; ++i) one[i] = load_global(found_by(block) + i);
      merge(all, one);
    }
  }

  FASTATTN_DEVICE void advance(RowState* s) {
    switch (s->stage) {
      case Stage::kSummarize: begin(s); break;
      case Stage::kSearch: narrow(s); break;
      case Stage::kWeigh: {
        uint64_t total[1] = {};
        gather(total, Sum{});
        s->nucleus = 1;
        search(s, prefix_mass(p_.top_p.of(row_), total[0]), true);
        break;
      }
      case Stage::kRace: {
        uint64_t best[2] = {};
        gather(best, Better{});
        finish(s, kIdMask - static_cast<int64_t>(best[1]));
        break;
      }
      default: s->stage = Stage::kDone;
    }
  }

  FASTATTN_DEVICE void finish(RowState* s, int64_t token) const {
    s->stage = Stage::kDone;
    if (is_writer()) store_global(p_.tokens + row_, token);
  }

  FASTATTN_DEVICE void begin(RowState* s) const {
    uint64_t found[4] = {};
    gather(found, Summary{});
    const int64_t top_k = p_.top_k.of(row_);
    const auto finite = static_cast<int64_t>(found[2]);
    if (found[3] || finite == 0) {
      s->cut = ~uint64_t{0};
      s->stage = Stage::kMark;
      if (!p_.kept) finish(s, -(found[3] & 1 ? kHasNaN : found[3] ? kHasInf : kNothingFinite));
      return;
    }
    s->max = logit_of(found[0]);
    s->best = id_of(found[0]);
    if (temperature_ == 0.0 || top_k == 1 || p_.top_p.of(row_) == 0.0) {
      s->cut = found[0];
      s->stage = Stage::kMark;
      if (!p_.kept) finish(s, s->best);
      return;
    }
    s->cut = static_cast<uint64_t>(~static_cast<uint32_t>(found[1])) << kIdBits;
    if (top_k > 0 && top_k < finite)
      search(s, static_cast<uint64_t>(top_k), false);
    else
      filter_nucleus(s);
  }

  FASTATTN_DEVICE void filter_nucleus(RowState* s) const {
    s->stage = p_.top_p.of(row_) < 1.0 ? Stage::kWeigh : draw();
  }
  FASTATTN_DEVICE Stage draw() const { return p_.kept ? Stage::kMark : Stage::kRace; }

  // Among the tokens that the cut so far keeps; ranks differ in their low bits only.
  FASTATTN_DEVICE void search(RowState* s, uint64_t target, bool by_mass) const {
    const uint64_t high = rank_of(s->max, s->best), different = high ^ s->cut;
    s->open = different ? 64 - leading_zeros(different) : 0;
    s->prefix = high >> s->open;
    s->target = target;
    s->by_mass = by_mass;
    s->stage = Stage::kSearch;
    settle(s);
  }

  FASTATTN_DEVICE static int digit_bits(const RowState& s) { return s.open < kDigitBits ? s.open : kDigitBits; }

  // The buckets' digit that the target falls on.
  FASTATTN_DEVICE void narrow(RowState* s) {
    uint64_t own = 0;
    for (int block = 0; block < p_.blocks; ++block) own += load_global(found_by(block) + thread_index());
    const Crossing crossing = find_crossing(own, s->target);
    const int width = digit_bits(*s);
    s->prefix = s->prefix << width | crossing.bucket;
    s->open -= width;
    s->target -= crossing.above;
    if (!s->by_mass && s->target == crossing.weight)
      cut_at(s, s->prefix << s->open);  // the whole bucket stays
    else
      settle(s);
  }

  FASTATTN_DEVICE void settle(RowState* s) const {
    if (s->by_mass && s->open <= kIdBits) {  // equal logits weigh the same: from here on they are counted
      const uint64_t weight = mass(logit_of(s->prefix << s->open), s->max);
      s->target = (s->target + weight - 1) / (weight > 0 ? weight : 1);  // a crossing weighs something
      s->by_mass = 0;
    }
    if (s->open == 0) cut_at(s, s->prefix);
  }

  FASTATTN_DEVICE void cut_at(RowState* s, uint64_t rank) const {
    s->cut = rank > s->cut ? rank : s->cut;
    s->open = 0;
    if (s->nucleus)
      s->stage = draw();
    else
      filter_nucleus(s);
  }

  const SampleParams& p_;
  const int row_, block_;
  const T* logits_;
  const double temperature_, log2_scale_;
  int number_ = 0;
};

template <class T>
FASTATTN_KERNEL(kSampleThreads, 3)
sample_rows(FASTATTN_GRID_CONSTANT SampleParams p) {
  RowSampler<T> sampler(p);
  for (int number = p.first_step;; ++number) {
    if (!sampler.step(number) || number == p.last_step) return;
    block_barrier();
  }
}

}  // namespace
}  // namespace fastattn
