// Vec of doubles, in the compiler's portable vector type: attention in float64, for gradient checks, not for speed.
#pragma once

#include <cstdint>
#include <cstring>

#include "params.h"

namespace fastattn {
namespace {

// GCC cannot make a vector type whose width is a template's parameter.
template <int kBytes>
struct F64Registers;
template <>
struct F64Registers<16> {
  typedef double Reg __attribute__((vector_size(16)));
  typedef int64_t Int __attribute__((vector_size(16)));
  typedef uint64_t U64 __attribute__((vector_size(16)));
};
template <>
struct F64Registers<32> {
  typedef double Reg __attribute__((vector_size(32)));
  typedef int64_t Int __attribute__((vector_size(32)));
  typedef uint64_t U64 __attribute__((vector_size(32)));
};
template <>
struct F64Registers<64> {
  typedef double Reg __attribute__((vector_size(64)));
  typedef int64_t Int __attribute__((vector_size(64)));
  typedef uint64_t U64 __attribute__((vector_size(64)));
};

// kBytes is the width of the ISA's registers.
template <int kBytes>
struct VecF64 {
  using Real = double;
  static constexpr int kLanes = kBytes / 8;
  static constexpr int kTileVecs = 2;
  static constexpr int kTileCols = kLanes < 4 ? 2 : 4;  // divides kLanes

  using Reg = typename F64Registers<kBytes>::Reg;
  using Int = typename F64Registers<kBytes>::Int;
  using U64 = typename F64Registers<kBytes>::U64;  // kLanes
  struct Mask {
    Int m;
  };
  Reg r;

  static VecF64 set1(double x) { return {Reg{} + x}; }
  static VecF64 zero() { return {Reg{}}; }
  static VecF64 load(const double* p) {
    VecF64 v;
    memcpy(&v.r, p, sizeof v.r);
    return v;
  }
  static VecF64 load(const int8_t* p) { return load_n(p, kLanes); }
  template <class T>
  static VecF64 load_n(const T* p, int n) {  // the first n lanes, the others zero
    VecF64 v = zero();
    for (int i = 0; i < n; ++i) v.r[i] = p[i];
    return v;
  }
  void store(double* p) const { memcpy(p, &r, sizeof r); }
  void store_n(double* p, int n) const {
    for (int i = 0; i < n; ++i) p[i] = r[i];
  }

  friend VecF64 operator+(VecF64 a, VecF64 b) { return {a.r + b.r}; }
  friend VecF64 operator-(VecF64 a, VecF64 b) { return {a.r - b.r}; }
  friend VecF64 operator*(VecF64 a, VecF64 b) { return {a.r * b.r}; }
  friend VecF64 operator/(VecF64 a, VecF64 b) { return {a.r / b.r}; }
  friend VecF64 fma(VecF64 a, VecF64 b, VecF64 c) { return {a.r * b.r + c.r}; }
  friend VecF64 max(VecF64 a, VecF64 b) { return {a.r > b.r ? a.r : b.r}; }  // b where either is NaN
  friend VecF64 min(VecF64 a, VecF64 b) { return {a.r < b.r ? a.r : b.r}; }
  friend Mask operator<(VecF64 a, VecF64 b) { return {a.r < b.r}; }
  friend Mask operator<=(VecF64 a, VecF64 b) { return {a.r <= b.r}; }
  friend Mask operator|(Mask a, Mask b) { return {a.m | b.m}; }
  friend Mask operator&(Mask a, Mask b) { return {a.m & b.m}; }
  friend VecF64 select(Mask m, VecF64 a, VecF64 b) { return {m.m ? a.r : b.r}; }

  // Nearest integer for |x| < 2^51.
  friend VecF64 round(VecF64 x) {
    const VecF64 magic = set1(0x1.8p52);
    return (x + magic) - magic;
  }
  // x = n + r with an integral n and |r| <= 1/2; what is so small that exp2 makes zero of it, -inf too, counts as
  // -1100.
  static void split(VecF64 x, VecF64* n, VecF64* r) {
    x = max(set1(-1100), x);  // -inf - round(-inf) would be NaN; a NaN passes through
    *n = round(x);
    *r = x - *n;
  }
  // x * 2^n for an integral n; zero where n <= -1023.
  friend VecF64 ldexp(VecF64 x, VecF64 n) {
    Int e = __builtin_convertvector(n.r, Int) + 1023;
    e = (e > 0 ? e : Int{}) << 52;
    Reg scale;
    memcpy(&scale, &e, sizeof scale);
    return {x.r * scale};
  }
  friend double reduce_max(VecF64 v) {
    double top = v.r[0];
    for (int i = 1; i < kLanes; ++i) top = v.r[i] > top ? v.r[i] : top;
    return top;
  }
  friend double first(VecF64 v) { return v.r[0]; }
  static U64 mul_low32(U64 a, U64 b) { return (a & 0xffffffffu) * (b & 0xffffffffu); }  // products of the low halves

  // rows[i][j] <-> rows[j][i]
  static void transpose(VecF64 (&rows)[kLanes]) {
    for (int i = 0; i < kLanes; ++i)
      for (int j = 0; j < i; ++j) {
        const double t = rows[i].r[j];
        rows[i].r[j] = rows[j].r[i];
        rows[j].r[i] = t;
      }
  }
};

}  // namespace
}  // namespace fastattn
