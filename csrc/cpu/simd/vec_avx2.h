// Vec for AVX2 with FMA and F16C: eight lanes.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "cpu/simd/compress.h"
#include "params.h"

namespace fastattn {
namespace {

struct VecAvx2 {
  using Real = float;
  static constexpr int kLanes = 8;
  // 3 x 4 accumulators, 3 row vectors and a broadcast: all 16 registers.
  static constexpr int kTileVecs = 3;
  static constexpr int kTileCols = 4;

  struct Mask {
    __m256 m;
  };
  __m256 r;

  // Integers and doubles as wide as a Vec, in the compiler's vector types: their + - * ^ & << >> need no verbs.
  typedef uint32_t U32 __attribute__((vector_size(32)));  // kLanes
  typedef uint64_t U64 __attribute__((vector_size(32)));  // kLanes / 2
  typedef double F64 __attribute__((vector_size(32)));    // kLanes / 2

  static VecAvx2 set1(float x) { return {_mm256_set1_ps(x)}; }
  static VecAvx2 zero() { return {_mm256_setzero_ps()}; }

  static VecAvx2 load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static VecAvx2 load(const bf16_t* p) { return widen_bf16(_mm_loadu_si128((const __m128i*)p)); }
  static VecAvx2 load(const f16_t* p) { return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))}; }
  static VecAvx2 load(const int8_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)))};
  }
  static VecAvx2 load_n(const float* p, int n) { return {_mm256_maskload_ps(p, first_n(n))}; }
  template <class T>
  static VecAvx2 load_n(const T* p, int n) {
    T padded[kLanes] = {};
    memcpy(padded, p, static_cast<size_t>(n) * sizeof(T));
    return load(padded);
  }
  static VecAvx2 gather(const float* p, const int32_t* i) {  // p[i[lane]]
    return {_mm256_setr_ps(p[i[0]], p[i[1]], p[i[2]], p[i[3]], p[i[4]], p[i[5]], p[i[6]], p[i[7]])};
  }
  static VecAvx2 gather(const bf16_t* p, const int32_t* i) { return widen_bf16(gather_halves(p, i)); }
  static VecAvx2 gather(const f16_t* p, const int32_t* i) { return {_mm256_cvtph_ps(gather_halves(p, i))}; }
  static float single(const f16_t* p) { return _cvtsh_ss(p->bits); }
  // The even and the odd halves of 2 * kLanes bf16, held as pairs in 32-bit words.
  static VecAvx2 even_bf16(VecAvx2 words) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(words.r), 16))};
  }
  static VecAvx2 odd_bf16(VecAvx2 words) {
    return {_mm256_and_ps(words.r, _mm256_castsi256_ps(_mm256_set1_epi32(-0x10000)))};
  }
  void store(float* p) const { _mm256_storeu_ps(p, r); }
  void store(bf16_t* p) const { _mm_storeu_si128((__m128i*)p, narrow_bf16(r)); }
  void store(f16_t* p) const { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(r, _MM_FROUND_TO_NEAREST_INT)); }
  void store_n(float* p, int n) const { _mm256_maskstore_ps(p, first_n(n), r); }
  template <class T>
  void store_n(T* p, int n) const {
    T all[kLanes];
    store(all);
    memcpy(p, all, static_cast<size_t>(n) * sizeof(T));
  }

  friend VecAvx2 operator+(VecAvx2 a, VecAvx2 b) { return {_mm256_add_ps(a.r, b.r)}; }
  friend VecAvx2 operator-(VecAvx2 a, VecAvx2 b) { return {_mm256_sub_ps(a.r, b.r)}; }
  friend VecAvx2 operator*(VecAvx2 a, VecAvx2 b) { return {_mm256_mul_ps(a.r, b.r)}; }
  friend VecAvx2 operator/(VecAvx2 a, VecAvx2 b) { return {_mm256_div_ps(a.r, b.r)}; }
  friend VecAvx2 fma(VecAvx2 a, VecAvx2 b, VecAvx2 c) { return {_mm256_fmadd_ps(a.r, b.r, c.r)}; }
  friend VecAvx2 max(VecAvx2 a, VecAvx2 b) { return {_mm256_max_ps(a.r, b.r)}; }  // b where either is NaN
  friend VecAvx2 min(VecAvx2 a, VecAvx2 b) { return {_mm256_min_ps(a.r, b.r)}; }
  friend Mask operator<(VecAvx2 a, VecAvx2 b) { return {_mm256_cmp_ps(a.r, b.r, _CMP_LT_OQ)}; }
  friend Mask operator<=(VecAvx2 a, VecAvx2 b) { return {_mm256_cmp_ps(a.r, b.r, _CMP_LE_OQ)}; }
  friend Mask both_ordered(Mask m, VecAvx2 a, VecAvx2 b) {  // the lanes of m where neither is NaN
    return {_mm256_and_ps(m.m, _mm256_cmp_ps(a.r, b.r, _CMP_ORD_Q))};
  }
  friend Mask operator|(Mask a, Mask b) { return {_mm256_or_ps(a.m, b.m)}; }
  friend Mask operator&(Mask a, Mask b) { return {_mm256_and_ps(a.m, b.m)}; }
  friend uint32_t lane_bits(Mask m) { return static_cast<uint32_t>(_mm256_movemask_ps(m.m)); }
  friend int lane_count(Mask m) { return __builtin_popcount(lane_bits(m)); }
  static Mask lanes_of(uint32_t bits) {  // the inverse of lane_bits
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i own = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), bit);
    return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(own, bit))};
  }
  friend VecAvx2 select(Mask m, VecAvx2 a, VecAvx2 b) { return {_mm256_blendv_ps(b.r, a.r, m.m)}; }

  friend VecAvx2 round(VecAvx2 x) { return {_mm256_round_ps(x.r, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  // x = n + r with an integral n and |r| <= 1/2; what is so small that exp2 makes zero of it, -inf too, counts as -150.
  static void split(VecAvx2 x, VecAvx2* n, VecAvx2* r) {
    x = max(set1(-150.0f), x);  // -inf - round(-inf) would be NaN; a NaN passes through
    *n = round(x);
    *r = x - *n;
  }
  // x * 2^n for an integral n; zero where n <= -127.
  friend VecAvx2 ldexp(VecAvx2 x, VecAvx2 n) {
    __m256i e = _mm256_add_epi32(_mm256_cvtps_epi32(n.r), _mm256_set1_epi32(127));
    e = _mm256_slli_epi32(_mm256_max_epi32(e, _mm256_setzero_si256()), 23);
    return {_mm256_mul_ps(x.r, _mm256_castsi256_ps(e))};
  }
  friend float reduce_max(VecAvx2 v) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(v.r), _mm256_extractf128_ps(v.r, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
  }
  // Of two blocks of 16: the largest of every fourth.
  static VecAvx2 max_of_fourths(const float* p) {
    const VecAvx2 a = max(load(p), load(p + 8)), b = max(load(p + 16), load(p + 24));
    return {_mm256_max_ps(_mm256_permute2f128_ps(a.r, b.r, 0x20), _mm256_permute2f128_ps(a.r, b.r, 0x31))};
  }
  friend float first(VecAvx2 v) { return _mm256_cvtss_f32(v.r); }

  friend U32 as_bits(VecAvx2 v) { return reinterpret_cast<U32>(v.r); }
  static VecAvx2 from_bits(U32 x) { return {reinterpret_cast<__m256>(x)}; }
  static VecAvx2 from_int(U32 x) { return {_mm256_cvtepi32_ps(reinterpret_cast<__m256i>(x))}; }  // signed
  friend F64 widen_low(VecAvx2 v) { return _mm256_cvtps_pd(_mm256_castps256_ps128(v.r)); }
  friend F64 widen_high(VecAvx2 v) { return _mm256_cvtps_pd(_mm256_extractf128_ps(v.r, 1)); }
  static F64 widen(const int32_t* p) { return _mm256_cvtepi32_pd(_mm_loadu_si128((const __m128i*)p)); }
  static F64 max_f64(F64 a, F64 b) { return _mm256_max_pd(a, b); }
  static U64 mul_low32(U64 a, U64 b) {  // the full products of the low halves
    return reinterpret_cast<U64>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
  }
  static U64 even_pairs(U64 a, U64 b) {  // a0 b0 a2 b2
    return reinterpret_cast<U64>(_mm256_unpacklo_epi64(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
  }
  static U64 odd_pairs(U64 a, U64 b) {  // a1 b1 a3 b3
    return reinterpret_cast<U64>(_mm256_unpackhi_epi64(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
  }
  static uint64_t bytes_reaching(U64 x, uint8_t least) {  // bit i: byte i of x is >= least
    const __m256i bytes = reinterpret_cast<__m256i>(x);
    const __m256i larger = _mm256_max_epu8(bytes, _mm256_set1_epi8(static_cast<char>(least)));
    return static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(larger, bytes)));
  }
  // Packs the chosen lanes of x and their ids (first_id + lane) to the front; returns how many. May write kLanes.
  static int compress(Mask m, VecAvx2 x, int32_t first_id, float* values, int32_t* ids) {
    float lanes[kLanes];
    x.store(lanes);
    return compress_lanes(lane_bits(m), lanes, first_id, values, ids);
  }

  // rows[i][j] <-> rows[j][i], as three rounds of pairwise interleaving: 32, 64 and 128 bits.
  static void transpose(VecAvx2 (&rows)[kLanes]) {
    __m256 t[8], u[8];
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_ps(rows[i].r, rows[i + 1].r);
      t[i + 1] = _mm256_unpackhi_ps(rows[i].r, rows[i + 1].r);
    }
    for (int i = 0; i < 8; i += 4) {
      u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
      u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
      u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int j = 0; j < 4; ++j) {
      rows[j].r = _mm256_permute2f128_ps(u[j], u[j + 4], 0x20);
      rows[j + 4].r = _mm256_permute2f128_ps(u[j], u[j + 4], 0x31);
    }
  }

 private:
  static __m256i first_n(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  template <class Half>
  static __m128i gather_halves(const Half* p, const int32_t* i) {
    const auto at = [&](int lane) { return static_cast<int16_t>(p[i[lane]].bits); };
    return _mm_setr_epi16(at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7));
  }
  static VecAvx2 widen_bf16(__m128i x) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16))};
  }
  static __m128i narrow_bf16(__m256 x) {  // to nearest, ties to even; NaN stays a quiet NaN
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i words = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  }
};

}  // namespace
}  // namespace fastattn
