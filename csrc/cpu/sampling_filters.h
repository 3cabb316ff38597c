// The filters, each reduced to a Cut of the total order, without sorting.
#pragma once

#include "cpu/sampling_row.h"

namespace fastattn {
namespace {

// The unnormalised softmax at a temperature > 0.
template <class Vec>
class Softmax {
 public:
  using U64 = typename Vec::U64;
  using F64 = typename Vec::F64;
  static constexpr double kOne = static_cast<double>(int64_t{1} << kMassBits);  // the largest token's mass

  Softmax(float max, double temperature)
      : max_(max), temperature_(temperature), log2_scale_(log2_scale_of(temperature)) {}

  float max() const { return static_cast<float>(max_); }
  double log2_scale() const { return log2_scale_; }
  double log_odds(float x) const { return (static_cast<double>(x) - max_) / temperature_; }  // log(p / p_max)

  // A logit such that every token below it has less than 2^log2_odds of the largest probability.
  float logit_at(double log2_odds) const {
    const double logit = max_ + log2_odds / log2_scale_;
    return logit > kLowest ? from_sort_key(sort_key(static_cast<float>(logit)) - 2) : kLowest;
  }

  inline __attribute__((always_inline)) U64 mass(F64 x) const {
    return mass_of<U64>(Vec::max_f64((x - max_) * log2_scale_, F64{} - 64.0));
  }

  // weights[i] = mass of v[i], for n rounded up to whole vectors.
  void weigh(const float* v, int64_t n, uint64_t* weights) const {
    for (int64_t i = 0; i < n; i += Vec::kLanes) {
      const Vec x = Vec::load(v + i);
      const U64 low = mass(widen_low(x)), high = mass(widen_high(x));
      memcpy(weights + i, &low, sizeof low);
      memcpy(weights + i + Vec::kLanes / 2, &high, sizeof high);
    }
  }

 private:
  double max_, temperature_, log2_scale_;
};

struct Counting {  // every token weighs one
  void weigh(const float*, int64_t n, uint64_t* weights) const {
    for (int64_t i = 0; i < n; ++i) weights[i] = 1;
  }
};

// Where a running sum of weights, taken from the largest value down, reaches a target.
struct Crossing {
  float value;
  uint64_t above;   // weight of everything larger: below the target
  uint64_t weight;  // of one element equal to `value`
};

// Packs the elements in [least, most] to the front; returns how many.
template <class Vec>
int64_t keep_between(float* v, int64_t n, float least, float most) {
  int64_t kept = 0;
  int32_t ids[Vec::kLanes];                  // not needed
  const float nowhere = __builtin_nanf("");  // in no interval
  for (int i = 0; i < Vec::kLanes; ++i) v[n + i] = nowhere;
  for (int64_t i = 0; i < n; i += Vec::kLanes) {
    const Vec x = Vec::load(v + i);
    const auto chosen = Vec::set1(least) <= select(x <= Vec::set1(most), x, Vec::set1(nowhere));
    if (lane_bits(chosen)) kept += Vec::compress(chosen, x, 0, v + kept, ids);
  }
  return kept;
}

// Radix selection on the sort key, eight bits a round, counted from the smallest key so that few rounds are needed;
// only the bucket that holds the crossing survives a round. Linear: at most four rounds. Overwrites v, which has room
// for kLanes more and holds no -0: it would equal a +0 in another bucket. False if the total weight is below the
// target.
template <class Vec, class Weights>
bool select_crossing(float* v, int64_t n, uint64_t target, const Weights& weights, Crossing* out) {
  constexpr int kBlock = 64, kCopies = 4;  // copies: neighbours are often equal, and should not wait for each other
  out->above = 0;
  while (n > 0) {
    uint32_t low = ~0u, high = 0;
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t key = sort_key(v[i]);
      low = key < low ? key : low;
      high = key > high ? key : high;
    }
    if (low == high) {
      uint64_t weight[kBlock];
      weights.weigh(v, 1, weight);
      out->value = v[0];
      out->weight = weight[0];
      return weight[0] > 0 && (target - out->above - 1) / weight[0] < static_cast<uint64_t>(n);
    }
    const int width = 32 - __builtin_clz(high - low), shift = width > 8 ? width - 8 : 0;
    uint64_t sums[kCopies][256] = {};
    for (int64_t i = 0; i < n; i += kBlock) {
      const int64_t m = n - i < kBlock ? n - i : kBlock;
      uint64_t weight[kBlock];
      uint32_t bucket[kBlock];
      weights.weigh(v + i, m, weight);
      for (int64_t j = 0; j < m; ++j) bucket[j] = (sort_key(v[i + j]) - low) >> shift;
      int64_t j = 0;
      for (; j + kCopies <= m; j += kCopies)
#pragma GCC unroll 4
        for (int copy = 0; copy < kCopies; ++copy) sums[copy][bucket[j + copy]] += weight[j + copy];
      for (; j < m; ++j) sums[0][bucket[j]] += weight[j];
    }
    int b = 256;
    for (uint64_t sum = 0;;) {
      if (--b < 0) return false;
      sum = sums[0][b] + sums[1][b] + sums[2][b] + sums[3][b];
      if (out->above + sum >= target) break;
      out->above += sum;
    }
    const uint32_t first = low + (static_cast<uint32_t>(b) << shift), span = (1u << shift) - 1;
    const uint32_t last = high - first < span ? high : first + span;
    n = keep_between<Vec>(v, n, from_sort_key(first), from_sort_key(last));
  }
  return false;
}

// The shortest prefix of the candidates whose weight is >= target, as a cut. False if all together weigh less.
template <class Vec, class Weights>
bool cut_prefix(const Candidates& c, uint64_t target, const Weights& weights, Cut* cut) {
  memcpy(c.work, c.values, static_cast<size_t>(c.n) * sizeof(float));
  Crossing crossing;
  if (!select_crossing<Vec>(c.work, c.n, target, weights, &crossing)) return false;
  *cut = {crossing.value, INT32_MAX};
  // Of the tokens equal to the value, the first `ties` by id are kept.
  int64_t ties = static_cast<int64_t>((target - crossing.above + crossing.weight - 1) / crossing.weight);
  const Vec value = Vec::set1(crossing.value);
  for (int64_t i = 0; i < c.n; i += Vec::kLanes) {
    const Vec x = Vec::load(c.values + i);
    uint32_t equal = lane_bits(value <= x) & lane_bits(x <= value);
    for (; equal; equal &= equal - 1)
      if (--ties == 0) {
        cut->last_id = c.ids[i + __builtin_ctz(equal)];
        return true;
      }
  }
  return true;
}

template <class Vec>
uint64_t total_mass(const Candidates& c, const Softmax<Vec>& softmax) {
  uint64_t total = 0, weights[64];
  for (int64_t i = 0; i < c.n; i += 64) {
    const int64_t m = c.n - i < 64 ? c.n - i : 64;
    softmax.weigh(c.values + i, m, weights);
    for (int64_t j = 0; j < m; ++j) total += weights[j];
  }
  return total;
}

template <class Vec, class T>
uint64_t total_mass(const Row<Vec, T>& row, const Softmax<Vec>& softmax) {
  typename Vec::U64 sum = {};
  const auto add = [&](Vec v) { sum += softmax.mass(widen_low(v)) + softmax.mass(widen_high(v)); };
  const float weightless = softmax.logit_at(-kMassBits - 2);
  row.visit_chunks(weightless, -kMinusInfinity, [&](int64_t c, int32_t) {
    for (int i = 0; i < Row<Vec, T>::kChunkVecs; ++i) add(row.load(c, i));
  });
  for (int64_t i = 0; i < row.edited().n; i += Vec::kLanes) add(Vec::load(row.edited().values + i));
  uint64_t total = 0;
  for (int i = 0; i < Vec::kLanes / 2; ++i) total += sum[i];
  return total;
}

// top_p among candidates that are already a kept set.
template <class Vec>
Cut cut_top_p(const Candidates& c, double top_p, const Softmax<Vec>& softmax) {
  Cut cut;
  cut_prefix<Vec>(c, prefix_mass(top_p, total_mass(c, softmax)), softmax, &cut);
  return cut;
}

// min_p: normalisation and the other filters leave p / p_max as it is, so this one is a bound on the logit.
template <class Vec>
float least_logit(double min_p, const Softmax<Vec>& softmax) {
  const double least = __builtin_log(min_p);
  if (softmax.log_odds(kLowest) >= least) return kLowest;
  const float guess = softmax.logit_at(least * 1.4426950408889634);
  uint32_t key = sort_key(guess);
  while (key < sort_key(softmax.max()) && softmax.log_odds(from_sort_key(key)) < least) ++key;
  return from_sort_key(key);
}

}  // namespace
}  // namespace fastattn
