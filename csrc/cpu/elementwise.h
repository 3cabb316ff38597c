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

// out = silu(gate) * up, silu(g) = g / (1 + exp(-g)) (Shazeer, arXiv 2002.05202).
template <class Vec>
void silu_mul(const SiluMulParams& p) {
  for_rows(p.tokens, 2 * p.ffn, p.nthreads, [&](int64_t token) {
    const float* gate = p.gate_up + token * p.stride_gate_up;
    const float* up = gate + p.ffn;
    float* out = p.out + token * p.ffn;
    for_vectors<Vec>(p.ffn, [&](int64_t i, auto load, auto store) {
      const Vec g = load(gate + i);
      // exp2 ends at 126: a gate below -87 counts as 2^-126 of itself instead of less.
      const Vec e = exp2(min(Vec::set1(126.0f), g * Vec::set1(static_cast<float>(-kLog2e))));
      store(g / (Vec::set1(1.0f) + e) * load(up + i), out + i);
    });
  });
}

}  // namespace
}  // namespace fastattn
