// The backward's products with tiles of scores: (keys, kStripRows) in L1, rows in the lanes.
//
// Every sum is short chains of FMAs that are added up: one chain over all rows would lose accuracy.
#pragma once

#include "cpu/attention_common.h"
#include "cpu/tile_gemm.h"

namespace fastattn {
namespace {

template <class Vec>
constexpr int kStripRows = Vec::kTileVecs * Vec::kLanes;

// The register tile of products whose lanes are dimensions: vectors by columns, and the columns divide kBlockK.
template <class Vec>
struct OuterTile {
  static constexpr int kAccumulators = Vec::kTileVecs * Vec::kTileCols;
  static constexpr int kVecs = kAccumulators >= 16 ? 4 : Vec::kTileVecs;

  static constexpr int cols(int vecs) {
    int cols = 1;
    while (2 * cols * vecs <= kAccumulators) cols *= 2;
    return cols;
  }
};

template <int kN>
struct Number {
  static constexpr int value = kN;
};

// fn(Number<n>) for n in 1 .. kMax.
template <int kMax, class Fn>
inline void visit_number(int n, Fn&& fn) {
  if constexpr (kMax > 1)
    if (n < kMax) return visit_number<kMax - 1>(n, fn);
  fn(Number<kMax>{});
}

// The first n lanes; whole vectors are spared the mask.
template <class Vec, class T>
inline void store_first(Vec x, T* to, int64_t n) {
  n >= Vec::kLanes ? x.store(to) : x.store_n(to, static_cast<int>(n));
}

// fn(key, vec, offset) for the vectors of a tile.
template <class Vec, int kVecs, class Fn>
inline void for_tile(int64_t keys, Fn&& fn) {
  for (int64_t j = 0; j < keys; ++j)
    for (int i = 0; i < kVecs; ++i) fn(j, i, j * kStripRows<Vec> + i * Vec::kLanes);
}

// tile (columns, kStripRows) = finish(key, vec, keys (columns, ld) times panel_t (ld, kStripRows)), each sum over dim
// dimensions in the forward's order. Factors are in Words, ld counts words.
template <class Vec, class Words, int kVecs, class Finish, class Real = typename Vec::Real>
inline __attribute__((always_inline)) void score_products(const Real* panel_t, const Real* keys, int64_t ld,
                                                          int64_t dim, int64_t columns, Real* tile, Finish&& finish) {
  constexpr int kCols = Vec::kTileCols, kStrip = kStripRows<Vec>;
  const int64_t words = ceil_div(dim, Words::kPerWord);
  for (int64_t j = 0; j < columns; j += kCols) {
    const auto chain = [&](auto last, int64_t i, int64_t depth) {
      tile_gemm<Vec, kVecs, kCols, typename Words::Product>(
          panel_t + i * kStrip, kStrip, keys + j * ld + i, ld, 1, depth, [](int, int) { return Vec::zero(); },
          [&](int col, int vec, Vec sum) {
            Real* at = tile + (j + col) * kStrip + vec * Vec::kLanes;
            if (i > 0) sum = Vec::load(at) + sum;
            if constexpr (decltype(last)::value) sum = finish(j + col, vec, sum);
            sum.store(at);
          });
    };
    int64_t i = 0;
    for (; i + kScoreChain < words; i += kScoreChain) chain(Number<0>{}, i, kScoreChain);
    chain(Number<1>{}, i, words - i);
  }
}

// sum_t (dim, kStripRows) += keys (columns, ld) transposed, times tile (columns, kStripRows), both in Words along the
// keys. What ld has above dim is zero, and sum_t has room for it.
template <class Vec, class Words, int kVecs, class Real = typename Vec::Real>
inline void add_inner(const Real* tile, const Real* keys, int64_t ld, int64_t dim, int64_t columns, Real* sum_t) {
  constexpr int kCols = Vec::kTileCols, kStrip = kStripRows<Vec>;
  for (int64_t d = 0; d < dim; d += kCols)
    tile_gemm<Vec, kVecs, kCols, typename Words::Product>(
        tile, kStrip, keys + d, 1, ld, columns / Words::kPerWord, [](int, int) { return Vec::zero(); },
        [&](int col, int vec, Vec sum) {
          Real* at = sum_t + (d + col) * kStrip + vec * Vec::kLanes;
          (Vec::load(at) + sum).store(at);
        });
}

struct RowRange {
  int64_t first, end;
};

// sum (columns, ld) += tile (columns, kStripRows) times panel (kStripRows, ld), both in Words along the rows, for dim
// dimensions rounded up to whole vectors. rows_of(j, n) says which rows of the tile are not zero in columns [j, j + n).
template <class Vec, class Words, class RowsOf, class Real = typename Vec::Real>
inline void add_outer(const Real* tile, const Real* panel, int64_t ld, int64_t dim, int64_t columns, Real* sum,
                      RowsOf&& rows_of) {
  using Outer = OuterTile<Vec>;
  constexpr int kStripWords = kStripRows<Vec> / Words::kPerWord;
  const int64_t vecs = ceil_div(dim, Vec::kLanes), parts = ceil_div(vecs, Outer::kVecs);
  for (int64_t part = 0; part < parts; ++part) {  // of equal size, give or take a vector
    const int64_t first = part * vecs / parts, last = (part + 1) * vecs / parts, d = first * Vec::kLanes;
    visit_number<Outer::kVecs>(static_cast<int>(last - first), [&](auto number) {
      constexpr int kVecs = decltype(number)::value, kCols = Outer::cols(kVecs);
      for (int64_t j = 0; j < columns; j += kCols) {
        const RowRange rows = rows_of(j, kCols);
        const int64_t begin = rows.first / Words::kPerWord, end = ceil_div(rows.end, Words::kPerWord);
        tile_gemm<Vec, kVecs, kCols, typename Words::Product>(
            panel + begin * ld + d, ld, tile + j * kStripWords + begin, kStripWords, 1, end - begin,
            [](int, int) { return Vec::zero(); },
            [&](int col, int vec, Vec value) {
              Real* at = sum + (j + col) * ld + d + vec * Vec::kLanes;
              (Vec::load(at) + value).store(at);
            });
      }
    });
  }
}

}  // namespace
}  // namespace fastattn
