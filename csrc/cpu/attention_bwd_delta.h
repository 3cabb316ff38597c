// delta = rowsum(dO * O) - dlse: what the softmax takes off every gradient of a row.
//
// The sum has the order of dP's sums over V, so that a row with a single key finds dP == delta to the bit and gives
// exactly no gradient to Q and K, as it should.
#pragma once

#include "cpu/attention_bwd_words.h"
#include "cpu/parallel.h"

namespace fastattn {
namespace {

template <class Vec, class Words>
class Delta {
 public:
  using Real = typename Vec::Real;

  explicit Delta(const AttentionBackwardParams& b) : b_(b), p_(b.fwd) {}

  void run(int nthreads) const {
    constexpr int64_t kQueries = 64;  // of one head: an item
    const int64_t parts = ceil_div(p_.seqlen_q, kQueries);
    parallel_for(p_.batch * parts * p_.nheads, nthreads, [&](int64_t item) {
      const int64_t head = item % p_.nheads, part = item / p_.nheads % parts;
      const Sequence sequence(p_, item / p_.nheads / parts);
      const int64_t last = at_most(sequence.seqlen_q, (part + 1) * kQueries);
      Words::visit_rows(p_.dtype, [&](auto tag) {
        for (int64_t query = part * kQueries; query < last; query += Vec::kLanes)
          find<typename decltype(tag)::type>(sequence, query, at_most(Vec::kLanes, last - query), head);
      });
    });
  }

 private:
  // Queries [query, query + n) of one head, in the lanes.
  template <class T>
  void find(const Sequence& sequence, int64_t query, int64_t n, int64_t head) const {
    const T *out[Vec::kLanes], *dout[Vec::kLanes];
    for (int i = 0; i < Vec::kLanes; ++i) {
      out[i] = sequence.query<const T>(p_.out, query + at_most(n - 1, i), head);
      dout[i] = sequence.query<const T>(b_.dout, query + at_most(n - 1, i), head);
    }
    using Product = typename Words::Product;
    constexpr int64_t kStep = Vec::kLanes * Words::kPerWord;
    constexpr int64_t kChain = kScoreChain * Words::kPerWord;  // dimensions
    static_assert(kChain % kStep == 0, "a chain is whole squares");
    Vec total = Vec::zero(), chain = Vec::zero();
    for (int64_t d = 0; d < p_.headdim_v; d += kStep) {
      const int64_t dims = at_most(kStep, p_.headdim_v - d);
      Real a[Vec::kLanes * Vec::kLanes], b[Vec::kLanes * Vec::kLanes];
      transpose(dout, d, dims, a);
      transpose(out, d, dims, b);
      const auto row = [](const Real* words, int64_t i) { return Vec::load(words + i * Vec::kLanes); };
      if constexpr (Words::kTiles) {
        Vec even = Vec::zero(), odd = Vec::zero();
        for (int64_t i = 0; i < ceil_div(dims, Words::kPerWord); ++i) {
          even = fma(Vec::even_bf16(row(a, i)), Vec::even_bf16(row(b, i)), even);
          odd = fma(Vec::odd_bf16(row(a, i)), Vec::odd_bf16(row(b, i)), odd);
        }
        total = total + (even + odd);
        continue;
      }
      for (int64_t i = 0; i < ceil_div(dims, Words::kPerWord); ++i)
        chain =
            Product::multiply_add(Product::row(a + i * Vec::kLanes, 0), Product::row(b + i * Vec::kLanes, 0), chain);
      if (d + dims == p_.headdim_v || (d + dims) % kChain == 0) {
        total = d < kChain ? chain : total + chain;
        chain = Vec::zero();
      }
    }
    Real sums[Vec::kLanes];
    total.store(sums);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = statistic(p_, sequence, query + i, head);
      const Real dlse = b_.dlse ? static_cast<const Real*>(b_.dlse)[at] : 0;
      static_cast<Real*>(b_.delta)[at] = sums[i] - dlse;
    }
  }

  // Dimensions [d, d + dims) of kLanes rows, rows side by side.
  template <class T>
  static void transpose(const T* const (&rows)[Vec::kLanes], int64_t d, int64_t dims, Real* words) {
    Vec square[Vec::kLanes];
    for (int i = 0; i < Vec::kLanes; ++i) square[i] = Words::load_row(rows[i] + d, dims);
    Vec::transpose(square);
    for (int i = 0; i < Vec::kLanes; ++i) square[i].store(words + i * Vec::kLanes);
  }

  const AttentionBackwardParams& b_;
  const AttentionParams& p_;
};

}  // namespace
}  // namespace fastattn
