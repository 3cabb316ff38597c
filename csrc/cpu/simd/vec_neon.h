// Vec for AArch64 NEON: four lanes, fused multiply-add.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#include "cpu/simd/compress.h"
#include "params.h"

namespace fastattn {
namespace {

struct VecNeon {
  using Real = float;
  static constexpr int kLanes = 4;
  // 4 x 4 accumulators, 4 row vectors and a broadcast: 21 of 32 registers.
  static constexpr int kTileVecs = 4;
  static constexpr int kTileCols = 4;

  struct Mask {
    uint32x4_t m;
  };
  float32x4_t r;

  // Integers and doubles as wide as a Vec, in the compiler's vector types: their + - * ^ & << >> need no verbs.
  typedef uint32_t U32 __attribute__((vector_size(16)));  // kLanes
  typedef uint64_t U64 __attribute__((vector_size(16)));  // kLanes / 2
  typedef double F64 __attribute__((vector_size(16)));    // kLanes / 2

  static VecNeon set1(float x) { return {vdupq_n_f32(x)}; }
  static VecNeon zero() { return set1(0.0f); }

  static VecNeon load(const float* p) { return {vld1q_f32(p)}; }
  static VecNeon load(const bf16_t* p) {
    return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)), 16))};
  }
  static VecNeon load(const f16_t* p) {
    return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))))};
  }
  static VecNeon load(const int8_t* p) {
    int32_t bytes;
    memcpy(&bytes, p, sizeof bytes);
    return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(bytes))))))};
  }
  template <class T>
  static VecNeon load_n(const T* p, int n) {
    T padded[kLanes] = {};
    memcpy(padded, p, static_cast<size_t>(n) * sizeof(T));
    return load(padded);
  }
  static VecNeon gather(const float* p, const int32_t* i) {  // p[i[lane]]
    const float v[4] = {p[i[0]], p[i[1]], p[i[2]], p[i[3]]};
    return load(v);
  }
  template <class Half>
  static VecNeon gather(const Half* p, const int32_t* i) {
    const Half v[4] = {p[i[0]], p[i[1]], p[i[2]], p[i[3]]};
    return load(v);
  }
  static float single(const f16_t* p) { return first(load_n(p, 1)); }
  // The even and the odd halves of 2 * kLanes bf16, held as pairs in 32-bit words.
  static VecNeon even_bf16(VecNeon words) {
    return {vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_f32(words.r), 16))};
  }
  static VecNeon odd_bf16(VecNeon words) {
    return {vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(words.r), vdupq_n_u32(0xffff0000u)))};
  }
  void store(float* p) const { vst1q_f32(p, r); }
  void store(bf16_t* p) const {  // to nearest, ties to even; NaN stays a quiet NaN
    const uint32x4_t bits = vreinterpretq_u32_f32(r);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    const uint32x4_t words = vbslq_u32(vceqq_f32(r, r), rounded, quiet);
    vst1_u16(reinterpret_cast<uint16_t*>(p), vshrn_n_u32(words, 16));
  }
  void store(f16_t* p) const { vst1_u16(reinterpret_cast<uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32(r))); }
  template <class T>
  void store_n(T* p, int n) const {
    T all[kLanes];
    store(all);
    memcpy(p, all, static_cast<size_t>(n) * sizeof(T));
  }

  friend VecNeon operator+(VecNeon a, VecNeon b) { return {vaddq_f32(a.r, b.r)}; }
  friend VecNeon operator-(VecNeon a, VecNeon b) { return {vsubq_f32(a.r, b.r)}; }
  friend VecNeon operator*(VecNeon a, VecNeon b) { return {vmulq_f32(a.r, b.r)}; }
  friend VecNeon operator/(VecNeon a, VecNeon b) { return {vdivq_f32(a.r, b.r)}; }
  friend VecNeon fma(VecNeon a, VecNeon b, VecNeon c) { return {vfmaq_f32(c.r, a.r, b.r)}; }
  friend VecNeon max(VecNeon a, VecNeon b) { return {vbslq_f32(vcgtq_f32(a.r, b.r), a.r, b.r)}; }
  friend VecNeon min(VecNeon a, VecNeon b) { return {vbslq_f32(vcltq_f32(a.r, b.r), a.r, b.r)}; }
  friend Mask operator<(VecNeon a, VecNeon b) { return {vcltq_f32(a.r, b.r)}; }
  friend Mask operator<=(VecNeon a, VecNeon b) { return {vcleq_f32(a.r, b.r)}; }
  friend Mask both_ordered(Mask m, VecNeon a, VecNeon b) {  // the lanes of m where neither is NaN
    return {vandq_u32(m.m, vandq_u32(vceqq_f32(a.r, a.r), vceqq_f32(b.r, b.r)))};
  }
  friend Mask operator|(Mask a, Mask b) { return {vorrq_u32(a.m, b.m)}; }
  friend Mask operator&(Mask a, Mask b) { return {vandq_u32(a.m, b.m)}; }
  friend uint32_t lane_bits(Mask m) {
    const uint32_t weights[kLanes] = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32(m.m, vld1q_u32(weights)));
  }
  friend int lane_count(Mask m) { return static_cast<int>(vaddvq_u32(vshrq_n_u32(m.m, 31))); }
  static Mask lanes_of(uint32_t bits) {  // the inverse of lane_bits
    const uint32_t weights[kLanes] = {1, 2, 4, 8};
    return {vtstq_u32(vdupq_n_u32(bits), vld1q_u32(weights))};
  }
  friend VecNeon select(Mask m, VecNeon a, VecNeon b) { return {vbslq_f32(m.m, a.r, b.r)}; }

  friend VecNeon round(VecNeon x) { return {vrndnq_f32(x.r)}; }
  // x = n + r with an integral n and |r| <= 1/2; what is so small that exp2 makes zero of it, -inf too, counts as -150.
  static void split(VecNeon x, VecNeon* n, VecNeon* r) {
    x = max(set1(-150.0f), x);  // -inf - round(-inf) would be NaN; a NaN passes through
    *n = round(x);
    *r = x - *n;
  }
  // x * 2^n for an integral n; zero where n <= -127.
  friend VecNeon ldexp(VecNeon x, VecNeon n) {
    const int32x4_t e = vmaxq_s32(vaddq_s32(vcvtnq_s32_f32(n.r), vdupq_n_s32(127)), vdupq_n_s32(0));
    return {vmulq_f32(x.r, vreinterpretq_f32_s32(vshlq_n_s32(e, 23)))};
  }
  friend float reduce_max(VecNeon v) { return vmaxvq_f32(v.r); }
  // Of a block of 16: the largest of every fourth.
  static VecNeon max_of_fourths(const float* p) {
    return max(max(load(p), load(p + 4)), max(load(p + 8), load(p + 12)));
  }
  friend float first(VecNeon v) { return vgetq_lane_f32(v.r, 0); }

  friend U32 as_bits(VecNeon v) { return reinterpret_cast<U32>(v.r); }
  static VecNeon from_bits(U32 x) { return {reinterpret_cast<float32x4_t>(x)}; }
  static VecNeon from_int(U32 x) { return {vcvtq_f32_s32(reinterpret_cast<int32x4_t>(x))}; }  // signed
  friend F64 widen_low(VecNeon v) { return reinterpret_cast<F64>(vcvt_f64_f32(vget_low_f32(v.r))); }
  friend F64 widen_high(VecNeon v) { return reinterpret_cast<F64>(vcvt_high_f64_f32(v.r)); }
  static F64 widen(const int32_t* p) { return F64{static_cast<double>(p[0]), static_cast<double>(p[1])}; }
  static F64 max_f64(F64 a, F64 b) { return a > b ? a : b; }
  static U64 mul_low32(U64 a, U64 b) {  // the full products of the low halves
    const uint32x2_t x = vmovn_u64(reinterpret_cast<uint64x2_t>(a)), y = vmovn_u64(reinterpret_cast<uint64x2_t>(b));
    return reinterpret_cast<U64>(vmull_u32(x, y));
  }
  static U64 even_pairs(U64 a, U64 b) { return U64{a[0], b[0]}; }
  static U64 odd_pairs(U64 a, U64 b) { return U64{a[1], b[1]}; }
  static uint64_t bytes_reaching(U64 x, uint8_t least) { return portable_bytes_reaching(x, least); }
  // Packs the chosen lanes of x and their ids (first_id + lane) to the front; returns how many. May write kLanes.
  static int compress(Mask m, VecNeon x, int32_t first_id, float* values, int32_t* ids) {
    float lanes[kLanes];
    x.store(lanes);
    return compress_lanes(lane_bits(m), lanes, first_id, values, ids);
  }

  // rows[i][j] <-> rows[j][i]
  static void transpose(VecNeon (&rows)[kLanes]) {
    const float32x4x2_t a = vtrnq_f32(rows[0].r, rows[1].r), b = vtrnq_f32(rows[2].r, rows[3].r);
    rows[0].r = vcombine_f32(vget_low_f32(a.val[0]), vget_low_f32(b.val[0]));
    rows[1].r = vcombine_f32(vget_low_f32(a.val[1]), vget_low_f32(b.val[1]));
    rows[2].r = vcombine_f32(vget_high_f32(a.val[0]), vget_high_f32(b.val[0]));
    rows[3].r = vcombine_f32(vget_high_f32(a.val[1]), vget_high_f32(b.val[1]));
  }
};

}  // namespace
}  // namespace fastattn
