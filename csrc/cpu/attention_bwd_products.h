// The backward's products with tiles of scores: (keys, kStrip) in L1, rows in the lanes.
//
// Every sum is short chains of FMAs that are added up: one chain over all rows would lose accuracy.
#pragma once

#include "cpu/attention_common.h"
#include "cpu/tile_gemm.h"

namespace fastattn {
namespace {

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

// The first n lanes; whole vectors are spared the mask.
template <class Vec, class T>
inline void store_first(Vec x, T* to, int64_t n) {
  n >= Vec::kLanes ? x.store(to) : x.store_n(to, static_cast<int>(n));
}

// fn(key, vec, offset) for the vectors of a tile.
template <class Words, int kVecs, class Fn>
inline void for_tile(int64_t keys, Fn&& fn) {
  for (int64_t j = 0; j < keys; ++j)
    for (int i = 0; i < kVecs; ++i) fn(j, i, j * Words::kStrip + i * Words::Vec::kLanes);
}

// tile (columns, kStrip) = finish(key, vec, keys (columns, ld) times panel_t (ld, kStrip)), each sum over dim
// dimensions in the forward's order. Factors are in Words, ld counts words.
template <class Words, int kVecs, class Finish, class Real = typename Words::Vec::Real>
inline __attribute__((always_inline)) void score_products(const Real* panel_t, const Real* keys, int64_t ld,
                                                          int64_t dim, int64_t columns, Real* tile, Finish&& finish) {
  using Vec = typename Words::Vec;
  constexpr int kCols = Vec::kTileCols, kStrip = Words::kStrip;
  const int64_t words = ceil_div(dim, Words::kPerWord);
  if constexpr (Words::kTiles) {
    Words::template multiply<false>(columns, keys, ld, panel_t, kStrip, words, kVecs, tile, kStrip);
    for_tile<Words, kVecs>(columns, [&](int64_t j, int vec, int64_t at) __attribute__((always_inline)) {
      finish(j, vec, Vec::load(tile + at)).store(tile + at);
    });
    return;
  }
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

// sum_t (dim, kStrip) += keys (columns, ld) transposed, times tile (columns, kStrip), both in Words along the keys;
// tile registers want keys that are transposed. What keys have above dim is zero, and sum_t has room for it.
template <class Words, int kVecs, class Real = typename Words::Vec::Real>
inline void add_inner(const Real* tile, const Real* keys, int64_t ld, int64_t dim, int64_t columns, Real* sum_t) {
  using Vec = typename Words::Vec;
  constexpr int kCols = Vec::kTileCols, kStrip = Words::kStrip;
  const int64_t words = columns / Words::kPerWord;
  if constexpr (Words::kTiles)
    return Words::template multiply<true>(round_up(dim, Vec::kLanes), keys, ld, tile, kStrip, words, kVecs, sum_t,
                                          kStrip);
  for (int64_t d = 0; d < dim; d += kCols)
    tile_gemm<Vec, kVecs, kCols, typename Words::Product>(
        tile, kStrip, keys + d, 1, ld, words, [](int, int) { return Vec::zero(); },
        [&](int col, int vec, Vec sum) {
          Real* at = sum_t + (d + col) * kStrip + vec * Vec::kLanes;
          (Vec::load(at) + sum).store(at);
        });
}

struct RowRange {
  int64_t first, end;
};

// sum (columns, ld) += tile (columns, kStrip) times panel (kStrip, ld), both in Words along the rows, for dim
// dimensions rounded up to whole vectors. rows_of(j, n) says which rows of the tile are not zero in columns [j, j + n).
template <class Words, class RowsOf, class Real = typename Words::Vec::Real>
inline void add_outer(const Real* tile, const Real* panel, int64_t ld, int64_t dim, int64_t columns, Real* sum,
                      RowsOf&& rows_of) {
  using Vec = typename Words::Vec;
  using Outer = OuterTile<Vec>;
  constexpr int kStripWords = Words::kStrip / Words::kPerWord;
  const int64_t vecs = ceil_div(dim, Vec::kLanes), parts = ceil_div(vecs, Outer::kVecs);
  if constexpr (Words::kTiles)
    return Words::template multiply<true>(columns, tile, kStripWords, panel, ld, kStripWords, vecs, sum, ld);
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
