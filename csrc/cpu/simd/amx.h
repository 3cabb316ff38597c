// Intel AMX: eight tile registers of 16 rows by 64 bytes, and an instruction that multiplies two of bf16 pairs into one
// of floats. The only file that speaks to them; in assembly, because the compiler's intrinsics take numbers as text.
#pragma once

#include <cstdint>

#include "cpu/integers.h"
#include "cpu/simd/dot_avx512_bf16.h"
#include "cpu/tile_gemm.h"

namespace fastattn {
namespace {

// While one of these is alive, this thread's vector instructions take denormals for zero and return none, as those on
// tile registers always do.
class FlushDenormals {
 public:
  FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040u); }
  ~FlushDenormals() { _mm_setcsr(before_); }
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
  const unsigned before_;
};

// While one of these is alive this thread has eight tile registers, all of 16 rows, or the first four of fewer. They
// are given back, since other libraries in the process configure them for themselves.
class TileRegisters {
 public:
  explicit TileRegisters(int64_t rows = 16) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } configuration;
    for (int i = 0; i < 4; ++i) configuration.rows[i] = static_cast<uint8_t>(rows);
    asm volatile("ldtilecfg %0" : : "m"(configuration));
  }
  ~TileRegisters() { asm volatile("tilerelease"); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;

 private:
  const FlushDenormals flush_;
};

constexpr int kTileRows = 16;   // of a tile register
constexpr int kTileWords = 16;  // in each of its rows

// Rows should start at multiples of 64 bytes: others take four times as long.
template <int kTile>
inline void tile_load(const float* rows, int64_t ld) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(rows), "r"(ld * 4), "i"(kTile) : "memory");
}
template <int kTile>
inline void tile_store(float* rows, int64_t ld) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(rows), "r"(ld * 4), "i"(kTile) : "memory");
}
template <int kTile>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}
template <int kC, int kA, int kB>
inline void tile_multiply_add() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
}

template <int kBegin, int kEnd, class Fn>
inline __attribute__((always_inline)) void static_for(Fn&& fn) {
  if constexpr (kBegin < kEnd) {
    fn(Number<kBegin>{});
    static_for<kBegin + 1, kEnd>(fn);
  }
}

// c (kM tiles, kN tiles) = [c +] a (kM tiles, 16 steps words) b (16 steps words, kN tiles). Each element is, step by
// step, a sum of 16 products of even and one of 16 products of odd bf16, both in fp32, added to what is there.
// before(i) runs before step i.
template <int kM, int kN, bool kAdd, class Before = NoStep>
inline void tile_block(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t steps, float* c, int64_t ldc,
                       Before&& before = Before{}) {
  constexpr int kA = kM * kN, kB = kA + 1;
  static_assert(kB < 8, "eight registers");
  constexpr bool kHoldsB = kA + 1 + kN <= 8;  // one register per tile of b, or one for all
  const auto for_c = [](auto fn) __attribute__((always_inline)) {
    static_for<0, kM>([&](auto m) { static_for<0, kN>([&](auto n) { fn(m, n); }); });
  };
  for_c([&](auto m, auto n) {
    constexpr int kC = decltype(m)::value * kN + decltype(n)::value;
    if constexpr (kAdd)
      tile_load<kC>(c + decltype(m)::value * kTileRows * ldc + decltype(n)::value * kTileWords, ldc);
    else
      tile_zero<kC>();
  });
  for (int64_t step = 0; step < steps; ++step) {
    before(step);
    for_c([&](auto m, auto n) {
      constexpr int kRow = decltype(m)::value, kCol = decltype(n)::value, kOwnB = kHoldsB ? kB + kCol : kB;
      if constexpr (kCol == 0) tile_load<kA>(a + kRow * kTileRows * lda, lda);
      if constexpr (kRow == 0 || !kHoldsB) tile_load<kOwnB>(b + kCol * kTileWords, ldb);
      tile_multiply_add<kRow * kN + kCol, kA, kOwnB>();
    });
    a += kTileWords;
    b += kTileRows * ldb;
  }
  for_c([&](auto m, auto n) {
    constexpr int kRow = decltype(m)::value, kCol = decltype(n)::value;
    tile_store<kRow * kN + kCol>(c + kRow * kTileRows * ldc + kCol * kTileWords, ldc);
  });
}

// c (rows, 16 kN) = [c +] a (rows, 16 steps words) b (16 steps words, 16 kN), where rows is a multiple of 16.
template <int kN, bool kAdd>
inline void tile_product(int64_t rows, const float* a, int64_t lda, const float* b, int64_t ldb, int64_t steps,
                         float* c, int64_t ldc) {
  int64_t row = 0;
  for (; row + 2 * kTileRows <= rows; row += 2 * kTileRows)
    tile_block<2, kN, kAdd>(a + row * lda, lda, b, ldb, steps, c + row * ldc, ldc);
  if (row < rows) tile_block<1, kN, kAdd>(a + row * lda, lda, b, ldb, steps, c + row * ldc, ldc);
}

// Products of bf16 pairs where whole tiles of them are to be had.
struct AmxBf16Product : DotBf16Product {
  static constexpr bool kTiles = true;
  using Registers = TileRegisters;
  using Rounding = FlushDenormals;

  template <int kVecs, bool kAdd>
  static void multiply(int64_t rows, const float* a, int64_t lda, const float* b, int64_t ldb, int64_t steps, float* c,
                       int64_t ldc) {
    tile_product<kVecs, kAdd>(rows, a, lda, b, ldb, steps, c, ldc);
  }
  template <int kM, int kN, class Before>
  static void multiply_block(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t steps, float* c,
                             int64_t ldc, Before&& before) {
    tile_block<kM, kN, false>(a, lda, b, ldb, steps, c, ldc, before);
  }

  // Words of two rounded floats, low in the lower half.
  static VecAvx512 round_pair(VecAvx512 low, VecAvx512 high) {
    const __m512i interleave =
        _mm512_setr_epi32(0x100000, 0x110001, 0x120002, 0x130003, 0x140004, 0x150005, 0x160006, 0x170007, 0x180008,
                          0x190009, 0x1a000a, 0x1b000b, 0x1c000c, 0x1d000d, 0x1e000e, 0x1f000f);
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(high.r, low.r);
    return {_mm512_castsi512_ps(_mm512_permutexvar_epi16(interleave, halves))};
  }
};

}  // namespace
}  // namespace fastattn
