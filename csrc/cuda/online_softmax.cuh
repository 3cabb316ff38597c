// The softmax of rows whose scores come tile by tile: what both forward kernels keep of a row, and what becomes of it.
#pragma once

#include "cuda/score_modifiers.cuh"

namespace fastattn {
namespace {

// By row of a warp: a lane has two of every 16.
template <class Traits>
using RowFactors = float[Traits::kRowTiles][2];

// out (rows, headdim_v) of a warp, as the tensor core leaves it.
template <class Traits>
using OutTile = float[Traits::kRowTiles][Traits::kDim / 8][4];

template <class Traits>
FASTATTN_DEVICE void scale_rows(OutTile<Traits>& out, const RowFactors<Traits>& factors) {
#pragma unroll
  for (int m = 0; m < Traits::kRowTiles; ++m)
#pragma unroll
    for (int n = 0; n < Traits::kDim / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) out[m][n][e] *= factors[m][e / 2];
}

// `modified`: scores are in units of log2 already. Else they stay unscaled until one FMA folds scale and maximum into
// the exponent.
template <class Traits, bool kModified>
class OnlineSoftmax {
 public:
  FASTATTN_DEVICE explicit OnlineSoftmax(const AttentionParams& p)
      : scale_(kModified ? 1.0f : static_cast<float>(p.softmax_scale * kLog2e)) {
#pragma unroll
    for (int m = 0; m < Traits::kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        top_[m][half] = -kInfinity;
        sum_[m][half] = 0;
      }
  }

  // Scores become exp2(score - maximum); what was summed under an older maximum counts `shrink` of it now.
  // `may_be_empty`: a row may have seen no key yet.
  template <bool may_be_empty>
  FASTATTN_DEVICE void soften(ScoreTile<Traits>& scores, RowFactors<Traits>& shrink) {
#pragma unroll
    for (int m = 0; m < Traits::kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float top = top_[m][half];
#pragma unroll
        for (int n = 0; n < Traits::kKeys / 8; ++n)
          top = maximum(top, maximum(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
        top = maximum(top, shuffle_xor(top, 1));
        top = maximum(top, shuffle_xor(top, 2));
        const float base = may_be_empty && top == -kInfinity ? 0.0f : top * scale_;
        shrink[m][half] = exp2_approx(fused_multiply_add(top_[m][half], scale_, -base));
        top_[m][half] = top;
        float sum = sum_[m][half] * shrink[m][half];
#pragma unroll
        for (int n = 0; n < Traits::kKeys / 8; ++n)
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; ++e) {
            float& s = scores[m][n][e];
            s = exp2_approx(kModified ? s - base : fused_multiply_add(s, scale_, -base));
            sum += s;
          }
        sum_[m][half] = sum;  // of this lane's keys
      }
  }

  // Of a row that has seen all its keys: its lse in units of log2, and the factor that makes its sums means.
  // `sink`: the logit of a key without a value, or null. `kept`: what a probability that dropout left counts.
  FASTATTN_DEVICE float conclude(int m, int half, const float* sink, float kept, float* lse) const {
    float sum = sum_[m][half];
    sum += shuffle_xor(sum, 1);
    sum += shuffle_xor(sum, 2);
    float top = top_[m][half] == -kInfinity ? -kInfinity : top_[m][half] * scale_, share = 1.0f;
    if (sink) {
      const float logit = load_global(sink) * static_cast<float>(kLog2e);
      const float higher = maximum(top, logit), base = higher == -kInfinity ? 0.0f : higher;
      share = exp2_approx(top - base);
      sum = sum * share + exp2_approx(logit - base);
      top = higher;
    }
    *lse = sum == 0 ? -kInfinity : top + log2_approx(sum);
    return sum == 0 ? 0.0f : share * kept / sum;
  }

 private:
  const float scale_;
  RowFactors<Traits> top_, sum_;
};

// A warp's rows from `warp_row` on: sums become means, and write_lse(row, lse in units of log2) of those that exist.
template <class Traits, bool kModified, class WriteLse>
FASTATTN_DEVICE void conclude_rows(const OnlineSoftmax<Traits, kModified>& softmax, OutTile<Traits>& out,
                                   const Sequence& sequence, int warp_row, const float* sinks, float kept,
                                   WriteLse write_lse) {
  const int lane = thread_index() % 32;
  RowFactors<Traits> factors;
#pragma unroll
  for (int m = 0; m < Traits::kRowTiles; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row + 16 * m + 8 * half + lane / 4;
      const bool exists = row < sequence.rows();
      float lse;
      factors[m][half] = softmax.conclude(m, half, sinks && exists ? sinks + sequence.head(row) : nullptr, kept, &lse);
      if (exists && lane % 4 == 0) write_lse(row, lse);
    }
  scale_rows<Traits>(out, factors);
}

// Of a row of a call without splits, from units of log2.
FASTATTN_DEVICE void write_row_lse(const AttentionParams& p, const Sequence& sequence, int row, float lse) {
  if (p.lse)
    store_global(static_cast<float*>(p.lse) + lse_place(p, sequence, sequence.query(row), sequence.head(row)),
                 lse * kLn2);
}

}  // namespace
}  // namespace fastattn
