// Vec without intrinsics: four lanes in the compiler's portable vector type (SSE2 on any x86-64).
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/simd/compress.h"
#include "params.h"

namespace fastattn {
namespace {

inline float to_float(float x) { return x; }
inline float to_float(int8_t x) { return x; }

inline float to_float(bf16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline float to_float(f16_t x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  float value;
  if (magnitude >= 0x7c00u) {  // inf, NaN
    const uint32_t bits = 0x7f800000u | (magnitude << 13);
    memcpy(&value, &bits, sizeof value);
  } else {
    // Shifted into place the exponent is short by 112: one exact multiplication mends it, denormals included.
    const uint32_t bits = magnitude << 13;
    memcpy(&value, &bits, sizeof value);
    value *= 0x1p112f;
  }
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  bits |= sign;
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline void from_float(float x, float* out) { *out = x; }

inline void from_float(float x, bf16_t* out) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);  // to nearest, ties to even
  out->bits = static_cast<uint16_t>(is_nan ? (bits >> 16) | 0x40u : rounded >> 16);
}

inline void from_float(float x, f16_t* out) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) {  // NaN
    out->bits = static_cast<uint16_t>(sign | 0x7e00u | ((bits >> 13) & 0x3ffu));
  } else if (bits >= 0x477ff000u) {  // 65520 and above round to inf
    out->bits = static_cast<uint16_t>(sign | 0x7c00u);
  } else if (bits < 0x38800000u) {  // below 2^-14: let an addition do the rounding at the denormal's last place
    float value;
    memcpy(&value, &bits, sizeof value);
    value += 0.5f;
    uint32_t sum;
    memcpy(&sum, &value, sizeof sum);
    out->bits = static_cast<uint16_t>(sign | (sum - 0x3f000000u));
  } else {
    const uint32_t rounded = bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u);
    out->bits = static_cast<uint16_t>(sign | (rounded >> 13));
  }
}

struct VecScalar {
  using Real = float;
  static constexpr int kLanes = 4;
  // The register tile of tile_gemm.h: kTileVecs vectors of rows by kTileCols columns.
  static constexpr int kTileVecs = 2;
  static constexpr int kTileCols = 4;

  typedef float Reg __attribute__((vector_size(16)));
  typedef int32_t Int __attribute__((vector_size(16)));
  struct Mask {
    Int m;
  };
  Reg r;

  // Integers and doubles as wide as a Vec, in the compiler's vector types: their + - * ^ & << >> need no verbs.
  typedef uint32_t U32 __attribute__((vector_size(16)));  // kLanes
  typedef uint64_t U64 __attribute__((vector_size(16)));  // kLanes / 2
  typedef double F64 __attribute__((vector_size(16)));    // kLanes / 2

  static VecScalar set1(float x) { return {Reg{x, x, x, x}}; }
  static VecScalar zero() { return set1(0.0f); }

  static VecScalar load(const float* p) {
    VecScalar v;
    memcpy(&v.r, p, sizeof v.r);
    return v;
  }
  template <class T>
  static VecScalar load(const T* p) {
    return {Reg{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}};
  }
  template <class T>
  static VecScalar load_n(const T* p, int n) {  // the first n lanes, the others zero
    VecScalar v = zero();
    for (int i = 0; i < n; ++i) v.r[i] = to_float(p[i]);
    return v;
  }
  template <class T>
  static VecScalar gather(const T* p, const int32_t* i) {  // p[i[lane]]
    return {Reg{to_float(p[i[0]]), to_float(p[i[1]]), to_float(p[i[2]]), to_float(p[i[3]])}};
  }
  static float single(const f16_t* p) { return to_float(*p); }
  // The even and the odd halves of 2 * kLanes bf16, held as pairs in 32-bit words.
  static VecScalar even_bf16(VecScalar words) { return {reinterpret_cast<Reg>(reinterpret_cast<Int>(words.r) << 16)}; }
  static VecScalar odd_bf16(VecScalar words) {
    return {reinterpret_cast<Reg>(reinterpret_cast<Int>(words.r) & -0x10000)};
  }
  void store(float* p) const { memcpy(p, &r, sizeof r); }
  template <class T>
  void store(T* p) const {
    store_n(p, kLanes);
  }
  template <class T>
  void store_n(T* p, int n) const {
    for (int i = 0; i < n; ++i) from_float(r[i], p + i);
  }

  friend VecScalar operator+(VecScalar a, VecScalar b) { return {a.r + b.r}; }
  friend VecScalar operator-(VecScalar a, VecScalar b) { return {a.r - b.r}; }
  friend VecScalar operator*(VecScalar a, VecScalar b) { return {a.r * b.r}; }
  friend VecScalar operator/(VecScalar a, VecScalar b) { return {a.r / b.r}; }
  friend VecScalar fma(VecScalar a, VecScalar b, VecScalar c) { return {a.r * b.r + c.r}; }  // a * b + c
  friend VecScalar max(VecScalar a, VecScalar b) { return {a.r > b.r ? a.r : b.r}; }         // b where either is NaN
  friend VecScalar min(VecScalar a, VecScalar b) { return {a.r < b.r ? a.r : b.r}; }
  friend Mask operator<(VecScalar a, VecScalar b) { return {a.r < b.r}; }
  friend Mask operator<=(VecScalar a, VecScalar b) { return {a.r <= b.r}; }
  friend Mask both_ordered(Mask m, VecScalar a, VecScalar b) {  // the lanes of m where neither is NaN
    return {m.m & (a.r == a.r) & (b.r == b.r)};
  }
  friend Mask operator|(Mask a, Mask b) { return {a.m | b.m}; }
  friend Mask operator&(Mask a, Mask b) { return {a.m & b.m}; }
  friend uint32_t lane_bits(Mask m) {  // bit i is lane i
    const Int weighted = m.m & Int{1, 2, 4, 8};
    return static_cast<uint32_t>(weighted[0] | weighted[1] | weighted[2] | weighted[3]);
  }
  friend int lane_count(Mask m) { return -(m.m[0] + m.m[1] + m.m[2] + m.m[3]); }
  static Mask lanes_of(uint32_t bits) {  // the inverse of lane_bits
    const int32_t all = static_cast<int32_t>(bits);
    return {(Int{all, all, all, all} & Int{1, 2, 4, 8}) != 0};
  }
  friend VecScalar select(Mask m, VecScalar a, VecScalar b) { return {m.m ? a.r : b.r}; }

  // Nearest integer for |x| < 2^22.
  friend VecScalar round(VecScalar x) {
    const VecScalar magic = set1(0x1.8p23f);
    return (x + magic) - magic;
  }
  // x = n + r with an integral n and |r| <= 1/2; what is so small that exp2 makes zero of it, -inf too, counts as -150.
  static void split(VecScalar x, VecScalar* n, VecScalar* r) {
    x = max(set1(-150.0f), x);  // -inf - round(-inf) would be NaN; a NaN passes through
    *n = round(x);
    *r = x - *n;
  }
  // x * 2^n for an integral n; zero where n <= -127.
  friend VecScalar ldexp(VecScalar x, VecScalar n) {
    Int e = __builtin_convertvector(n.r, Int) + 127;
    e = (e > 0 ? e : Int{0, 0, 0, 0}) << 23;
    Reg scale;
    memcpy(&scale, &e, sizeof scale);
    return {x.r * scale};
  }
  friend float reduce_max(VecScalar v) {
    const float a = v.r[0] > v.r[1] ? v.r[0] : v.r[1], b = v.r[2] > v.r[3] ? v.r[2] : v.r[3];
    return a > b ? a : b;
  }
  // Of a block of 16: the largest of every fourth.
  static VecScalar max_of_fourths(const float* p) {
    return max(max(load(p), load(p + 4)), max(load(p + 8), load(p + 12)));
  }
  friend float first(VecScalar v) { return v.r[0]; }

  friend U32 as_bits(VecScalar v) { return reinterpret_cast<U32>(v.r); }
  static VecScalar from_bits(U32 x) { return {reinterpret_cast<Reg>(x)}; }
  static VecScalar from_int(U32 x) { return {__builtin_convertvector(reinterpret_cast<Int>(x), Reg)}; }  // signed
  friend F64 widen_low(VecScalar v) { return F64{v.r[0], v.r[1]}; }
  friend F64 widen_high(VecScalar v) { return F64{v.r[2], v.r[3]}; }
  static F64 widen(const int32_t* p) { return F64{static_cast<double>(p[0]), static_cast<double>(p[1])}; }
  static F64 max_f64(F64 a, F64 b) { return a > b ? a : b; }
  static U64 mul_low32(U64 a, U64 b) { return (a & 0xffffffffu) * (b & 0xffffffffu); }  // products of the low halves
  static U64 even_pairs(U64 a, U64 b) { return U64{a[0], b[0]}; }                       // a0 b0
  static U64 odd_pairs(U64 a, U64 b) { return U64{a[1], b[1]}; }                        // a1 b1
  static uint64_t bytes_reaching(U64 x, uint8_t least) { return portable_bytes_reaching(x, least); }
  // Packs the chosen lanes of x and their ids (first_id + lane) to the front; returns how many. May write kLanes.
  static int compress(Mask m, VecScalar x, int32_t first_id, float* values, int32_t* ids) {
    float lanes[kLanes];
    x.store(lanes);
    return compress_lanes(lane_bits(m), lanes, first_id, values, ids);
  }

  // rows[i][j] <-> rows[j][i]
  static void transpose(VecScalar (&rows)[kLanes]) {
    for (int i = 0; i < kLanes; ++i)
      for (int j = 0; j < i; ++j) {
        const float t = rows[i].r[j];
        rows[i].r[j] = rows[j].r[i];
        rows[j].r[i] = t;
      }
  }
};

}  // namespace
}  // namespace fastattn
