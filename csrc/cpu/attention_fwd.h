// Fused attention for many rows at a time (FlashAttention-2's schedule, arXiv 2307.08691, on vector registers).
//
// A work item is up to kMaxRows rows of one KV head. Its queries are packed once, transposed, so that rows fill the
// lanes; K and V pass by in blocks of kBlockK keys, widened to fp32 in a tile that stays in L2; scores of one strip of
// rows by one block live in L1 and are never written anywhere else.
#pragma once

#include "cpu/attention_common.h"
#include "cpu/scratch.h"
#include "cpu/tile_gemm.h"

namespace fastattn {
namespace {

// (keys, dim) rows of a cache or tensor, widened to fp32; rows up to a whole number of kBlockK are zero.
template <class Vec, class T>
inline void pack_block(const TensorView& view, int64_t batch, int64_t head, int64_t first_key, int keys, int64_t dim,
                       float* tile, int64_t ld) {
  for (int key = 0; key < keys; ++key) {
    const T* source = row_pointer<T>(view, batch, first_key + key, head);
    float* row = tile + key * ld;
    int64_t d = 0;
    for (; d + Vec::kLanes <= dim; d += Vec::kLanes) Vec::load(source + d).store(row + d);
    if (d < dim) Vec::load_n(source + d, static_cast<int>(dim - d)).store(row + d);
  }
  for (int key = keys; key < kBlockK; ++key)
    for (int64_t d = 0; d < ld; d += Vec::kLanes) Vec::zero().store(tile + key * ld + d);
}

template <class Vec, class T>
class ForwardTile {
 public:
  static constexpr int kStrip = Vec::kTileVecs * Vec::kLanes;  // rows whose scores are alive at a time

  // Rows per work item: enough to amortise packing K and V, few enough to leave Q, O and a K/V tile in L2.
  static int64_t max_rows(const AttentionParams& p) {
    const int64_t dim = p.headdim > p.headdim_v ? p.headdim : p.headdim_v;
    const int64_t target = dim <= 128 ? 192 : dim <= 256 ? 96 : 48;
    return round_up(target, kStrip);
  }

  static int64_t floats(const AttentionParams& p, int64_t rows) {
    const Layout layout(p, rows);
    return layout.total;
  }

  ForwardTile(const AttentionParams& p, const RowBlock& block, float* memory)
      : p_(p), block_(block), lengths_(p, block.batch), layout_(p, block.rows), memory_(memory) {
    pack_queries();
  }

  // Attend keys [begin, end): the state is overwritten, row-major.
  void attend(int64_t begin, int64_t end, const SoftmaxState& state) {
    reset();
    const int64_t last_row = block_.first_row + block_.rows - 1;
    const int64_t visible = lengths_.visible(p_, last_row);  // the block's longest prefix: keys past it are dead
    if (end > visible) end = visible;
    for (int64_t key = begin; key < end; key += kBlockK) {
      const int keys = static_cast<int>(end - key < kBlockK ? end - key : kBlockK);
      pack_block<Vec, T>(p_.k, block_.batch, block_.head_k, key, keys, p_.headdim, k(), layout_.ldk);
      pack_block<Vec, T>(p_.v, block_.batch, block_.head_k, key, keys, p_.headdim_v, v(), layout_.ldv);
      for (int64_t row = 0; row < block_.rows; row += kStrip) {
        const int64_t vecs = ceil_div(block_.rows - row < kStrip ? block_.rows - row : kStrip, Vec::kLanes);
        strip_of(static_cast<int>(vecs), row, key);
      }
    }
    export_state(state);
  }

 private:
  // Where each array starts in the item's memory, in floats; every row is a whole number of vectors.
  struct Layout {
    int64_t ldr, ldk, ldv;  // rows, headdim and headdim_v rounded up
    int64_t q, o, max, sum, limit, k, v, s, total;
    Layout(const AttentionParams& p, int64_t rows)
        : ldr(round_up(rows, Vec::kLanes)),
          ldk(round_up(p.headdim, Vec::kLanes)),
          ldv(round_up(p.headdim_v, Vec::kLanes)) {
      q = 0;
      o = q + p.headdim * ldr;
      max = o + ldv * ldr;
      sum = max + ldr;
      limit = sum + ldr;
      k = limit + ldr;
      v = k + kBlockK * ldk;
      s = v + kBlockK * ldv;
      total = s + kBlockK * kStrip;
    }
  };

  float* q() const { return memory_ + layout_.q; }          // (headdim, ldr), times softmax_scale * log2(e)
  float* o() const { return memory_ + layout_.o; }          // (ldv, ldr)
  float* max_() const { return memory_ + layout_.max; }     // (ldr,)
  float* sum_() const { return memory_ + layout_.sum; }     // (ldr,)
  float* limit() const { return memory_ + layout_.limit; }  // (ldr,), visible keys from the block's first key on
  float* k() const { return memory_ + layout_.k; }          // (kBlockK, ldk)
  float* v() const { return memory_ + layout_.v; }          // (kBlockK, ldv)
  float* s() const { return memory_ + layout_.s; }          // (kBlockK, kStrip)

  const T* query_row(int64_t r) const {
    const int64_t row = block_.first_row + r, group = lengths_.group;
    return row_pointer<T>(p_.q, block_.batch, row / group, block_.head_k * group + row % group);
  }

  // Q^T in squares of kLanes rows by kLanes dimensions; rows past the end repeat the last one and are never stored.
  void pack_queries() {
    const Vec scale = Vec::set1(p_.softmax_scale * kLog2e);
    for (int64_t r = 0; r < layout_.ldr; r += Vec::kLanes)
      for (int64_t d = 0; d < p_.headdim; d += Vec::kLanes) {
        const int dims = static_cast<int>(p_.headdim - d < Vec::kLanes ? p_.headdim - d : Vec::kLanes);
        Vec square[Vec::kLanes];
        for (int i = 0; i < Vec::kLanes; ++i) {
          const T* row = query_row(r + i < block_.rows ? r + i : block_.rows - 1) + d;
          square[i] = (dims == Vec::kLanes ? Vec::load(row) : Vec::load_n(row, dims)) * scale;
        }
        Vec::transpose(square);
        for (int i = 0; i < dims; ++i) square[i].store(q() + (d + i) * layout_.ldr + r);
      }
  }

  void reset() {
    for (int64_t r = 0; r < layout_.ldr; r += Vec::kLanes) {
      Vec::set1(-kInfinity).store(max_() + r);
      Vec::zero().store(sum_() + r);
    }
    for (int64_t i = 0; i < layout_.ldv * layout_.ldr; i += Vec::kLanes) Vec::zero().store(o() + i);
  }

  void strip_of(int vecs, int64_t row, int64_t key) {
    // The last row's prefix is the longest of the strip, the first row's the shortest.
    const int64_t first = block_.first_row + row, last = first + vecs * Vec::kLanes - 1;
    const int64_t rows_end = block_.first_row + block_.rows - 1;
    if (lengths_.visible(p_, last < rows_end ? last : rows_end) <= key) return;
    const bool masked = lengths_.visible(p_, first) < key + kBlockK;
    if (masked)
      for (int64_t r = row; r < row + vecs * Vec::kLanes; ++r) {
        const int64_t inside = lengths_.visible(p_, block_.first_row + r) - key;
        limit()[r] = static_cast<float>(inside < 0 ? 0 : inside > kBlockK ? kBlockK : inside);
      }
    visit_vecs<Vec::kTileVecs>(vecs, [&](auto count) {
      constexpr int kVecs = decltype(count)::value;
      masked ? strip<kVecs, true>(row) : strip<kVecs, false>(row);
    });
  }

  template <int kVecs>
  struct Count {
    static constexpr int value = kVecs;
  };
  template <bool kValue>
  struct Bool {
    static constexpr bool value = kValue;
  };
  template <int kVecs, class Fn>
  static void visit_vecs(int vecs, Fn&& fn) {
    if constexpr (kVecs > 1)
      if (vecs < kVecs) return visit_vecs<kVecs - 1>(vecs, fn);
    fn(Count<kVecs>{});
  }

  // One strip of rows against one block of keys: scores, softmax step, values.
  template <int kVecs, bool kMasked>
  void strip(int64_t row) {
    constexpr int kLanes = Vec::kLanes, kCols = Vec::kTileCols;
    static_assert(kBlockK % kCols == 0, "a block is a whole number of tiles");
    Vec top[kVecs], limits[kVecs];
    for (int i = 0; i < kVecs; ++i) {
      top[i] = Vec::load(max_() + row + i * kLanes);
      if constexpr (kMasked) limits[i] = Vec::load(limit() + row + i * kLanes);
    }
    float* scores = s();
    // One chain of FMAs over dimensions [d, d + depth); kFirst and kLast say whether it begins and ends the score.
    const auto chain = [&](auto first, auto last, int key, int64_t d, int64_t depth) {
      constexpr bool kFirst = decltype(first)::value, kLast = decltype(last)::value;
      tile_gemm<Vec, kVecs, kCols>(
          q() + d * layout_.ldr + row, layout_.ldr, k() + key * layout_.ldk + d, layout_.ldk, 1, depth,
          [](int, int) { return Vec::zero(); },
          [&](int col, int vec, Vec score) {
            float* at = scores + (key + col) * kStrip + vec * kLanes;
            if constexpr (!kFirst) score = Vec::load(at) + score;
            if constexpr (kLast && kMasked)
              score = select(Vec::set1(static_cast<float>(key + col)) < limits[vec], score, Vec::set1(-kInfinity));
            if constexpr (kLast) top[vec] = max(top[vec], score);
            score.store(at);
          });
    };
    const int64_t headdim = p_.headdim;
    for (int key = 0; key < kBlockK; key += kCols) {
      if (headdim <= kScoreChain) {
        chain(Bool<true>{}, Bool<true>{}, key, 0, headdim);
        continue;
      }
      chain(Bool<true>{}, Bool<false>{}, key, 0, kScoreChain);
      int64_t d = kScoreChain;
      for (; d + kScoreChain < headdim; d += kScoreChain) chain(Bool<false>{}, Bool<false>{}, key, d, kScoreChain);
      chain(Bool<false>{}, Bool<true>{}, key, d, headdim - d);
    }

    Vec shift[kVecs], scale[kVecs], sum[kVecs];
    for (int i = 0; i < kVecs; ++i) {
      float* running = max_() + row + i * kLanes;
      // A row that has seen no key yet subtracts 0: exp2(-inf) is 0, where -inf - -inf were NaN.
      shift[i] = select(Vec::set1(-kInfinity) < top[i], top[i], Vec::zero());
      scale[i] = exp2(Vec::load(running) - shift[i]);
      sum[i] = Vec::load(sum_() + row + i * kLanes) * scale[i];
      top[i].store(running);
    }
    for (int key = 0; key < kBlockK; ++key)
      for (int i = 0; i < kVecs; ++i) {
        float* at = scores + key * kStrip + i * kLanes;
        const Vec prob = exp2(Vec::load(at) - shift[i]);
        sum[i] = sum[i] + prob;
        prob.store(at);
      }
    for (int i = 0; i < kVecs; ++i) sum[i].store(sum_() + row + i * kLanes);

    float* out = o() + row;
    const int64_t ldr = layout_.ldr;
    for (int64_t d = 0; d < p_.headdim_v; d += kCols)  // ldv is a multiple of kCols: the tail's columns are zero
      tile_gemm<Vec, kVecs, kCols>(
          scores, kStrip, v() + d, 1, layout_.ldv, kBlockK,
          [&](int col, int vec) { return Vec::load(out + (d + col) * ldr + vec * kLanes) * scale[vec]; },
          [&](int col, int vec, Vec value) { value.store(out + (d + col) * ldr + vec * kLanes); });
  }

  // The strips' O^T to row-major rows.
  void export_state(const SoftmaxState& state) {
    for (int64_t r = 0; r < block_.rows; r += Vec::kLanes) {
      const int rows = static_cast<int>(block_.rows - r < Vec::kLanes ? block_.rows - r : Vec::kLanes);
      for (int64_t d = 0; d < layout_.ldv; d += Vec::kLanes) {
        Vec square[Vec::kLanes];
        for (int i = 0; i < Vec::kLanes; ++i) square[i] = Vec::load(o() + (d + i) * layout_.ldr + r);
        Vec::transpose(square);
        for (int i = 0; i < rows; ++i) square[i].store(state.o + (r + i) * state.ldo + d);
      }
      Vec::load(max_() + r).store_n(state.max + r, rows);
      Vec::load(sum_() + r).store_n(state.sum + r, rows);
    }
  }

  const AttentionParams& p_;
  const RowBlock block_;
  const Lengths lengths_;
  const Layout layout_;
  float* const memory_;
};

}  // namespace
}  // namespace fastattn
