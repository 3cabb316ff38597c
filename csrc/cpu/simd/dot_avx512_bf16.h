// bf16 weights on AVX512-BF16: two multiplications per lane and instruction.
#pragma once

#include "cpu/simd/vec_avx512.h"
#include "cpu/tile_gemm.h"

namespace fastattn {
namespace {

// Products are exact and sums fp32, rounded to nearest; the instruction takes denormals for zero and returns none.
struct DotBf16Product {
  using Scalar = float;  // two bf16 of x that are neighbours along the depth
  using Factor = __m512bh;
  static constexpr int kPhases = 1;
  static constexpr bool kTiles = false;
  using Registers = NoRegisters;
  struct Rounding {};  // of sums: as always
  static Factor row(const float* words, int) { return (Factor)_mm512_loadu_ps(words); }
  static Factor col(const Scalar* pair, int) { return (Factor)_mm512_set1_ps(*pair); }
  static VecAvx512 multiply_add(Factor row, Factor col, VecAvx512 c) { return {_mm512_dpbf16_ps(c.r, row, col)}; }

  static constexpr bool kRoundsX = true;
  static constexpr int64_t kMaxChainWords = 768;
  static void put(VecAvx512 x, Scalar* row, int64_t feature) {
    _mm256_storeu_si256((__m256i*)(reinterpret_cast<bf16_t*>(row) + feature), (__m256i)_mm512_cvtneps_pbh(x.r));
  }
};

}  // namespace
}  // namespace fastattn
