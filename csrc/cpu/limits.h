// The machine's limits, measured: what benchmarks divide by.
#pragma once

#include "cpu/parallel.h"

namespace fastattn {
namespace {

// `iterations` rounds of independent FMAs that live in registers, on every thread; returns the FLOPs done.
template <class Vec>
double fma_loop(int64_t iterations, int nthreads) {
  constexpr int kChains = 12;  // covers a latency of 4 cycles on 2 ports, and still fits 16 registers
  parallel_for(nthreads, nthreads, [&](int64_t) {
    Vec sum[kChains];
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) sum[i] = Vec::set1(static_cast<float>(i));
    const Vec a = Vec::set1(0.999f), b = Vec::set1(0.5f);
    for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 16
      for (int i = 0; i < kChains; ++i) sum[i] = fma(sum[i], a, b);
    }
    Vec total = sum[0];
#pragma GCC unroll 16
    for (int i = 1; i < kChains; ++i) total = total + sum[i];
    volatile float keep = first(total);  // the loop must not be optimised away
    (void)keep;
  });
  return 2.0 * Vec::kLanes * kChains * static_cast<double>(iterations) * nthreads;
}

// Reads `floats` floats once, split over the threads in contiguous parts; returns their sum, so that none is skipped.
template <class Vec>
double read_loop(const float* data, int64_t floats, int nthreads) {
  constexpr int kChains = 8;
  const int64_t parts = 8 * nthreads, step = floats / parts / (kChains * Vec::kLanes) * (kChains * Vec::kLanes);
  double sums[1024] = {};
  parallel_for(parts < 1024 ? parts : 1024, nthreads, [&](int64_t part) {
    const float* p = data + part * step;
    Vec sum[kChains];
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) sum[i] = Vec::zero();
    for (int64_t n = 0; n < step; n += kChains * Vec::kLanes)
#pragma GCC unroll 16
      for (int i = 0; i < kChains; ++i) sum[i] = sum[i] + Vec::load(p + n + i * Vec::kLanes);
#pragma GCC unroll 16
    for (int i = 1; i < kChains; ++i) sum[0] = sum[0] + sum[i];
    sums[part] = first(sum[0]);
  });
  double total = 0.0;
  for (double sum : sums) total += sum;
  return total;
}

// The largest of `floats` floats, on one thread: one read of a row of logits, as fast as the cache that holds it.
template <class Vec>
float max_loop(const float* data, int64_t floats) {
  constexpr int kChains = 8, kStep = kChains * Vec::kLanes;
  Vec top[kChains];
#pragma GCC unroll 16
  for (int i = 0; i < kChains; ++i) top[i] = Vec::set1(data[0]);
  int64_t n = 0;
  for (; n + kStep <= floats; n += kStep)
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) top[i] = max(top[i], Vec::load(data + n + i * Vec::kLanes));
#pragma GCC unroll 16
  for (int i = 1; i < kChains; ++i) top[0] = max(top[0], top[i]);
  float largest = reduce_max(top[0]);
  for (; n < floats; ++n) largest = data[n] > largest ? data[n] : largest;
  return largest;
}

}  // namespace
}  // namespace fastattn
