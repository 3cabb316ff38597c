// A row of logits that is worked at in steps, each of which reads it once: what all of sampling's kernels share.
//
// Tokens have ranks in the total order: the sort key and, turned around, the id in one integer. A cut, of which tokens
// are kept, is a rank; it is found by radix selection, eight bits a step, of counts or of integer masses. What a step
// finds out about a row, every block of the row works out for itself at the begin of the next step, from what all of
// them left on the board: so a row has one block, which goes from step to step by a barrier, or several, for which the
// next launch is the barrier. Nothing depends on how many.
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

struct RowParams {
  const void* logits;  // (batch, vocab)
  int64_t stride_batch;
  uint64_t* board;  // (batch, 2, board_words(blocks)): what a step leaves for the next, by turns
  int vocab, blocks;
  int slice;                  // the tokens of a block, whole noise blocks
  int first_step, last_step;  // of this launch
};

// What is known about a row whose cut is looked for.
struct CutSearch {
  uint64_t cut;     // tokens of this rank and above are kept
  uint64_t prefix;  // of the rank that a search looks for: all but the `open` low bits
  uint64_t target;  // what the tokens must weigh, or how many they must be, from the largest with this prefix down
  float max;        // the largest logit,
  int32_t best;     // and the lowest id that has it
  int32_t open;     // 0 = no search
  int32_t by_mass;  // a search of masses, not of counts
};

constexpr int kStateWords = 7;
FASTATTN_HOST_DEVICE inline int64_t board_words(int blocks) { return kStateWords + int64_t{blocks} * kBuckets; }

constexpr int kIdBits = 22, kDigitBits = 8;
constexpr uint32_t kIdMask = (1u << kIdBits) - 1;
static_assert(kMaxVocab == int64_t{1} << kIdBits, "ids fit");
static_assert(kMaxVocab % kNoiseBlock == 0, "so do those past the end of a row");
static_assert(kBuckets == 1 << kDigitBits && kBuckets == kSampleThreads, "a thread for each bucket");
constexpr int kSearchSteps = (32 + kIdBits + kDigitBits - 1) / kDigitBits;  // one for each digit

FASTATTN_DEVICE uint64_t rank_of(float x, int id) {
  return static_cast<uint64_t>(sort_key(x)) << kIdBits | (kIdMask - static_cast<uint32_t>(id));
}
FASTATTN_DEVICE int id_of(uint64_t rank) { return static_cast<int>(kIdMask - (static_cast<uint32_t>(rank) & kIdMask)); }
FASTATTN_DEVICE float logit_of(uint64_t rank) { return from_sort_key(static_cast<uint32_t>(rank >> kIdBits)); }
FASTATTN_DEVICE bool is_finite(float x) { return x - x == 0.0f; }

template <int n>
struct Sums {
  FASTATTN_DEVICE void operator()(uint64_t (&mine)[n], const uint64_t (&other)[n]) const {
#pragma unroll
    for (int i = 0; i < n; ++i) mine[i] += other[i];
  }
};

// Derived has `conclude(State*)`, from what the step before left, and `work(State)`. Params are RowParams and more,
// State is a CutSearch with a `stage`, which begins with 0 and ends with State::kDone.
template <class T, class Params, class State, class Derived>
class RowSteps {
 public:
  // Works out what the step before found, and does this one's reading. False once the row is done.
  FASTATTN_DEVICE bool step(int number) {
    number_ = number;
    State s{};
    if (number > 0) {
      s = load_state();
      if (s.stage != State::kDone) self().conclude(&s);
    }
    if (is_writer()) store_state(s);
    if (s.stage == State::kDone) return false;
    self().work(s);
    return true;
  }

 protected:
  static constexpr int kLaneTokens = kNoiseBlock / 32;  // tokens of a lane: all of one noise group

  FASTATTN_DEVICE RowSteps(const Params& p, double temperature)
      : p_(p),
        row_(block_index_x()),
        block_(block_index_y()),
        logits_(static_cast<const T*>(p.logits) + row_ * p.stride_batch),
        log2_scale_(log2_scale_of(temperature)) {}

  FASTATTN_DEVICE bool is_writer() const { return block_ == 0 && thread_index() == 0; }
  FASTATTN_DEVICE const uint64_t* found_by(int block) const {
    return slot(number_) + kStateWords + int64_t{block} * kBuckets;
  }
  FASTATTN_DEVICE uint64_t* findings() const { return slot(number_ + 1) + kStateWords + int64_t{block_} * kBuckets; }

  template <int n, class Merge>
  FASTATTN_DEVICE void gather(uint64_t (&all)[n], Merge merge) const {
    for (int block = 0; block < p_.blocks; ++block) {
      uint64_t one[n];
#pragma unroll
      for (int i = 0; i < n; ++i) one[i] = load_global(found_by(block) + i);
      merge(all, one);
    }
  }

  FASTATTN_DEVICE uint64_t mass(float x, float max) const {
    const double t = (static_cast<double>(x) - static_cast<double>(max)) * log2_scale_;
    return mass_of<uint64_t>(t > -64.0 ? t : -64.0);
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

  struct Summary {  // best rank, complement of the least key, tokens that are finite, problems
    FASTATTN_DEVICE void operator()(uint64_t (&mine)[4], const uint64_t (&other)[4]) const {
      mine[0] = other[0] > mine[0] ? other[0] : mine[0];
      mine[1] = other[1] > mine[1] ? other[1] : mine[1];
      mine[2] += other[2];
      mine[3] |= other[3];
    }
  };

  FASTATTN_DEVICE void summarize() const {
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

  // 0, or the SamplingError of a row.
  FASTATTN_DEVICE static int64_t problem_of(const uint64_t (&found)[4]) {
    if (found[3] & 1) return kHasNaN;
    if (found[3]) return kHasInf;
    return found[2] == 0 ? int64_t{kNothingFinite} : 0;
  }

  // ---------------------------------------------------------------- searches
  // Looks among the tokens that the cut so far keeps; ranks differ in their low bits only. True if that finds it.
  FASTATTN_DEVICE bool search(State* s, uint64_t target, bool by_mass) const {
    const uint64_t high = rank_of(s->max, s->best), different = high ^ s->cut;
    s->open = different ? 64 - leading_zeros(different) : 0;
    s->prefix = high >> s->open;
    s->target = target;
    s->by_mass = by_mass;
    return settle(s);
  }

  // What the tokens with each next digit weigh.
  FASTATTN_DEVICE void weigh_buckets(const State& s) const {
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

  // The digit that the target falls on. True if the cut is found.
  FASTATTN_DEVICE bool narrow(State* s) const {
    uint64_t own = 0;
    for (int block = 0; block < p_.blocks; ++block) own += load_global(found_by(block) + thread_index());
    const Crossing crossing = find_crossing(own, s->target);
    const int width = digit_bits(*s);
    s->prefix = s->prefix << width | crossing.bucket;
    s->open -= width;
    s->target -= crossing.above;
    if (!s->by_mass && s->target == crossing.weight) return cut_at(s, s->prefix << s->open);  // the whole bucket stays
    return settle(s);
  }

  const Params& p_;
  const int row_, block_;
  const T* const logits_;

 private:
  FASTATTN_DEVICE Derived& self() { return static_cast<Derived&>(*this); }

  static constexpr int kWords = sizeof(State) / 8;
  static_assert(sizeof(State) % 8 == 0 && kWords <= kStateWords, "the board has room for it");
  struct StateWords {
    uint64_t word[kWords];
  };

  FASTATTN_DEVICE uint64_t* slot(int number) const {
    return p_.board + (int64_t{row_} * 2 + number % 2) * board_words(p_.blocks);
  }
  FASTATTN_DEVICE State load_state() const {
    StateWords words;
    for (int i = 0; i < kWords; ++i) words.word[i] = load_global(slot(number_) + i);
    return bits_as<State>(words);
  }
  FASTATTN_DEVICE void store_state(const State& s) const {
    const auto words = bits_as<StateWords>(s);
    for (int i = 0; i < kWords; ++i) store_global(slot(number_ + 1) + i, words.word[i]);
  }

  FASTATTN_DEVICE static int digit_bits(const State& s) { return s.open < kDigitBits ? s.open : kDigitBits; }

  FASTATTN_DEVICE bool settle(State* s) const {
    if (s->by_mass && s->open <= kIdBits) {  // equal logits weigh the same: from here on they are counted
      const uint64_t weight = mass(logit_of(s->prefix << s->open), s->max);
      s->target = (s->target + weight - 1) / (weight > 0 ? weight : 1);  // a crossing weighs something
      s->by_mass = 0;
    }
    return s->open == 0 && cut_at(s, s->prefix);
  }

  FASTATTN_DEVICE static bool cut_at(State* s, uint64_t rank) {
    s->cut = rank > s->cut ? rank : s->cut;
    s->open = 0;
    return true;
  }

  const double log2_scale_;
  int number_ = 0;
};

// The steps of a launch.
template <class Row, class Params>
FASTATTN_DEVICE void run_steps(const Params& p) {
  Row row(p);
  for (int number = p.first_step;; ++number) {
    if (!row.step(number) || number == p.last_step) return;
    block_barrier();
  }
}

}  // namespace
}  // namespace fastattn
