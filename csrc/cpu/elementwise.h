// The per-token steps between the linear layers of a decoder. One row is one chain of fixed operations on one thread:
// its bits depend on nothing but the row.
#pragma once

#include "cpu/integers.h"
#include "cpu/parallel.h"
#include "cpu/vec_math.h"
#include "params.h"

namespace fastattn {
namespace {

// fn(row) for every row, in items of about kItemValues values; what fits one item stays on one thread.
template <class Fn>
void for_rows(int64_t rows, int64_t values_per_row, int nthreads, Fn&& fn) {
  constexpr int64_t kItemValues = int64_t{1} << 14;
  const int64_t step = 1 + kItemValues / (1 + values_per_row);
  parallel_for(ceil_div(rows, step), nthreads, [&](int64_t item) {
    const int64_t end = (item + 1) * step < rows ? (item + 1) * step : rows;
    for (int64_t row = item * step; row < end; ++row) fn(row);
  });
}

// fn(offset, load, store) for the vectors of n values; load and store take the last one's missing lanes into account.
template <class Vec, class Fn>
inline __attribute__((always_inline)) void for_vectors(int64_t n, Fn&& fn) {
  int64_t i = 0;
  for (; i + Vec::kLanes <= n; i += Vec::kLanes)
    fn(i, [](const float* p) { return Vec::load(p); }, [](Vec v, float* p) { v.store(p); });
  const int left = static_cast<int>(n - i);
  if (left > 0)
    fn(i, [left](const float* p) { return Vec::load_n(p, left); }, [left](Vec v, float* p) { v.store_n(p, left); });
}

// Lane by lane, in order.
template <class Vec>
inline float sum_lanes(Vec v) {
  float lanes[Vec::kLanes];
  v.store(lanes);
  float sum = lanes[0];
  for (int i = 1; i < Vec::kLanes; ++i) sum += lanes[i];
  return sum;
}

// out = x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich, arXiv 1910.07467).
template <class Vec>
void rms_norm(const RmsNormParams& p) {
  for_rows(p.tokens, p.hidden, p.nthreads, [&](int64_t token) {
    const float* x = p.x + token * p.stride_x;
    float* out = p.out + token * p.hidden;
    Vec squares = Vec::zero();
    for_vectors<Vec>(p.hidden, [&](int64_t i, auto load, auto) {
      const Vec v = load(x + i);
      squares = fma(v, v, squares);
    });
    const float mean = sum_lanes(squares) / static_cast<float>(p.hidden);
    const Vec scale = Vec::set1(1.0f / __builtin_sqrtf(mean + p.eps));
    for_vectors<Vec>(
        p.hidden, [&](int64_t i, auto load, auto store) { store(load(x + i) * scale * load(p.weight + i), out + i); });
  });
}

// factor / (1 + exp(-x)). exp2 ends at 126: below -87 it counts as 2^-126 instead of less.
template <class Vec>
inline Vec times_sigmoid(Vec factor, Vec x) {
  const Vec e = exp2(min(Vec::set1(126.0f), x * Vec::set1(static_cast<float>(-kLog2e))));
  return factor / (Vec::set1(1.0f) + e);
}

// x times the normal distribution's share below x (Hendrycks and Gimpel, arXiv 1606.08415).
template <class Vec>
inline Vec gelu(Vec x) {
  const Vec below = normal_tail(abs(x));
  return x * select(x < Vec::zero(), below, Vec::set1(1.0f) - below);
}

// Its approximation x * (1 + tanh(u)) / 2 with u = sqrt(2 / pi) * (x + 0.044715 x^3), which is x * sigmoid(2 u).
template <class Vec>
inline Vec gelu_tanh(Vec x) {
  constexpr float kTwice = 1.5957691216057308f;  // 2 sqrt(2 / pi)
  return times_sigmoid(x, x * fma(x * x, Vec::set1(kTwice * 0.044715f), Vec::set1(kTwice)));
}

// out = fn(x), or fn(gate) * up (Shazeer, arXiv 2002.05202).
template <class Vec, class Fn>
void activate_rows(const ActivateParams& p, Fn&& fn) {
  for_rows(p.tokens, p.gated ? 2 * p.ffn : p.ffn, p.nthreads, [&](int64_t token) {
    const float* x = p.x + token * p.stride_x;
    const float* up = x + p.ffn;
    float* out = p.out + token * p.ffn;
    if (p.gated)
      for_vectors<Vec>(p.ffn,
                       [&](int64_t i, auto load, auto store) { store(fn(load(x + i)) * load(up + i), out + i); });
    else
      for_vectors<Vec>(p.ffn, [&](int64_t i, auto load, auto store) { store(fn(load(x + i)), out + i); });
  });
}

template <class Vec>
void activate(const ActivateParams& p) {
  switch (p.kind) {
    case Activation::silu: return activate_rows<Vec>(p, [](Vec x) { return times_sigmoid(x, x); });
    case Activation::gelu: return activate_rows<Vec>(p, [](Vec x) { return gelu(x); });
    case Activation::gelu_tanh: return activate_rows<Vec>(p, [](Vec x) { return gelu_tanh(x); });
    case Activation::relu: return activate_rows<Vec>(p, [](Vec x) { return select(x < Vec::zero(), Vec::zero(), x); });
  }
}

}  // namespace
}  // namespace fastattn
