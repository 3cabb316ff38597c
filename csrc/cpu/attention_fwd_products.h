// What the forward multiplies by what: how queries, keys and values are packed, and the two products.
//
// A score is summed in steps, one dimension each, or one 32-bit word of two bf16 that are neighbours along headdim.
// scores() leaves K Q^T of a block of keys and a strip of rows in a tile (kBlockK, kStrip), rows in the lanes, each
// vector as finish(key, vec, sum) returns it; put() stores probabilities of kKeysPerWord keys; values() adds V^T times
// them to O^T. scores() and values() call step() once per kTileCols of keys or dimensions.
#pragma once

#include "cpu/attention_common.h"
#include "cpu/key_blocks.h"
#include "cpu/tile_gemm.h"

namespace fastattn {
namespace {

// Everything widened; softmax_scale and log2(e) inside q.
template <class V>
struct RealProducts {
  using Vec = V;
  using Real = typename Vec::Real;
  using Registers = NoRegisters;
  static constexpr int kStripVecs = Vec::kTileVecs;
  static constexpr int kRowsFactor = 1;
  static constexpr int kDimsPerStep = 1;
  static constexpr bool kScalesQueries = true;
  static constexpr int64_t kScoreReals = kBlockK * kStripVecs * Vec::kLanes;
  static constexpr int kKeysPerWord = 1;

  static int64_t steps(int64_t headdim) { return headdim; }

  // fn(tag of how queries are stored)
  template <class Fn>
  static void visit_queries(DType dtype, Fn&& fn) {
    visit_storage<Real>(dtype, fn);
  }

  // kLanes steps of a row with n dimensions left.
  template <class T>
  static Vec load_query(const T* row, int64_t n) {
    return load_scaled<Vec>(row, static_cast<int>(n), nullptr);
  }

  static void pack_keys(const KVHead& head, int64_t first_key, int keys, Real* tile, int64_t ld) {
    pack_block<Vec>(head, first_key, keys, tile, ld);
  }

  // Values as they are: (kBlockK, headdim_v).
  static int64_t value_rows(int64_t) { return kBlockK; }
  static int64_t value_columns(int64_t headdim_v) { return round_up(headdim_v, Vec::kLanes); }
  static void pack_values(const KVHead& head, int64_t first_key, int keys, Real* tile, int64_t ld) {
    pack_block<Vec>(head, first_key, keys, tile, ld);
  }

  template <int kVecs, int kStrip, class Finish, class Step>
  static inline __attribute__((always_inline)) void scores(const Real* q, const Real* k, int64_t ldk, int64_t steps,
                                                           Real* tile, Finish&& finish, Step&& step) {
    scores_by<FmaProduct<Vec>, kVecs, kStrip>(q, k, ldk, steps, tile, finish, step);
  }

  template <class Product, int kVecs, int kStrip, class Finish, class Step>
  static inline __attribute__((always_inline)) void scores_by(const Real* q, const Real* k, int64_t ldk, int64_t steps,
                                                              Real* tile, Finish&& finish, Step&& step) {
    constexpr int kCols = Vec::kTileCols;
    static_assert(kBlockK % kCols == 0, "a block is a whole number of tiles");
    // One chain over steps [at, at + depth); kFirst and kLast say whether it begins and ends the score.
    const auto chain = [&](auto first, auto last, int key, int64_t at, int64_t depth) {
      constexpr bool kFirst = decltype(first)::value, kLast = decltype(last)::value;
      tile_gemm<Vec, kVecs, kCols, Product>(
          q + at * kStrip, kStrip, k + key * ldk + at, ldk, 1, depth, [](int, int) { return Vec::zero(); },
          [&](int col, int vec, Vec score) {
            Real* to = tile + (key + col) * kStrip + vec * Vec::kLanes;
            if constexpr (!kFirst) score = Vec::load(to) + score;
            if constexpr (kLast) score = finish(key + col, vec, score);
            score.store(to);
          });
    };
    for (int key = 0; key < kBlockK; key += kCols) {
      step();
      if (steps <= kScoreChain) {
        chain(Number<1>{}, Number<1>{}, key, 0, steps);
        continue;
      }
      chain(Number<1>{}, Number<0>{}, key, 0, kScoreChain);
      int64_t at = kScoreChain;
      for (; at + kScoreChain < steps; at += kScoreChain) chain(Number<0>{}, Number<0>{}, key, at, kScoreChain);
      chain(Number<0>{}, Number<1>{}, key, at, steps - at);
    }
  }

  static inline __attribute__((always_inline)) void put(const Vec* prob, Real*, Real* at) { prob->store(at); }
  template <int kVecs, int kStrip>
  static void put_tile(Real*) {}

  // out (headdim_v, kStrip) = out * scale + V^T P; its rows are a multiple of kTileCols, those past headdim_v zero.
  template <int kVecs, int kStrip, class Step>
  static inline __attribute__((always_inline)) void values(const Real* tile, const Real* v, int64_t ldv,
                                                           int64_t headdim_v, const Vec (&scale)[kVecs], Real* out,
                                                           Step&& step) {
    constexpr int kCols = Vec::kTileCols;
    for (int64_t d = 0; d < headdim_v; d += kCols) {
      step();
      tile_gemm<Vec, kVecs, kCols>(
          tile, kStrip, v + d, 1, ldv, kBlockK,
          [&](int col, int vec) { return Vec::load(out + (d + col) * kStrip + vec * Vec::kLanes) * scale[vec]; },
          [&](int col, int vec, Vec value) { value.store(out + (d + col) * kStrip + vec * Vec::kLanes); });
    }
  }
};

// bf16 by bf16 in words, exactly, where the ISA has a dot product of pairs; the score is scaled. Values as above.
template <class V, class Dot>
struct WordProducts : RealProducts<V> {
  using Vec = V;
  static constexpr int kDimsPerStep = 2;
  static constexpr bool kScalesQueries = false;  // a scaled q would no longer be bf16

  static int64_t steps(int64_t headdim) { return ceil_div(headdim, 2); }

  template <class Fn>
  static void visit_queries(DType, Fn&& fn) {
    fn(TypeTag<bf16_t>{});
  }

  static Vec load_query(const bf16_t* row, int64_t n) { return load_words<Vec>(row, n); }

  static void pack_keys(const KVHead& head, int64_t first_key, int keys, float* tile, int64_t ld) {
    pack_words<Vec>(head, first_key, keys, tile, ld);
  }

  template <int kVecs, int kStrip, class Finish, class Step>
  static inline __attribute__((always_inline)) void scores(const float* q, const float* k, int64_t ldk, int64_t steps,
                                                           float* tile, Finish&& finish, Step&& step) {
    RealProducts<V>::template scores_by<Dot, kVecs, kStrip>(q, k, ldk, steps, tile, finish, step);
  }
};

// Both products on tile registers: values too stay bf16, two keys to a word, and probabilities are rounded to bf16.
template <class V, class Dot>
struct TileProducts : WordProducts<V, Dot> {
  using Vec = V;
  using Registers = typename Dot::Registers;
  static constexpr int kStripVecs = 2;   // two by two tiles share four loads
  static constexpr int kRowsFactor = 2;  // packing weighs more beside faster products, and these CPUs have L2s of 2 MiB
  static constexpr int64_t kTileReals = kBlockK * kStripVecs * Vec::kLanes;
  static constexpr int64_t kScoreReals = kTileReals + kTileReals / 2;  // scores, and words of probabilities
  static constexpr int kKeysPerWord = 2;

  // Values transposed: (headdim_v, kBlockK / 2), words along the keys.
  static int64_t value_rows(int64_t headdim_v) { return round_up(headdim_v, Vec::kLanes); }
  static int64_t value_columns(int64_t) { return kBlockK / 2; }
  static void pack_values(const KVHead& head, int64_t first_key, int keys, float* tile, int64_t ld) {
    pack_word_columns<Vec>(head, first_key, keys, tile, ld);
  }

  template <int kVecs, int kStrip, class Finish, class Step>
  static inline __attribute__((always_inline)) void scores(const float* q, const float* k, int64_t ldk, int64_t,
                                                           float* tile, Finish&& finish, Step&& step) {
    Dot::template multiply<kVecs, false>(kBlockK, k, ldk, q, kStrip, ldk / Vec::kLanes, tile, kStrip);
    for (int key = 0; key < kBlockK; key += Vec::kTileCols) {
      step();
      for (int col = 0; col < Vec::kTileCols; ++col)
        for (int vec = 0; vec < kVecs; ++vec) {
          float* at = tile + (key + col) * kStrip + vec * Vec::kLanes;
          finish(key + col, vec, Vec::load(at)).store(at);
        }
    }
  }

  // Probabilities as words (kBlockK / 2, kStrip), behind the scores: pairs of rows of the tile to one row.
  static inline __attribute__((always_inline)) void put(const Vec* prob, float* tile, float* at) {
    constexpr int64_t kStrip = kStripVecs * Vec::kLanes;
    const int64_t offset = at - tile, vec = offset % kStrip;
    Dot::round_pair(prob[0], prob[1]).store(tile + kTileReals + (offset - vec) / 2 + vec);
  }
  template <int kVecs, int kStrip>
  static void put_tile(float* tile) {
    for (int j = 0; j < kBlockK; j += 2)
      for (int i = 0; i < kVecs; ++i) {
        float* at = tile + j * kStrip + i * Vec::kLanes;
        const Vec prob[] = {Vec::load(at), Vec::load(at + kStrip)};
        put(prob, tile, at);
      }
  }

  template <int kVecs, int kStrip, class Step>
  static inline __attribute__((always_inline)) void values(const float* tile, const float* v, int64_t ldv,
                                                           int64_t headdim_v, const Vec (&scale)[kVecs], float* out,
                                                           Step&& step) {
    const int64_t rows = value_rows(headdim_v);
    for (int64_t d = 0; d < rows; d += Vec::kTileCols) step();
    for (int vec = 0; vec < kVecs; ++vec)
      if (lane_bits(scale[vec] < Vec::set1(1)))  // not where the maxima stand
        for (int64_t row = 0; row < rows; ++row) {
          float* at = out + row * kStrip + vec * Vec::kLanes;
          (Vec::load(at) * scale[vec]).store(at);
        }
    Dot::template multiply<kVecs, true>(rows, v, ldv, tile + kTileReals, kStrip, ldv / Vec::kLanes, out, kStrip);
  }
};

}  // namespace
}  // namespace fastattn
