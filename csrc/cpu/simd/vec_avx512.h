// Vec for AVX-512 (F, BW, DQ, VL): sixteen lanes.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "params.h"

namespace fastattn {
namespace {

struct VecAvx512 {
  using Real = float;
  static constexpr int kLanes = 16;
  // 3 x 8 accumulators, 3 row vectors and a broadcast: 28 of 32 registers, 11 loads for 24 FMAs.
  static constexpr int kTileVecs = 3;
  static constexpr int kTileCols = 8;

  struct Mask {
    __mmask16 m;
  };
  __m512 r;

  // Integers and doubles as wide as a Vec, in the compiler's vector types: their + - * ^ & << >> need no verbs.
  typedef uint32_t U32 __attribute__((vector_size(64)));  // kLanes
  typedef uint64_t U64 __attribute__((vector_size(64)));  // kLanes / 2
  typedef double F64 __attribute__((vector_size(64)));    // kLanes / 2

  static VecAvx512 set1(float x) { return {_mm512_set1_ps(x)}; }
  static VecAvx512 zero() { return {_mm512_setzero_ps()}; }

  static VecAvx512 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static VecAvx512 load(const bf16_t* p) { return widen_bf16(_mm256_loadu_si256((const __m256i*)p)); }
  static VecAvx512 load(const f16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
  static VecAvx512 load(const int8_t* p) { return widen_i8(_mm_loadu_si128((const __m128i*)p)); }
  static VecAvx512 load_n(const float* p, int n) { return {_mm512_maskz_loadu_ps(first_n(n), p)}; }
  static VecAvx512 load_n(const bf16_t* p, int n) { return widen_bf16(_mm256_maskz_loadu_epi16(first_n(n), p)); }
  static VecAvx512 load_n(const f16_t* p, int n) { return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_n(n), p))}; }
  static VecAvx512 load_n(const int8_t* p, int n) { return widen_i8(_mm_maskz_loadu_epi8(first_n(n), p)); }
  // p[i[lane]]: loads by themselves take two thirds of a gather instruction's time.
  static VecAvx512 gather(const float* p, const int32_t* i) {
    const __m256 low = _mm256_insertf128_ps(_mm256_castps128_ps256(gather4(p, i)), gather4(p, i + 4), 1);
    const __m256 high = _mm256_insertf128_ps(_mm256_castps128_ps256(gather4(p, i + 8)), gather4(p, i + 12), 1);
    return {_mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1)};
  }
  static VecAvx512 gather(const bf16_t* p, const int32_t* i) { return widen_bf16(gather_halves(p, i)); }
  static VecAvx512 gather(const f16_t* p, const int32_t* i) { return {_mm512_cvtph_ps(gather_halves(p, i))}; }
  static float single(const f16_t* p) { return _cvtsh_ss(p->bits); }
  // The even and the odd halves of 2 * kLanes bf16, held as pairs in 32-bit words.
  static VecAvx512 even_bf16(VecAvx512 words) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(words.r), 16))};
  }
  static VecAvx512 odd_bf16(VecAvx512 words) {
    return {_mm512_and_ps(words.r, _mm512_castsi512_ps(_mm512_set1_epi32(-0x10000)))};
  }
  void store(float* p) const { _mm512_storeu_ps(p, r); }
  void store(bf16_t* p) const { _mm256_storeu_si256((__m256i*)p, narrow_bf16(r)); }
  void store(f16_t* p) const { _mm256_storeu_si256((__m256i*)p, narrow_f16(r)); }
  void store_n(float* p, int n) const { _mm512_mask_storeu_ps(p, first_n(n), r); }
  void store_n(bf16_t* p, int n) const { _mm256_mask_storeu_epi16(p, first_n(n), narrow_bf16(r)); }
  void store_n(f16_t* p, int n) const { _mm256_mask_storeu_epi16(p, first_n(n), narrow_f16(r)); }

  friend VecAvx512 operator+(VecAvx512 a, VecAvx512 b) { return {_mm512_add_ps(a.r, b.r)}; }
  friend VecAvx512 operator-(VecAvx512 a, VecAvx512 b) { return {_mm512_sub_ps(a.r, b.r)}; }
  friend VecAvx512 operator*(VecAvx512 a, VecAvx512 b) { return {_mm512_mul_ps(a.r, b.r)}; }
  friend VecAvx512 operator/(VecAvx512 a, VecAvx512 b) { return {_mm512_div_ps(a.r, b.r)}; }
  friend VecAvx512 fma(VecAvx512 a, VecAvx512 b, VecAvx512 c) { return {_mm512_fmadd_ps(a.r, b.r, c.r)}; }
  friend VecAvx512 max(VecAvx512 a, VecAvx512 b) { return {_mm512_max_ps(a.r, b.r)}; }  // b where either is NaN
  friend VecAvx512 min(VecAvx512 a, VecAvx512 b) { return {_mm512_min_ps(a.r, b.r)}; }
  friend Mask operator<(VecAvx512 a, VecAvx512 b) { return {_mm512_cmp_ps_mask(a.r, b.r, _CMP_LT_OQ)}; }
  friend Mask operator<=(VecAvx512 a, VecAvx512 b) { return {_mm512_cmp_ps_mask(a.r, b.r, _CMP_LE_OQ)}; }
  friend Mask both_ordered(Mask m, VecAvx512 a, VecAvx512 b) {  // the lanes of m where neither is NaN
    return {_mm512_mask_cmp_ps_mask(m.m, a.r, b.r, _CMP_ORD_Q)};
  }
  friend Mask operator|(Mask a, Mask b) { return {static_cast<__mmask16>(a.m | b.m)}; }
  friend Mask operator&(Mask a, Mask b) { return {static_cast<__mmask16>(a.m & b.m)}; }
  friend uint32_t lane_bits(Mask m) { return m.m; }
  friend int lane_count(Mask m) { return __builtin_popcount(m.m); }
  static Mask lanes_of(uint32_t bits) { return {static_cast<__mmask16>(bits)}; }  // the inverse of lane_bits
  friend VecAvx512 select(Mask m, VecAvx512 a, VecAvx512 b) { return {_mm512_mask_blend_ps(m.m, b.r, a.r)}; }

  friend VecAvx512 round(VecAvx512 x) {
    return {_mm512_roundscale_ps(x.r, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
  }
  // x = n + r with an integral n and |r| <= 1/2; -inf gives n = -inf and r = 0, from which exp2 makes zero.
  static void split(VecAvx512 x, VecAvx512* n, VecAvx512* r) {
    r->r = _mm512_reduce_ps(x.r, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    *n = x - *r;
  }
  // x * 2^n for an integral n; zero where n <= -127, as in every Vec.
  friend VecAvx512 ldexp(VecAvx512 x, VecAvx512 n) { return {_mm512_scalef_ps(x.r, n.r)}; }
  friend float reduce_max(VecAvx512 v) { return _mm512_reduce_max_ps(v.r); }
  // Of four blocks of 16: the largest of every fourth.
  static VecAvx512 max_of_fourths(const float* p) {
    const __m512 a = load(p).r, b = load(p + 16).r, c = load(p + 32).r, d = load(p + 48).r;
    const __m512 ab = _mm512_max_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    const __m512 cd = _mm512_max_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
    return {_mm512_max_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd))};
  }
  friend float first(VecAvx512 v) { return _mm512_cvtss_f32(v.r); }

  friend U32 as_bits(VecAvx512 v) { return reinterpret_cast<U32>(v.r); }
  static VecAvx512 from_bits(U32 x) { return {reinterpret_cast<__m512>(x)}; }
  static VecAvx512 from_int(U32 x) { return {_mm512_cvtepi32_ps(reinterpret_cast<__m512i>(x))}; }  // signed
  friend F64 widen_low(VecAvx512 v) { return _mm512_cvtps_pd(_mm512_castps512_ps256(v.r)); }
  friend F64 widen_high(VecAvx512 v) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(v.r, 1)); }
  static F64 widen(const int32_t* p) { return _mm512_cvtepi32_pd(_mm256_loadu_si256((const __m256i*)p)); }
  static F64 max_f64(F64 a, F64 b) { return _mm512_max_pd(a, b); }
  static U64 mul_low32(U64 a, U64 b) {  // the full products of the low halves
    return reinterpret_cast<U64>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
  }
  static U64 even_pairs(U64 a, U64 b) {  // a0 b0 a2 b2 ...
    return reinterpret_cast<U64>(_mm512_unpacklo_epi64(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
  }
  static U64 odd_pairs(U64 a, U64 b) {  // a1 b1 a3 b3 ...
    return reinterpret_cast<U64>(_mm512_unpackhi_epi64(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
  }
  static uint64_t bytes_reaching(U64 x, uint8_t least) {  // bit i: byte i of x is >= least
    return _mm512_cmpge_epu8_mask(reinterpret_cast<__m512i>(x), _mm512_set1_epi8(static_cast<char>(least)));
  }
  // Packs the chosen lanes of x and their ids (first_id + lane) to the front; returns how many. May write kLanes.
  static int compress(Mask m, VecAvx512 x, int32_t first_id, float* values, int32_t* ids) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    _mm512_storeu_ps(values, _mm512_maskz_compress_ps(m.m, x.r));
    _mm512_storeu_si512(ids, _mm512_maskz_compress_epi32(m.m, _mm512_add_epi32(lanes, _mm512_set1_epi32(first_id))));
    return __builtin_popcount(m.m);
  }

  // rows[i][j] <-> rows[j][i], as four rounds of pairwise interleaving: 32, 64, 128 and 256 bits.
  static void transpose(VecAvx512 (&rows)[kLanes]) {
    __m512 t[16], u[16];
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_ps(rows[i].r, rows[i + 1].r);
      t[i + 1] = _mm512_unpackhi_ps(rows[i].r, rows[i + 1].r);
    }
    for (int i = 0; i < 16; i += 4) {
      u[i] = unpacklo_pairs(t[i], t[i + 2]);
      u[i + 1] = unpackhi_pairs(t[i], t[i + 2]);
      u[i + 2] = unpacklo_pairs(t[i + 1], t[i + 3]);
      u[i + 3] = unpackhi_pairs(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 16; i += 8)
      for (int j = 0; j < 4; ++j) {
        t[i + j] = _mm512_shuffle_f32x4(u[i + j], u[i + j + 4], 0x88);
        t[i + j + 4] = _mm512_shuffle_f32x4(u[i + j], u[i + j + 4], 0xdd);
      }
    for (int j = 0; j < 8; ++j) {
      rows[j].r = _mm512_shuffle_f32x4(t[j], t[j + 8], 0x88);
      rows[j + 8].r = _mm512_shuffle_f32x4(t[j], t[j + 8], 0xdd);
    }
  }

 private:
  static __m128 gather4(const float* p, const int32_t* i) { return _mm_setr_ps(p[i[0]], p[i[1]], p[i[2]], p[i[3]]); }
  template <class Half>
  static __m256i gather_halves(const Half* p, const int32_t* i) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(gather8(p, i)), gather8(p, i + 8), 1);
  }
  template <class Half>
  static __m128i gather8(const Half* p, const int32_t* i) {
    const auto at = [&](int lane) { return static_cast<int16_t>(p[i[lane]].bits); };
    return _mm_setr_epi16(at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7));
  }
  static __mmask16 first_n(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
  static __m512 unpacklo_pairs(__m512 a, __m512 b) {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  }
  static __m512 unpackhi_pairs(__m512 a, __m512 b) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  }
  static VecAvx512 widen_bf16(__m256i x) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))};
  }
  static VecAvx512 widen_i8(__m128i x) { return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(x))}; }
  static __m256i narrow_bf16(__m512 x) {  // to nearest, ties to even; NaN stays a quiet NaN
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_blend_epi32(is_nan, rounded, quiet), 16));
  }
  static __m256i narrow_f16(__m512 x) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
};

}  // namespace
}  // namespace fastattn
