// Arithmetic on sizes.
#pragma once

#include <cstdint>

namespace fastattn {
namespace {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline int64_t at_least(int64_t low, int64_t x) { return x < low ? low : x; }
inline int64_t at_most(int64_t high, int64_t x) { return x > high ? high : x; }

// A number as a type, for lambdas.
template <int kN>
struct Number {
  static constexpr int value = kN;
};

// fn(Number<n>) for n in 1 .. kMax.
template <int kMax, class Fn>
inline void visit_number(int n, Fn&& fn) {
  if constexpr (kMax > 1)
    if (n < kMax) return visit_number<kMax - 1>(n, fn);
  fn(Number<kMax>{});
}

}  // namespace
}  // namespace fastattn
