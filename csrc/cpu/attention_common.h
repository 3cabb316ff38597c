// What the tile kernel and the decode kernel share: the order of the arithmetic.
//
// Both walk the keys in blocks of kBlockK and in chunks of chunk_keys(seqlen_k), counted from key 0. Within a block a
// score is one chain of multiply-adds per kScoreChain steps, added in order, and an output one chain over the keys; at
// a block's end the running (max, sum, out) is rescaled; at a chunk's end it is merged into the total, in order. A
// block that a row does not see changes nothing in it, to the bit. So a query's bits depend on its own keys and their
// number only: not on which kernel served it, the other queries, the batch or the threads.
//
// bf16 on tile registers (Dot::kTiles, simd/amx.h) sums otherwise, and the decode kernel does as they do: of every 32
// dimensions one chain over the even and one over the odd, their sum added to the score; of every 32 keys the same,
// added to the output, with probabilities rounded to bf16.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/dropout.h"
#include "cpu/score_modifiers.h"
#include "cpu/sequence.h"
#include "cpu/vec_math.h"
#include "dispatch.h"
#include "params.h"

namespace fastattn {
namespace {

constexpr int kScoreChain = 64;     // steps of one chain of multiply-adds: longer ones lose accuracy
constexpr int kBlockK = 64;         // keys per online-softmax step
constexpr int64_t kMinChunk = 512;  // keys per independently attended chunk, at least
constexpr int64_t kMaxChunks = 64;  // bounds the memory of partial results
constexpr float kInfinity = __builtin_inff();

// Rows [first_row, first_row + rows) of each of `heads` KV heads.
struct WorkItem {
  int64_t head_k, heads;
  int64_t first_row, rows;

  RowBlock block(int64_t h) const { return {head_k + h, first_row, rows}; }
};

// Keys per chunk, a function of the KV length alone.
inline int64_t chunk_keys(int64_t seqlen_k) {
  return at_least(kMinChunk, round_up(ceil_div(seqlen_k, kMaxChunks), kBlockK));
}

// The running softmax of `rows` rows over some keys: out = o / sum, in units of 2^(score - max).
// Rows that saw no key have max = -inf, sum = 0, o = 0.
template <class Real>
struct SoftmaxState {
  Real* max;    // (rows,)
  Real* sum;    // (rows,)
  Real* o;      // (rows, ldo)
  int64_t ldo;  // headdim_v rounded up to whole vectors

  static int64_t reals(int64_t rows, int64_t ldo) { return rows * (ldo + 2); }
  static SoftmaxState at(Real* memory, int64_t rows, int64_t ldo) {
    return {memory + rows * ldo, memory + rows * ldo + rows, memory, ldo};
  }

  void clear(int64_t rows) const {
    for (int64_t r = 0; r < rows; ++r) {
      max[r] = -kInfinity;
      sum[r] = 0;
    }
    for (int64_t i = 0; i < rows * ldo; ++i) o[i] = 0;
  }
};

template <class Vec, class Real = typename Vec::Real>
inline Real exp2_of_difference(Real a, Real b) {  // 2^(a - b), where b = -inf stands for "nothing yet"
  return first(exp2(Vec::set1(a - (b == -kInfinity ? 0 : b))));
}

// total += part, in place (Milakov and Gimelshein, arXiv 1805.02867).
template <class Vec, class Real = typename Vec::Real>
inline void merge(const SoftmaxState<Real>& total, const SoftmaxState<Real>& part, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) {
    const Real max = part.max[r] > total.max[r] ? part.max[r] : total.max[r];
    const Real keep = exp2_of_difference<Vec>(total.max[r], max);
    const Real add = exp2_of_difference<Vec>(part.max[r], max);
    total.max[r] = max;
    total.sum[r] = first(fma(Vec::set1(part.sum[r]), Vec::set1(add), Vec::set1(total.sum[r] * keep)));
    Real* o = total.o + r * total.ldo;
    const Real* x = part.o + r * part.ldo;
    for (int64_t d = 0; d < total.ldo; d += Vec::kLanes)
      fma(Vec::load(x + d), Vec::set1(add), Vec::load(o + d) * Vec::set1(keep)).store(o + d);
  }
}

// Where lse keeps what belongs to one query of one head.
inline int64_t statistic(const AttentionParams& p, const Sequence& sequence, int64_t query, int64_t head) {
  return sequence.q_row * p.lse_stride_batch + head * p.lse_stride_head + sequence.q_first + query;
}

// Divide and store: out and lse of an item's rows. A sink joins the denominator here, as one more score.
template <class Vec, class Real = typename Vec::Real>
inline void finalize(const AttentionParams& p, const Sequence& sequence, const WorkItem& item,
                     const SoftmaxState<Real>& state) {
  const Visibility visibility(p, sequence);
  const Real dropout_scale = Dropout<Vec>::scale(p);
  for (int64_t r = 0; r < item.heads * item.rows; ++r) {
    const int64_t row = item.first_row + r % item.rows;
    const int64_t query = visibility.query(row), head = visibility.head(item.block(r / item.rows), row);
    Real max = state.max[r], sum = state.sum[r], scale = 1;
    if (p.sinks) {
      const Real sink = static_cast<const Real*>(p.sinks)[head] * static_cast<Real>(kLog2e);
      max = sink > state.max[r] ? sink : state.max[r];
      scale = exp2_of_difference<Vec>(state.max[r], max);
      sum = sum * scale + exp2_of_difference<Vec>(sink, max);
    }
    const bool empty = sum == 0;  // not "> 0": a NaN must reach the output
    const Vec weight = Vec::set1(empty ? 0 : scale * dropout_scale / sum);
    const Real* o = state.o + r * state.ldo;
    visit_storage<Real>(p.dtype, [&](auto tag) {
      auto* out = sequence.query<typename decltype(tag)::type>(p.out, query, head);
      int64_t d = 0;
      for (; d + Vec::kLanes <= p.headdim_v; d += Vec::kLanes) (Vec::load(o + d) * weight).store(out + d);
      if (d < p.headdim_v) (Vec::load(o + d) * weight).store_n(out + d, static_cast<int>(p.headdim_v - d));
    });
    if (p.lse)
      static_cast<Real*>(p.lse)[statistic(p, sequence, query, head)] =
          empty ? -kInfinity : static_cast<Real>(kLn2) * (max + log2_of(sum));
  }
}

// How scores are multiplied. Everywhere in Real, scale and log2(e) inside q; but where q and k are bf16 and the ISA has
// a dot product of bf16 pairs (Dot::kPhases == 1), a step takes two dimensions, exactly, and the score is scaled. Where
// it multiplies whole tiles of them (Dot::kTiles), probabilities and values are multiplied so, too.
struct NoDot {
  struct Rounding {};
  static constexpr int kPhases = 2;
  static constexpr bool kTiles = false;
};

template <class Vec, class Dot>
inline bool scores_by_dot(const AttentionParams& p) {
  return sizeof(typename Vec::Real) == 4 && Dot::kPhases == 1 && p.dtype == DType::bf16 && p.kv.dtype == DType::bf16;
}

// kLanes words of two bf16 each, of a row with n left; past its end zero.
template <class Vec>
inline Vec load_words(const bf16_t* row, int64_t n) {
  if (n >= 2 * Vec::kLanes) return Vec::load(reinterpret_cast<const float*>(row));
  bf16_t padded[2 * Vec::kLanes] = {};
  memcpy(padded, row, static_cast<size_t>(n) * sizeof(bf16_t));
  return Vec::load(reinterpret_cast<const float*>(padded));
}

// Words of two vectors of widened bf16, low in the lower half.
template <class Vec>
inline Vec pair_words(Vec low, Vec high) {
  return Vec::from_bits(as_bits(low) >> 16 | as_bits(high));
}

// The first n elements of a row as computed with, `scale` (of int8) times, the others zero.
template <class Vec, class T>
inline Vec load_scaled(const T* row, int n, const float* scale) {
  const Vec x = n >= Vec::kLanes ? Vec::load(row) : Vec::load_n(row, n);
  if constexpr (sizeof(T) == 1) return x * Vec::set1(*scale);
  (void)scale;
  return x;
}

}  // namespace
}  // namespace fastattn
