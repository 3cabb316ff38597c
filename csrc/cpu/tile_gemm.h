// The register tile behind QK^T, PV and the linear layers: rows live in the lanes, columns are broadcast.
//
//   c[col][row] = init(col, row) + sum over i of a[i][row] * b(col, i)
//
// a is a (depth, rows) panel with rows contiguous; b is read as scalars at col * b_col + i * b_depth; so neither K nor
// V needs a transposition, softmax statistics need no horizontal step, and the sum over i is one sequential chain of
// FMAs: a row's bits depend on nothing but that row and b.
#pragma once

#include <cstdint>

namespace fastattn {
namespace {

// How one step of the tile multiplies. A step covers one 32-bit word of a per lane and one Scalar of b per column, in
// kPhases multiplications one after the other.
template <class Vec>
struct FmaProduct {
  using Scalar = typename Vec::Real;
  using Factor = Vec;
  static constexpr int kPhases = 1;
  static Factor row(const typename Vec::Real* a, int) { return Vec::load(a); }
  static Factor col(const Scalar* b, int) { return Vec::set1(*b); }
  static Vec multiply_add(Factor row, Factor col, Vec c) { return fma(row, col, c); }
};

// What a product needs beyond a processor's usual registers, while it is alive: nothing. See simd/amx.h.
struct NoRegisters {
  explicit NoRegisters(int64_t = 0) {}
};

struct NoStep {
  void operator()(int64_t) const {}
};

// kVecs vectors of rows by kCols columns. init(col, vec) gives the accumulator's start, done(col, vec, value) takes
// the result, step(i) runs before step i: all are inlined, which is where masks, biases, rescaling and prefetching
// attach without touching this loop.
template <class Vec, int kVecs, int kCols, class Product = FmaProduct<Vec>, class Init, class Done, class Step = NoStep>
inline __attribute__((always_inline)) void tile_gemm(const typename Vec::Real* a, int64_t lda,
                                                     const typename Product::Scalar* b, int64_t b_col, int64_t b_depth,
                                                     int64_t depth, Init&& init, Done&& done, Step&& step = Step{}) {
  Vec c[kCols][kVecs];
#pragma GCC unroll 16
  for (int col = 0; col < kCols; ++col)
#pragma GCC unroll 8
    for (int vec = 0; vec < kVecs; ++vec) c[col][vec] = init(col, vec);
  for (int64_t i = 0; i < depth; ++i) {
    step(i);
#pragma GCC unroll 2
    for (int phase = 0; phase < Product::kPhases; ++phase) {
      typename Product::Factor row[kVecs];
#pragma GCC unroll 8
      for (int vec = 0; vec < kVecs; ++vec) row[vec] = Product::row(a + vec * Vec::kLanes, phase);
#pragma GCC unroll 16
      for (int col = 0; col < kCols; ++col) {
        const typename Product::Factor scalar = Product::col(b + col * b_col, phase);
#pragma GCC unroll 8
        for (int vec = 0; vec < kVecs; ++vec) c[col][vec] = Product::multiply_add(row[vec], scalar, c[col][vec]);
      }
    }
    a += lda;
    b += b_depth;
  }
#pragma GCC unroll 16
  for (int col = 0; col < kCols; ++col)
#pragma GCC unroll 8
    for (int vec = 0; vec < kVecs; ++vec) done(col, vec, c[col][vec]);
}

}  // namespace
}  // namespace fastattn
