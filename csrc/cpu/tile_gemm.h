// The register tile behind QK^T and PV: rows live in the lanes, columns are broadcast.
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

// kVecs vectors of rows by kCols columns. init(col, vec) gives the accumulator's start, done(col, vec, value) takes
// the result: both are inlined, which is where masks, biases and rescaling attach without touching this loop.
template <class Vec, int kVecs, int kCols, class Init, class Done>
inline __attribute__((always_inline)) void tile_gemm(const float* a, int64_t lda, const float* b, int64_t b_col,
                                                     int64_t b_depth, int64_t depth, Init&& init, Done&& done) {
  Vec c[kCols][kVecs];
#pragma GCC unroll 16
  for (int col = 0; col < kCols; ++col)
#pragma GCC unroll 8
    for (int vec = 0; vec < kVecs; ++vec) c[col][vec] = init(col, vec);
  for (int64_t i = 0; i < depth; ++i) {
    Vec row[kVecs];
#pragma GCC unroll 8
    for (int vec = 0; vec < kVecs; ++vec) row[vec] = Vec::load(a + vec * Vec::kLanes);
#pragma GCC unroll 16
    for (int col = 0; col < kCols; ++col) {
      const Vec scalar = Vec::set1(b[col * b_col]);
#pragma GCC unroll 8
      for (int vec = 0; vec < kVecs; ++vec) c[col][vec] = fma(row[vec], scalar, c[col][vec]);
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
