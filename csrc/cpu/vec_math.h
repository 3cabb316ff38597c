// Elementary functions on Vec. Elementwise: a value's bits do not depend on its lane or neighbours.
#pragma once

namespace fastattn {
namespace {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// 2^x for x <= 126, within 1.6e-7 relative; exactly 0 for x <= -127, -inf included; exactly 1 for 0.
// 2^x = 2^n 2^r with n = round(x); the polynomial is minimax for 2^r on [-1/2, 1/2] with the constant term fixed at 1.
template <class Vec>
inline Vec exp2(Vec x) {
  x = max(Vec::set1(-150.0f), x);  // -inf - round(-inf) would be NaN; a NaN passes through
  const Vec n = round(x);
  const Vec r = x - n;
  Vec p = Vec::set1(0x1.5bba14p-10f);
  p = fma(p, r, Vec::set1(0x1.3cea88p-7f));
  p = fma(p, r, Vec::set1(0x1.c6b752p-5f));
  p = fma(p, r, Vec::set1(0x1.ebf9bcp-3f));
  p = fma(p, r, Vec::set1(0x1.62e42ap-1f));
  p = fma(p, r, Vec::set1(1.0f));
  return ldexp(p, n);
}

}  // namespace
}  // namespace fastattn
