// Fused attention for a few rows (one query and its GQA group): bound by reading K and V once.
//
// Keys fill the lanes for the scores: squares of kLanes keys by kLanes dimensions are transposed in registers, once for
// all rows. Dimensions fill the lanes for the values. Nothing is packed, and the arithmetic's order is that of
// attention_common.h.
#pragma once

#include "cpu/attention_common.h"

namespace fastattn {
namespace {

template <class Vec, class T>
class DecodeRows {
 public:
  static constexpr int kMaxRows = 8;

  static int64_t floats(const AttentionParams& p, int64_t rows) {
    return rows * (round_up(p.headdim, Vec::kLanes) + 2 * kBlockK);
  }

  DecodeRows(const AttentionParams& p, const RowBlock& block, float* memory)
      : p_(p),
        block_(block),
        lengths_(p, block.batch),
        ldq_(round_up(p.headdim, Vec::kLanes)),
        q_(memory),
        s_(memory + block.rows * ldq_) {
    const Vec scale = Vec::set1(p.softmax_scale * kLog2e);
    for (int64_t r = 0; r < block.rows; ++r) {
      const int64_t row = block.first_row + r, group = lengths_.group;
      const T* source = row_pointer<T>(p.q, block.batch, row / group, block.head_k * group + row % group);
      for (int64_t d = 0; d < ldq_; d += Vec::kLanes)
        (load_dims(source + d, p.headdim - d) * scale).store(q_ + r * ldq_ + d);
    }
  }

  // Attend keys [begin, end): the state is overwritten, row-major.
  void attend(int64_t begin, int64_t end, const SoftmaxState& state) {
    for (int64_t r = 0; r < block_.rows; ++r) {
      state.max[r] = -kInfinity;
      state.sum[r] = 0.0f;
      for (int64_t d = 0; d < state.ldo; d += Vec::kLanes) Vec::zero().store(state.o + r * state.ldo + d);
    }
    const int64_t visible = lengths_.visible(p_, block_.first_row + block_.rows - 1);
    if (end > visible) end = visible;
    for (int64_t key = begin; key < end; key += kBlockK) {
      const int keys = static_cast<int>(end - key < kBlockK ? end - key : kBlockK);
      scores(key, keys);
      float scale[kMaxRows];
      for (int64_t r = 0; r < block_.rows; ++r) scale[r] = softmax_step(r, key, state);
      int64_t r = 0;
      for (; r + 4 <= block_.rows; r += 4) values<4>(r, key, keys, scale + r, state);
      switch (block_.rows - r) {
        case 3: values<3>(r, key, keys, scale + r, state); break;
        case 2: values<2>(r, key, keys, scale + r, state); break;
        case 1: values<1>(r, key, keys, scale + r, state); break;
      }
    }
  }

 private:
  static constexpr int kLanes = Vec::kLanes;
  // The rows of one head lie a whole token apart, too far for the hardware to run ahead. While a block is at work the
  // next one's rows are fetched, row after row: in the order of use, a line of each of 64 rows, strides of 4 KiB would
  // hit the same cache sets and memory channels (8 KV heads of 128, fp32: 38 GB/s in order of use, 48 row after row).
  static constexpr int kIntoL2 = 2;
  static constexpr int64_t kLine = 64 / sizeof(T);                           // elements of a cache line
  static constexpr int kLinesPerSquare = Vec::kLanes * Vec::kLanes / kLine;  // so that all squares fetch one block
  static constexpr int kValueVecs = Vec::kTileCols / 2;  // 4 rows by this many vectors of accumulators

  static Vec load_dims(const T* p, int64_t left) {
    return left >= kLanes ? Vec::load(p) : Vec::load_n(p, static_cast<int>(left));
  }

  // s[r][key] = q[r] . k[key] for kBlockK keys; keys past the end repeat the last one and are masked later.
  void scores(int64_t first_key, int keys) {
    const int64_t n = block_.rows * kBlockK;
    for (int64_t d = 0; d < p_.headdim; d += kScoreChain) {
      float* sums = d == 0 ? s_ : s_ + n;
      for (int64_t i = 0; i < n; i += kLanes) Vec::zero().store(sums + i);
      score_chain(first_key, keys, d, d + kScoreChain < p_.headdim ? d + kScoreChain : p_.headdim, sums);
      if (d > 0)
        for (int64_t i = 0; i < n; i += kLanes) (Vec::load(s_ + i) + Vec::load(sums + i)).store(s_ + i);
    }
  }

  // sums[r][key] += the part of the score from dimensions [begin, end).
  void score_chain(int64_t first_key, int keys, int64_t begin, int64_t end, float* sums) {
    const T* k = row_pointer<T>(p_.k, block_.batch, first_key, block_.head_k);
    const int64_t stride = p_.k.stride_seqlen;
    const T* ahead =
        k + (kBlockK + begin * kBlockK / p_.headdim) * stride;  // the row to fetch, from dimension `from` on
    int64_t from = 0;
    for (int64_t d = begin; d < end; d += kLanes)
      for (int key = 0; key < keys; key += kLanes) {
        Vec square[kLanes];
        if (key + kLanes <= keys && d + kLanes <= end) {
#pragma GCC unroll 16
          for (int i = 0; i < kLanes; ++i) square[i] = Vec::load(k + (key + i) * stride + d);
          for (int i = 0; i < kLinesPerSquare; ++i) {
            __builtin_prefetch(ahead + from, 0, kIntoL2);
            from += kLine;
            if (from >= p_.headdim) {
              from = 0;
              ahead += stride;
            }
          }
        } else {
          for (int i = 0; i < kLanes; ++i)
            square[i] = load_dims(k + (key + i < keys ? key + i : keys - 1) * stride + d, end - d);
        }
        Vec::transpose(square);
        for (int64_t r = 0; r < block_.rows; ++r) {
          const float* q = q_ + r * ldq_ + d;
          float* at = sums + r * kBlockK + key;
          Vec sum = Vec::load(at);
#pragma GCC unroll 16
          for (int i = 0; i < kLanes; ++i) sum = fma(square[i], Vec::set1(q[i]), sum);
          sum.store(at);
        }
      }
  }

  // Scores to probabilities, in place; returns what the row's o must be multiplied by.
  float softmax_step(int64_t r, int64_t key, const SoftmaxState& state) {
    float* s = s_ + r * kBlockK;
    const int64_t inside = lengths_.visible(p_, block_.first_row + r) - key;
    if (inside < kBlockK) {
      const int64_t from = inside < 0 ? 0 : inside;
      for (int64_t i = from; i < kBlockK; ++i) s[i] = -kInfinity;
    }
    Vec top = Vec::load(s);
    for (int i = kLanes; i < kBlockK; i += kLanes) top = max(top, Vec::load(s + i));
    const float block_max = reduce_max(top), running = state.max[r];
    const float next = running > block_max ? running : block_max;
    const float scale = exp2_of_difference<Vec>(running, next);
    const Vec shift = Vec::set1(next == -kInfinity ? 0.0f : next);
    for (int i = 0; i < kBlockK; i += kLanes) exp2(Vec::load(s + i) - shift).store(s + i);
    float sum = state.sum[r] * scale;
    for (int i = 0; i < kBlockK; ++i) sum += s[i];
    state.max[r] = next;
    state.sum[r] = sum;
    return scale;
  }

  // o[r .. r + kRows] = o * scale + p v
  template <int kRows>
  void values(int64_t r, int64_t first_key, int keys, const float* scale, const SoftmaxState& state) {
    const T* v = row_pointer<T>(p_.v, block_.batch, first_key, block_.head_k);
    float* o = state.o + r * state.ldo;
    int64_t d = 0;
    for (; d + kValueVecs * kLanes <= p_.headdim_v; d += kValueVecs * kLanes)
      value_tile<kRows, kValueVecs>(r, v + d, keys, scale, o + d, state.ldo, [](const T* p) { return Vec::load(p); });
    for (; d < p_.headdim_v; d += kLanes) {
      const int64_t left = p_.headdim_v - d;
      value_tile<kRows, 1>(r, v + d, keys, scale, o + d, state.ldo, [left](const T* p) { return load_dims(p, left); });
    }
  }

  template <int kRows, int kVecs, class Load>
  inline __attribute__((always_inline)) void value_tile(int64_t r, const T* v, int keys, const float* scale, float* o,
                                                        int64_t ldo, Load&& load) {
    Vec sum[kRows][kVecs];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) sum[i][j] = Vec::load(o + i * ldo + j * kLanes) * Vec::set1(scale[i]);
    const float* p = s_ + r * kBlockK;
    for (int key = 0; key < keys; ++key) {
      Vec row[kVecs];
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) row[j] = load(v + j * kLanes);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < kVecs; ++j) sum[i][j] = fma(Vec::set1(p[i * kBlockK + key]), row[j], sum[i][j]);
      if (r == 0)
        for (int j = 0; j < kVecs; ++j) __builtin_prefetch(v + kBlockK * p_.v.stride_seqlen + j * kLanes, 0, kIntoL2);
      v += p_.v.stride_seqlen;
    }
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) sum[i][j].store(o + i * ldo + j * kLanes);
  }

  const AttentionParams& p_;
  const RowBlock block_;
  const Lengths lengths_;
  const int64_t ldq_;
  float* const q_;  // (rows, ldq), times softmax_scale * log2(e)
  float* const s_;  // (rows, kBlockK), and as much again for the chain at work
};

}  // namespace
}  // namespace fastattn
