// How the backward's products hold their factors: 32-bit words along the sum, each a float or two neighbouring bf16.
//
// A product reads one factor as a panel with words side by side in the lanes, and the other word by word (tile_gemm.h).
// So each array exists in the orders that its products need: along the dimensions, along the rows, along the keys.
#pragma once

#include "cpu/attention_bwd_products.h"
#include "cpu/attention_fwd.h"

namespace fastattn {
namespace {

// One element per word: whatever is stored is widened when it is packed.
template <class V>
struct RealWords {
  using Vec = V;
  using Real = typename Vec::Real;
  using Registers = NoRegisters;
  static constexpr bool kTiles = false;
  static constexpr int kKeyStep = 16;  // ranges of keys are whole register tiles
  static constexpr int kStripVecs = Vec::kTileVecs, kStrip = kStripVecs * Vec::kLanes;
  using Product = FmaProduct<Vec>;
  static constexpr int kPerWord = 1;
  static constexpr bool kScalesRows = true;  // panel_t comes multiplied: as the forward does it

  // fn(tag of what rows of q, k, v and their gradients are stored as)
  template <class Fn>
  static void visit_rows(DType dtype, Fn&& fn) {
    visit_storage<Real>(dtype, fn);
  }

  // The first elements of a row as words; at most kLanes words.
  template <class T>
  static Vec load_row(const T* row, int64_t elements) {
    return load_scaled<Vec>(row, static_cast<int>(elements), nullptr);
  }

  // Keys into rows (keys, ld), padded with zeros to a whole number of kBlockK; one order serves all.
  static void pack_keys(const KVHead& head, int64_t first, int64_t keys, int64_t ld, Real* rows, Real*, int64_t) {
    for (int64_t j = 0; j < keys; j += kBlockK)
      pack_block<Vec>(head, first + j, static_cast<int>(at_most(kBlockK, keys - j)), rows + j * ld, ld);
  }

  // Where the words along the keys of key number `key` are, and their stride.
  static int64_t pairs_at(int64_t key, int64_t ld, int64_t) { return key * ld; }
  static int64_t pairs_ld(int64_t ld, int64_t) { return ld; }

  // Rows into panel (kStrip, ld) and, times scale, into panel_t (ld, kStrip).
  template <class T>
  static void pack_panel(const T* const* rows, int vecs, int64_t dim, int64_t ld, Real scale, Real* panel,
                         Real* panel_t) {
    const Vec factor = Vec::set1(scale);
    for (int64_t r = 0; r < vecs * Vec::kLanes; r += Vec::kLanes)
      for (int64_t d = 0; d < dim; d += Vec::kLanes) {
        Vec square[Vec::kLanes];
        for (int i = 0; i < Vec::kLanes; ++i) {
          square[i] = load_row(rows[r + i] + d, dim - d);
          square[i].store(panel + (r + i) * ld + d);
          square[i] = square[i] * factor;
        }
        Vec::transpose(square);
        for (int i = 0; i < Vec::kLanes; ++i) square[i].store(panel_t + (d + i) * kStrip + r);
      }
  }

  // A tile of scores as add_outer() and add_inner() read it.
  template <int kVecs>
  static const Real* along_rows(const Real* tile, int64_t, Real*) {
    return tile;
  }
  template <int kVecs>
  static const Real* along_keys(const Real* tile, const Real*, int64_t, Real*) {
    return tile;
  }
};

// Two bf16 per word: q, k, v and dO are taken as they are, weights and gradients of scores are rounded. Half the
// multiplications, on machines whose dot product of pairs is as fast as an FMA.
template <class V, class DotProduct, int kVecsOfStrip = V::kTileVecs>
struct Bf16Words {
  using Vec = V;
  using Product = DotProduct;
  using Registers = NoRegisters;
  static constexpr bool kTiles = false;
  static constexpr int kKeyStep = 16;
  static constexpr int kStripVecs = kVecsOfStrip, kStrip = kStripVecs * Vec::kLanes;
  static constexpr int kPerWord = 2;
  static constexpr bool kScalesRows = false;  // a scaled q would no longer be bf16

  template <class Fn>
  static void visit_rows(DType, Fn&& fn) {
    fn(TypeTag<bf16_t>{});
  }

  static Vec load_row(const bf16_t* row, int64_t elements) { return load_words<Vec>(row, elements); }

  // rows (keys, ld / 2) along the dimensions, pairs (keys / 2, ld) along the keys; padded as above.
  static void pack_keys(const KVHead& head, int64_t first, int64_t keys, int64_t ld, float* rows, float* pairs,
                        int64_t) {
    for (int64_t j = 0; j < keys; j += kBlockK)
      pack_words<Vec>(head, first + j, static_cast<int>(at_most(kBlockK, keys - j)), rows + j * ld / 2, ld / 2);
    if (!pairs) return;
    const bf16_t* packed = reinterpret_cast<const bf16_t*>(rows);
    for (int64_t j = 0; j < round_up(keys, kBlockK); j += 2)
      for (int64_t d = 0; d < ld; d += Vec::kLanes)
        pair_words(Vec::load(packed + j * ld + d), Vec::load(packed + (j + 1) * ld + d)).store(pairs + j / 2 * ld + d);
  }

  static int64_t pairs_at(int64_t key, int64_t ld, int64_t) { return key / 2 * ld; }
  static int64_t pairs_ld(int64_t ld, int64_t) { return ld; }

  // Rows into panel (kStrip / 2, ld) along the rows and panel_t (ld / 2, kStrip) along the dimensions.
  static void pack_panel(const bf16_t* const* rows, int vecs, int64_t dim, int64_t ld, float, float* panel,
                         float* panel_t) {
    for (int64_t r = 0; r < vecs * Vec::kLanes; r += 2)
      for (int64_t d = 0; d < dim; d += Vec::kLanes) {
        const int dims = static_cast<int>(at_most(Vec::kLanes, dim - d));
        const Vec even = load_scaled<Vec>(rows[r] + d, dims, nullptr);
        pair_words(even, load_scaled<Vec>(rows[r + 1] + d, dims, nullptr)).store(panel + r / 2 * ld + d);
      }
    for (int64_t r = 0; r < vecs * Vec::kLanes; r += Vec::kLanes)
      for (int64_t d = 0; d < dim; d += 2 * Vec::kLanes) {
        Vec square[Vec::kLanes];
        for (int i = 0; i < Vec::kLanes; ++i) square[i] = load_row(rows[r + i] + d, dim - d);
        Vec::transpose(square);
        for (int i = 0; i < Vec::kLanes && d + 2 * i < ld; ++i) square[i].store(panel_t + (d / 2 + i) * kStrip + r);
      }
  }

  // Rounds a tile of scores to (columns, kStrip / 2) words.
  template <int kVecs>
  static const float* along_rows(const float* tile, int64_t columns, float* words) {
    for_tile<Bf16Words, kVecs>(columns, [&](int64_t j, int vec, int64_t at) {
      DotProduct::put(Vec::load(tile + at), words + j * kStrip / 2, vec * Vec::kLanes);
    });
    return words;
  }

  // The same from its words along the rows: (columns / 2, kStrip) words.
  template <int kVecs>
  static const float* along_keys(const float*, const float* words, int64_t columns, float* pairs) {
    const bf16_t* rounded = reinterpret_cast<const bf16_t*>(words);
    for_tile<Bf16Words, kVecs>(columns / 2, [&](int64_t j, int vec, int64_t at) {
      const bf16_t* even = rounded + 2 * j * kStrip + vec * Vec::kLanes;
      pair_words(Vec::load(even), Vec::load(even + kStrip)).store(pairs + at);
    });
    return pairs;
  }
};

// The same on tile registers: whole squares of words, and keys transposed for dQ.
template <class V, class DotProduct>
struct TileWords : Bf16Words<V, DotProduct, 4> {
  using Vec = V;
  using Base = Bf16Words<V, DotProduct, 4>;
  using Registers = typename DotProduct::Registers;
  static constexpr bool kTiles = true;
  static constexpr int kKeyStep = 2 * Vec::kLanes;

  // pairs (ld, block_keys / 2) along the keys.
  static void pack_keys(const KVHead& head, int64_t first, int64_t keys, int64_t ld, float* rows, float* pairs,
                        int64_t block_keys) {
    Base::pack_keys(head, first, keys, ld, rows, nullptr, block_keys);
    if (!pairs) return;
    for (int64_t j = 0; j < keys; j += kBlockK)
      pack_word_columns<Vec>(head, first + j, static_cast<int>(at_most(kBlockK, keys - j)), pairs + j / 2,
                             block_keys / 2);
  }
  static int64_t pairs_at(int64_t key, int64_t, int64_t) { return key / 2; }
  static int64_t pairs_ld(int64_t, int64_t block_keys) { return block_keys / 2; }

  // c (rows, vecs vectors) = [c +] a (rows, words) b (words, vecs vectors); rows and, with zeros, words are whole
  // tiles.
  template <bool kAdd>
  static void multiply(int64_t rows, const float* a, int64_t lda, const float* b, int64_t ldb, int64_t words,
                       int64_t vecs, float* c, int64_t ldc) {
    const int64_t steps = ceil_div(words, Vec::kLanes);
    for (int64_t vec = 0; vec < vecs; vec += 2) {
      const int64_t at = vec * Vec::kLanes;
      if (vec + 1 < vecs)
        DotProduct::template multiply<2, kAdd>(rows, a, lda, b + at, ldb, steps, c + at, ldc);
      else
        DotProduct::template multiply<1, kAdd>(rows, a, lda, b + at, ldb, steps, c + at, ldc);
    }
  }
};

}  // namespace
}  // namespace fastattn
