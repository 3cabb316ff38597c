// What every machine that samples agrees on, bit for bit: the order of a row's tokens and what each of them weighs.
//
// Probability mass is counted in integers: a token weighs round(2^41 exp((logit - max) / temperature)). Integer sums do
// not depend on their order, so a cut has one value on every machine, in any blocking and under any search; and each
// weight comes from correctly rounded double operations, none of them fused: compilers must not contract them. Against
// exact arithmetic a token's weight is off by at most 2^-41 of the most likely token's: two prefixes count as equal
// when they differ by less than that per token.
#pragma once

#include <cstdint>
#include <cstring>

#include "rng.h"  // FASTATTN_HOST_DEVICE

namespace fastattn {
namespace {

constexpr float kLowest = -__FLT_MAX__;  // every finite logit is >= this
constexpr float kMinusInfinity = -__builtin_inff();

template <class To, class From>
FASTATTN_HOST_DEVICE inline __attribute__((always_inline)) To bits_as(const From& x) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To y;
  memcpy(&y, &x, sizeof y);
  return y;
}

// Ascending unsigned integers for ascending floats. Adding 0.0f beforehand makes the two zeros one.
FASTATTN_HOST_DEVICE inline uint32_t sort_key(float x) {
  const auto bits = bits_as<uint32_t>(x);
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}

FASTATTN_HOST_DEVICE inline float from_sort_key(uint32_t key) {
  return bits_as<float>(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

constexpr int kMassBits = 41;  // kMaxVocab tokens of the largest mass sum to 2^63

// What turns a difference of logits into a power of 2: log2(e) / temperature. Out of these bounds masses are 0 or the
// largest all the same, and (-inf) * 0 or 0 * inf would be NaN.
FASTATTN_HOST_DEVICE inline double log2_scale_of(double temperature) {
  const double scale = 1.4426950408889634 / temperature;
  return scale < 0x1p-1000 ? 0x1p-1000 : scale > 0x1p+1000 ? 0x1p+1000 : scale;
}

// round(2^(41 + t)) for t in [-64, 0]: doubles, or vectors of them.
// 2^t = 2^n 2^r with n = round(t); the polynomial is near-minimax for 2^r on [-1/2, 1/2], within 2^-44. Its terms are
// paired (Estrin), which is half as long a chain of operations as Horner's.
template <class U64, class F64>
FASTATTN_HOST_DEVICE inline __attribute__((always_inline)) U64 mass_of(F64 t) {
  const F64 round_to_integer = F64{} + 0x1.8p52;
  const F64 shifted = t + round_to_integer;
  const F64 r = t - (shifted - round_to_integer);
  const F64 r2 = r * r, r4 = r2 * r2;
  const F64 p01 = r * 0x1.62e42fefa39efp-1 + 1.0;
  const F64 p23 = r * 0x1.c6b08d7047e52p-5 + 0x1.ebfbdff823cedp-3;
  const F64 p45 = r * 0x1.5d87fe86fe88ep-10 + 0x1.3b2ab7181b755p-7;
  const F64 p67 = r * 0x1.ffcb9515a8016p-17 + 0x1.4308ac85aa947p-13;
  const F64 p89 = r * 0x1.b63880a30e9ffp-24 + 0x1.63d136366db24p-20;
  const F64 p = (p01 + p23 * r2) + ((p45 + p67 * r2) + p89 * r4) * r4;
  const F64 power = bits_as<F64>(bits_as<U64>(p) + (bits_as<U64>(shifted) << 52));
  const F64 unit = F64{} + 0x1p52 / (int64_t{1} << kMassBits);  // its last place is one unit of mass
  return bits_as<U64>(power + unit) - bits_as<U64>(unit);
}

// The mass that the shortest prefix with share top_p has to reach.
FASTATTN_HOST_DEVICE inline uint64_t prefix_mass(double top_p, uint64_t total) {
  const double wanted = __builtin_ceil(top_p * static_cast<double>(total));
  const uint64_t target = wanted < 1.0 ? 1 : static_cast<uint64_t>(wanted);
  return target < total ? target : total;
}

}  // namespace
}  // namespace fastattn
