// What happens to a score between QK^T and the softmax, and to a probability after it. Scores are in units of log2.
#pragma once

#include "cuda/sequence.cuh"
#include "rng.h"

namespace fastattn {
namespace {

// A score and a probability of a warp's tile: scores[m][n][e] of lane l is row 16 m + 8 (e / 2) + l / 4, key
// 8 n + 2 (l % 4) + e % 2.
template <class Traits>
using ScoreTile = float[Traits::kRowTiles][Traits::kKeys / 8][4];

// The rows of one lane, and the first of its keys in every 8.
struct LanePlace {
  int row, key;

  FASTATTN_DEVICE LanePlace(int warp_row, int tile_key)
      : row(warp_row + thread_index() % 32 / 4), key(tile_key + thread_index() % 4 * 2) {}
};

// Hides what the causal mask, the window and the sequence's end hide.
template <class Traits>
FASTATTN_DEVICE void hide_invisible(ScoreTile<Traits>& scores, const Sequence& sequence, LanePlace at, int split_begin,
                                    int split_end) {
#pragma unroll
  for (int m = 0; m < Traits::kRowTiles; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = sequence.query(at.row + 16 * m + 8 * half);
      const int begin = at_least(split_begin, sequence.begin(query)) - at.key;
      const int end = at_most(split_end, sequence.end(query)) - at.key;
#pragma unroll
      for (int n = 0; n < Traits::kKeys / 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int key = 8 * n + e;
          if (key < begin || key >= end) scores[m][n][2 * half + e] = -kInfinity;
        }
    }
}

// One line (batch, head, query) of a score modifier.
template <class Element>
FASTATTN_DEVICE const Element* score_line(const ScoreView& view, int batch, int head, int query) {
  return static_cast<const Element*>(view.data) + batch * view.stride_batch + head * view.stride_head +
         query * view.stride_q;
}

FASTATTN_DEVICE float bias_at(const ScoreView& view, int batch, int head, int query, int key) {
  const int64_t k = key * view.stride_k;
  if (view.dtype == DType::f32) return load_global(score_line<float>(view, batch, head, query) + k);
  if (view.dtype == DType::bf16) return to_float(load_global(score_line<bf16_t>(view, batch, head, query) + k));
  return to_float(load_global(score_line<f16_t>(view, batch, head, query) + k));
}

// Softcap, bias, ALiBi and mask, and before them the scale. Rows and keys that do not exist are not looked up.
template <class Traits>
FASTATTN_DEVICE void modify_scores(ScoreTile<Traits>& scores, const AttentionParams& p, const Sequence& sequence,
                                   LanePlace at) {
  const float scale = static_cast<float>(p.softmax_scale * kLog2e);
  const float cap = static_cast<float>(p.softcap * kLog2e);
  // tanh(x) = 1 - 2 / (1 + e^2x), in powers of two
  const float to_exponent = cap > 0 ? 2.0f * static_cast<float>(p.softmax_scale / p.softcap * kLog2e) : 0.0f;
  const float log2e = static_cast<float>(kLog2e);
#pragma unroll
  for (int m = 0; m < Traits::kRowTiles; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = at.row + 16 * m + 8 * half;
      const bool exists = row < sequence.rows();
      const int query = sequence.query(exists ? row : 0), head = sequence.head(exists ? row : 0);
      const float slope = p.alibi_slopes ? log2e * load_global(static_cast<const float*>(p.alibi_slopes) +
                                                               sequence.batch * p.alibi_stride_batch + head)
                                         : 0.0f;
#pragma unroll
      for (int n = 0; n < Traits::kKeys / 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& s = scores[m][n][2 * half + e];
          const int key = at.key + 8 * n + e;
          s = cap > 0 ? cap - 2 * cap * reciprocal_approx(1 + exp2_approx(s * to_exponent)) : s * scale;
          if (!exists || key >= sequence.seqlen_k) continue;
          if (p.bias.data) {
            const float bias = bias_at(p.bias, sequence.batch, head, query, key);
            // A bias of the lowest finite number means "almost never": log2(e) must not carry it to -inf.
            s += bias > -kInfinity ? maximum(kLowestFloat, bias * log2e) : bias;
          }
          if (p.alibi_slopes) s -= slope * absolute(static_cast<float>(sequence.place(query) - key));
          if (p.mask.data &&
              !load_global(score_line<uint8_t>(p.mask, sequence.batch, head, query) + key * p.mask.stride_k))
            s = -kInfinity;
        }
    }
}

// Zeroes what dropout drops; rng.h says which word decides. A Philox block serves four keys, which two lanes share: one
// of them draws for its row, the other for the row 8 below, and they exchange halves.
template <class Traits>
FASTATTN_DEVICE void drop_probabilities(ScoreTile<Traits>& scores, const AttentionParams& p, const Sequence& sequence,
                                        LanePlace at) {
  const PhiloxKey key = dropout_key(p.dropout_seed, p.dropout_offset);
  const double words = p.dropout_p * 4294967296.0;
  const uint32_t threshold = words < 4294967296.0 ? static_cast<uint32_t>(words) : 0xffffffffu;
  const int odd = thread_index() % 2;
#pragma unroll
  for (int m = 0; m < Traits::kRowTiles; ++m) {
    const int row = at.row + 16 * m + 8 * odd;
    const uint32_t query = static_cast<uint32_t>(sequence.query(row));
    const uint32_t head = static_cast<uint32_t>(sequence.batch * static_cast<int>(p.nheads) + sequence.head(row));
#pragma unroll
    for (int n = 0; n < Traits::kKeys / 8; ++n) {
      const uint32_t four = static_cast<uint32_t>(at.key + 8 * n) / 4;
      const PhiloxBlock mine = philox4x32_10({{four, query, head, kDropoutDomain}}, key);
      uint32_t word[2][2];  // of this lane's two keys, by half
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const uint32_t other = shuffle_xor(odd ? mine.word[e] : mine.word[2 + e], 1);
        word[0][e] = odd ? other : mine.word[e];
        word[1][e] = odd ? mine.word[2 + e] : other;
      }
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (word[e / 2][e % 2] < threshold) scores[m][n][e] = 0;
    }
  }
}

}  // namespace
}  // namespace fastattn
