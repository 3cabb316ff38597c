// top_k without sorting the vocabulary: a bound that few more than k logits reach, then the choice among those.
#pragma once

#include "cpu/sampling_filters.h"

namespace fastattn {
namespace {

constexpr int64_t kSmallList = 128;  // up to so many, comparing each with each is faster than counting digits

// A logarithm from below, by the bits of a float read as an integer.
inline float log2_below(float x) {
  int32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return static_cast<float>(bits) * 0x1p-23f - 127.0f;
}

// Between two finite floats: alternately the middle of the values and of their bits, so that neither outliers nor a
// narrow range take many steps.
inline float between(float low, float high, int round) {
  if (round % 2 == 0) return 0.5f * low + 0.5f * high;
  const uint32_t key = sort_key(low);
  return from_sort_key(key + (sort_key(high) - key) / 2);
}

template <class Vec>
int64_t count_reaching(const float* v, int64_t n, float least) {  // n: whole vectors
  const Vec bound = Vec::set1(least);
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += Vec::kLanes) count += lane_count(bound <= Vec::load(v + i));
  return count;
}

// A value that at least k of v reach, and not many more where that is easily had; kLowest if fewer are finite.
template <class Vec>
float loose_bound(const float* v, int64_t n, int64_t k, float top) {
  if (count_reaching<Vec>(v, n, kLowest) < k) return kLowest;
  if (count_reaching<Vec>(v, n, top) >= k) return top;
  Vec least = Vec::set1(top);
  for (int64_t i = 0; i < n; i += Vec::kLanes) {
    const Vec x = Vec::load(v + i);
    least = min(least, select(Vec::set1(kLowest) <= x, x, least));
  }
  float low = -reduce_max(Vec::zero() - least), high = top;
  for (int round = 0; round < 64; ++round) {
    const float middle = between(low, high, round);
    if (!(low < middle && middle < high)) break;
    const int64_t count = count_reaching<Vec>(v, n, middle);
    (count >= k ? low : high) = middle;
    if (count >= k && count <= k + k / 4 + 4) break;
  }
  return low;
}

// Raises a bound that `count` of v reach, at least k, towards the one that k reach. Counts of what is large fall like
// exponentials, so their logarithms interpolate well: two looks are enough.
template <class Vec>
float tighten(const float* v, int64_t n, int64_t k, float bound, int64_t count, float top) {
  const auto log2_of = [](int64_t x) { return log2_below(static_cast<float>(x)); };
  float high = top;
  int64_t count_high = 1;
  for (int round = 0; round < 2 && count > k + k / 8; ++round) {
    const float share = (log2_of(count) - log2_of(k + k / 16)) / (log2_of(count) - log2_of(count_high));
    const float guess = bound + (high - bound) * share;
    if (!(bound < guess && guess < high)) break;
    const int64_t reach = count_reaching<Vec>(v, n, guess);
    if (reach >= k) {
      bound = guess;
      count = reach;
    } else {
      high = guess;
      count_high = reach > 0 ? reach : 1;
    }
  }
  return bound;
}

// Lists at least k of the largest logits, and few more: those that reach what k maxima of disjoint groups do. Groups
// are those of the summary, and where these are many, groups of groups come first. Returns the least that is listed;
// where that is the largest of all, only the first k + 1 are: one more than k shows that there are others. Up to
// kSmallList tokens are in no order.
template <class Vec, class T>
float gather_largest(const Row<Vec, T>& row, float max, int64_t k, Candidates* c) {
  const int64_t maxima = row.maxima_of(row.size()), tops = row.tops_of(row.size());
  float bound = kLowest;
  if (tops >= 2 * k) {
    bound = loose_bound<Vec>(row.tops(), tops, k, max);
    row.row_of_maxima().gather(bound, c, 2 * k + 1);
    if (c->n <= 2 * k) {  // a few groups of groups may hold all that is large, as in a sorted row
      for (int i = 0; i < Vec::kLanes; ++i) c->values[c->n + i] = kMinusInfinity;
      const int64_t whole = (c->n + Vec::kLanes - 1) / Vec::kLanes * Vec::kLanes;
      bound = tighten<Vec>(c->values, whole, k, bound, c->n, max);
      if (k <= kSmallList && row.gather_from_maxima(bound, kSmallList, c)) return bound;
    } else {
      bound = loose_bound<Vec>(row.maxima(), maxima, k, max);
    }
  } else if (k <= maxima) {
    bound = loose_bound<Vec>(row.maxima(), maxima, k, max);
  }
  row.gather(bound, c, bound == max ? k + 1 : INT64_MAX);
  return bound;
}

// Puts a list of up to kSmallList tokens in the total order.
template <class Vec>
void sort_small(Candidates* c) {
  constexpr int kRoom = kSmallList + 2 * Vec::kLanes;
  const int n = static_cast<int>(c->n);
  float values[kRoom], ids[kRoom], ahead[kRoom];  // ids are below 2^22; how many come before each
  memcpy(values, c->values, static_cast<size_t>(n) * sizeof *values);
  for (int i = 0; i < n; ++i) ids[i] = static_cast<float>(c->ids[i]);
  for (int i = 0; i < Vec::kLanes; ++i) values[n + i] = kMinusInfinity, ids[n + i] = 0.0f;
  const Vec one = Vec::set1(1.0f);
  Vec sum = Vec::zero();
  for (int j = 0; j < n; j += Vec::kLanes) {
    const Vec x = Vec::load(values + j);
    Vec larger[2] = {Vec::zero(), Vec::zero()};
    for (int i = 0; i < n; i += 2)
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) larger[h] = select(x < Vec::set1(values[i + h]), larger[h] + one, larger[h]);
    const Vec all = larger[0] + larger[1];
    all.store(ahead + j);
    sum = sum + select(Vec::set1(kMinusInfinity) < x, all, Vec::zero());
  }
  float lanes[Vec::kLanes], total = 0.0f;
  sum.store(lanes);
  for (float lane : lanes) total += lane;
  if (total != static_cast<float>(n * (n - 1) / 2))  // some are equal
    for (int j = 0; j < n; j += Vec::kLanes) {
      const Vec x = Vec::load(values + j), id = Vec::load(ids + j);
      Vec before = Vec::load(ahead + j);
      for (int i = 0; i < n; ++i) {
        const Vec v = Vec::set1(values[i]);
        before = select((x <= v) & (v <= x) & (Vec::set1(ids[i]) < id), before + one, before);
      }
      before.store(ahead + j);
    }
  for (int i = 0; i < n; ++i) {
    const int place = static_cast<int>(ahead[i]);
    c->values[place] = values[i];
    c->ids[place] = static_cast<int32_t>(ids[i]);
  }
}

// top_k: the candidates then are what it keeps; up to kSmallList of them in the total order.
template <class Vec, class T>
Cut cut_top_k(const Row<Vec, T>& row, float max, int64_t k, Candidates* c) {
  Cut cut{gather_largest(row, max, k, c), INT32_MAX};
  if (c->n <= kSmallList) {
    sort_small<Vec>(c);
    if (c->n > k) c->n = k;
    return {c->values[c->n - 1], c->ids[c->n - 1]};
  }
  if (c->n > k) cut_prefix<Vec>(*c, static_cast<uint64_t>(k), Counting{}, &cut);
  c->keep(cut);
  if (c->n <= kSmallList) sort_small<Vec>(c);
  return cut;
}

// top_p among what cut_top_k left.
template <class Vec>
Cut cut_top_p(Candidates* c, double top_p, const Softmax<Vec>& softmax) {
  if (c->n > kSmallList) return cut_top_p(*c, top_p, softmax);
  uint64_t weights[kSmallList + Vec::kLanes], total = 0;
  softmax.weigh(c->values, c->n, weights);
  for (int64_t i = 0; i < c->n; ++i) total += weights[i];
  const uint64_t target = prefix_mass(top_p, total);
  int64_t n = 0;
  for (uint64_t sum = 0; sum < target; ++n) sum += weights[n];
  c->n = n;
  return {c->values[n - 1], c->ids[n - 1]};
}

}  // namespace
}  // namespace fastattn
