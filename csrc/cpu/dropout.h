// Dropout of a tile of probabilities, keyed by place: rng.h says which word decides.
#pragma once

#include <cstring>

#include "cpu/sequence.h"
#include "rng.h"

namespace fastattn {
namespace {

template <class Vec>
class Dropout {
 public:
  using Real = typename Vec::Real;

  static int64_t reals(const AttentionParams& p, int64_t rows) {
    return p.dropout_p > 0 ? 2 * round_up(rows, Vec::kLanes) : 0;
  }

  // For `rows` rows, whole vectors: those past the block's end repeat its last one.
  Dropout(const AttentionParams& p, const Sequence& sequence, const RowBlock& block, int64_t rows, Real* memory)
      : key_(dropout_key(p.dropout_seed, p.dropout_offset)),
        threshold_(threshold(p.dropout_p)),
        on_(p.dropout_p > 0),
        queries_(reinterpret_cast<uint32_t*>(memory)),
        heads_(queries_ + rows) {
    if (!on_) return;
    const Visibility visibility(p, sequence);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = block.first_row + at_most(block.rows - 1, r);
      queries_[r] = static_cast<uint32_t>(visibility.query(row));
      heads_[r] = static_cast<uint32_t>(sequence.batch * p.nheads + visibility.head(block, row));
    }
  }

  bool on() const { return on_; }

  // What a kept probability is multiplied by; with p = 1 none is kept, whatever the words say.
  static Real scale(const AttentionParams& p) { return p.dropout_p < 1 ? static_cast<Real>(1 / (1 - p.dropout_p)) : 0; }

  static uint32_t threshold(double p) {
    const double words = p * 0x1p32;
    return words < 0x1p32 ? static_cast<uint32_t>(words) : 0xffffffffu;
  }

  // Rows in the lanes: x[j * ld + i] is key `key` + j of row `row` + i, for vecs * kLanes rows; key % 4 == 0. Dropped
  // elements become zero, and those of `also`, laid out alike, too.
  void apply_tile(Real* x, int64_t ld, int64_t row, int vecs, int64_t key, int64_t keys, Real* also = nullptr) const {
    const PhiloxLanes<Vec> lanes(key_);
    for (int64_t i = 0; i < vecs * Vec::kLanes; i += Vec::kLanes)
      for (int64_t j = 0; j < keys; j += 4) {
        uint32_t words[4][Vec::kLanes];
        draw(lanes, row + i, static_cast<uint32_t>((key + j) / 4), words);
        for (int64_t n = 0; n < at_most(4, keys - j); ++n) {
          drop(x + (j + n) * ld + i, words[n]);
          if (also) drop(also + (j + n) * ld + i, words[n]);
        }
      }
  }

 private:
  // words[n][i] decides key 4 * block + n of row r + i.
  void draw(const PhiloxLanes<Vec>& lanes, int64_t r, uint32_t block, uint32_t (&words)[4][Vec::kLanes]) const {
    using U64 = typename Vec::U64;
    // As many rows as there are 32-bit lanes: even rows in one set, odd rows in the other, so that a pair is one load.
    // Doubles have half as many, one to a 64-bit lane.
    constexpr int kSets = sizeof(Real) == 8 ? 1 : 2;
    U64 queries, heads, word[2][4];
    if constexpr (kSets == 2) {
      memcpy(&queries, queries_ + r, sizeof queries);
      memcpy(&heads, heads_ + r, sizeof heads);
    } else {
      for (int i = 0; i < Vec::kLanes; ++i) {
        queries[i] = queries_[r + i];
        heads[i] = heads_[r + i];
      }
    }
    for (int set = 0; set < 2; ++set) {
      word[set][0] = U64{} + block;
      word[set][1] = queries >> (32 * set);
      word[set][2] = heads >> (32 * set);
      word[set][3] = U64{} + kDropoutDomain;
    }
    lanes.generate(word);
    for (int n = 0; n < 4; ++n) {
      if constexpr (kSets == 2) {
        const U64 pairs = (word[0][n] & 0xffffffffu) | (word[1][n] << 32);
        memcpy(words[n], &pairs, sizeof pairs);
      } else {
        for (int i = 0; i < Vec::kLanes; ++i) words[n][i] = static_cast<uint32_t>(word[0][n][i]);
      }
    }
  }

  void drop(Real* x, const uint32_t (&words)[Vec::kLanes]) const {
    if constexpr (sizeof(Real) == 8) {
      for (int i = 0; i < Vec::kLanes; ++i)
        if (words[i] < threshold_) x[i] = 0;
    } else {
      typename Vec::U32 w;
      memcpy(&w, words, sizeof w);
      const typename Vec::U32 keep = reinterpret_cast<typename Vec::U32>(w >= threshold_);
      Vec::from_bits(as_bits(Vec::load(x)) & keep).store(x);
    }
  }

  const PhiloxKey key_;
  const uint32_t threshold_;
  const bool on_;
  uint32_t* const queries_;  // (rows,)
  uint32_t* const heads_;    // (rows,) batch * nheads + head
};

}  // namespace
}  // namespace fastattn
