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
  const Vec bound = Vec::set1(least), one = Vec::set1(1.0f);
  Vec count[2] = {Vec::zero(), Vec::zero()};  // exact: a lane counts less than 2^24
  int64_t i = 0;
  for (; i + Vec::kLanes < n; i += 2 * Vec::kLanes)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j)
      count[j] = count[j] + select(bound <= Vec::load(v + i + j * Vec::kLanes), one, Vec::zero());
  if (i < n) count[0] = count[0] + select(bound <= Vec::load(v + i), one, Vec::zero());
  float lanes[Vec::kLanes], sum = 0.0f;
  (count[0] + count[1]).store(lanes);
  for (float lane : lanes) sum += lane;
  return static_cast<int64_t>(sum);
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

// A bound that at least k logits reach, and that few do: one that k maxima of disjoint groups reach. Groups are those
// of summarize(), or where these are many, groups of groups.
template <class Vec, class T>
float bound_of_largest(const Row<Vec, T>& row, int64_t k, Candidates* c) {
  const int64_t n = Row<Vec, T>::maxima_of(row.size()), n2 = Row<Vec, float>::maxima_of(n);
  if (k > n) return kLowest;
  if (n2 >= 2 * k) {
    Row<Vec, float> groups(row.maxima(), n, c->work);
    groups.summarize();
    const float bound = loose_bound<Vec>(c->work, n2, k, groups.maximum());
    // A few groups of groups may hold all that is large, as in a sorted row.
    const int64_t count = count_reaching<Vec>(row.maxima(), n, bound);
    if (count <= 2 * k) return tighten<Vec>(row.maxima(), n, k, bound, count, groups.maximum());
  }
  Vec top = Vec::load(row.maxima());
  for (int64_t i = 0; i < n; i += Vec::kLanes) top = max(top, Vec::load(row.maxima() + i));
  return loose_bound<Vec>(row.maxima(), n, k, reduce_max(top));
}

// Puts a list of up to kSmallList tokens in the total order.
template <class Vec>
void sort_small(Candidates* c) {
  const int n = static_cast<int>(c->n);
  float values[kSmallList + Vec::kLanes], rank[kSmallList + Vec::kLanes];
  int32_t ids[kSmallList];
  memcpy(values, c->values, static_cast<size_t>(n) * sizeof *values);
  memcpy(ids, c->ids, static_cast<size_t>(n) * sizeof *ids);
  for (int i = 0; i < Vec::kLanes; ++i) values[n + i] = kMinusInfinity;
  const Vec one = Vec::set1(1.0f);
  for (int j = 0; j < n; j += Vec::kLanes) {
    const Vec x = Vec::load(values + j);
    Vec ahead = Vec::zero();  // how many come before each
    int i = 0;
    for (; i < j; ++i) ahead = ahead + select(x <= Vec::set1(values[i]), one, Vec::zero());
    for (; i < j + Vec::kLanes && i < n; ++i) {  // lanes after this one's come later if they are equal
      const uint32_t later = ~0u << (i - j) << 1;
      const Vec v = Vec::set1(values[i]);
      ahead = ahead + select((x < v) | ((x <= v) & Vec::lanes_of(later)), one, Vec::zero());
    }
    for (; i < n; ++i) ahead = ahead + select(x < Vec::set1(values[i]), one, Vec::zero());
    ahead.store(rank + j);
  }
  for (int i = 0; i < n; ++i) {
    const int place = static_cast<int>(rank[i]);
    c->values[place] = values[i];
    c->ids[place] = ids[i];
  }
}

// top_k: the candidates then are what it keeps; up to kSmallList of them in the total order.
template <class Vec, class T>
Cut cut_top_k(const Row<Vec, T>& row, float max, int64_t k, Candidates* c) {
  Cut cut{bound_of_largest(row, k, c), INT32_MAX};
  // Where k tokens have the largest logit only the first k count; one more shows that there are others.
  row.gather(cut.value, c, cut.value == max ? k + 1 : INT64_MAX);
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
