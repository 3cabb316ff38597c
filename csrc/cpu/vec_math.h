// Elementary functions on Vec. Elementwise: a value's bits do not depend on its lane or neighbours.
#pragma once

namespace fastattn {
namespace {

constexpr double kLog2e = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

inline float log2_of(float x) { return __builtin_log2f(x); }
inline double log2_of(double x) { return __builtin_log2(x); }

template <class Vec>
inline Vec abs(Vec x) {
  return max(x, Vec::zero() - x);
}

// 2^x for x <= 126, within 1.6e-7 relative; exactly 0 for x <= -127, -inf included; exactly 1 for 0.
// 2^x = 2^n 2^r with n = round(x); the polynomial is minimax for 2^r on [-1/2, 1/2] with the constant term fixed at 1.
// In double: x <= 1022, 1e-15, and the Taylor series.
template <class Vec>
inline Vec exp2(Vec x) {
  Vec n, r;
  Vec::split(x, &n, &r);
  if constexpr (sizeof(typename Vec::Real) == 8) {
    constexpr double kTerms[] = {1.3691488853904129e-12, 2.5678435993488206e-11,
                                 4.4455382718708115e-10, 7.0549116208011234e-9,
                                 1.0178086009239699e-7,  1.3215486790144309e-6,
                                 1.5252733804059840e-5,  1.5403530393381609e-4,
                                 1.3333558146428443e-3,  9.6181291076284772e-3,
                                 5.5504108664821579e-2,  2.4022650695910071e-1,
                                 6.9314718055994531e-1,  1.0};  // ln(2)^k / k!, from k = 13 down to 0
    Vec p = Vec::set1(kTerms[0]);
    for (int k = 1; k < 14; ++k) p = fma(p, r, Vec::set1(kTerms[k]));
    return ldexp(p, n);
  } else {
    Vec p = Vec::set1(0x1.5bba14p-10f);
    p = fma(p, r, Vec::set1(0x1.3cea88p-7f));
    p = fma(p, r, Vec::set1(0x1.c6b752p-5f));
    p = fma(p, r, Vec::set1(0x1.ebf9bcp-3f));
    p = fma(p, r, Vec::set1(0x1.62e42ap-1f));
    p = fma(p, r, Vec::set1(1.0f));
    return ldexp(p, n);
  }
}

// tanh within 2e-7 relative: an odd polynomial near zero, where 1 - 2 / (e^2x + 1) would cancel.
template <class Vec>
inline Vec tanh(Vec x) {
  if constexpr (sizeof(typename Vec::Real) == 8) {
    Vec t = x;
    for (int i = 0; i < Vec::kLanes; ++i) t.r[i] = __builtin_tanh(x.r[i]);
    return t;
  } else {
    const Vec size = abs(x), square = x * x;
    Vec p = Vec::set1(-0x1.75e224p-8f);
    p = fma(p, square, Vec::set1(0x1.5226b2p-6f));
    p = fma(p, square, Vec::set1(-0x1.b83c5ep-5f));
    p = fma(p, square, Vec::set1(0x1.110726p-3f));
    p = fma(p, square, Vec::set1(-0x1.555532p-2f));
    const Vec near = fma(p, square * x, x);
    const Vec e = exp2(min(Vec::set1(10.0f), size) * Vec::set1(static_cast<float>(2 * kLog2e)));
    const Vec far = Vec::set1(1.0f) - Vec::set1(2.0f) / (e + Vec::set1(1.0f));
    return select(size < Vec::set1(0.625f), near, select(x < Vec::zero(), Vec::zero() - far, far));
  }
}

// The normal distribution's share beyond a >= 0, erfc(a / sqrt(2)) / 2, within 8e-7 relative; 0 where a > 13.3.
// It is exp(-a^2 / 2) t P(t) with t = 1 / (1 + 0.3 a); P is minimax in relative error.
template <class Vec>
inline Vec normal_tail(Vec a) {
  const Vec t = Vec::set1(1.0f) / fma(a, Vec::set1(0.3f), Vec::set1(1.0f));
  Vec p = Vec::set1(0x1.273572p-5f);
  p = fma(p, t, Vec::set1(-0x1.450b7ep-3f));
  p = fma(p, t, Vec::set1(0x1.abf562p-3f));
  p = fma(p, t, Vec::set1(-0x1.cb88c2p-5f));
  p = fma(p, t, Vec::set1(0x1.09eb3ep-3f));
  p = fma(p, t, Vec::set1(0x1.97a58ep-4f));
  p = fma(p, t, Vec::set1(0x1.eeddb0p-4f));
  p = fma(p, t, Vec::set1(0x1.e9fc14p-4f));
  return exp2(a * a * Vec::set1(static_cast<float>(-0.5 * kLog2e))) * t * p;
}

}  // namespace
}  // namespace fastattn
