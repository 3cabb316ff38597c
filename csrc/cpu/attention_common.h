// What the tile kernel and the decode kernel share: the order of the arithmetic.
//
// Both walk the keys in blocks of kBlockK and in chunks of chunk_keys(seqlen_k), counted from key 0. Within a block a
// score is one chain of FMAs per kScoreChain dimensions, added in order, and an output one chain over the keys; at a
// block's end the running (max, sum, out) is rescaled; at a chunk's end it is merged into the total, in order. So a
// query's bits depend on its own keys and their number only: not on which kernel served it, the other queries, the
// batch or the threads.
#pragma once

#include <cstdint>

#include "cpu/vec_math.h"
#include "params.h"

namespace fastattn {
namespace {

constexpr int kScoreChain = 64;      // dimensions summed in one chain of FMAs: longer ones lose accuracy
constexpr int kBlockK = 64;          // keys per online-softmax step
constexpr int64_t kMinChunk = 1024;  // keys per independently attended chunk, at least
constexpr int64_t kMaxChunks = 64;   // bounds the memory of partial results
constexpr float kInfinity = __builtin_inff();

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Keys per chunk, a function of the KV length alone.
inline int64_t chunk_keys(int64_t seqlen_k) {
  const int64_t even = round_up(ceil_div(seqlen_k, kMaxChunks), kBlockK);
  return even > kMinChunk ? even : kMinChunk;
}

// Where the rows of one work item sit. Row r of a KV head is query r / group of head nheads_k_index * group + r %
// group: the queries that share keys are neighbours, so one pass over K and V serves the whole GQA group.
struct RowBlock {
  int64_t batch;
  int64_t head_k;
  int64_t first_row;  // in 0 .. seqlen_q * group
  int64_t rows;
};

struct Lengths {
  int64_t group;     // query heads per KV head
  int64_t seqlen_k;  // keys of this batch row
  int64_t offset;    // query i sees keys j < i + offset (causal) or all

  Lengths(const AttentionParams& p, int64_t batch)
      : group(p.nheads / p.nheads_k),
        seqlen_k(p.seqlens_k ? p.seqlens_k[batch] : p.seqlen_k),
        offset(seqlen_k - p.seqlen_q + 1) {}

  // Keys visible to a row: a prefix.
  int64_t visible(const AttentionParams& p, int64_t row) const {
    if (!p.causal) return seqlen_k;
    const int64_t limit = row / group + offset;
    return limit < 0 ? 0 : limit > seqlen_k ? seqlen_k : limit;
  }
};

template <class T>
inline const T* row_pointer(const TensorView& view, int64_t batch, int64_t seq, int64_t head) {
  return static_cast<const T*>(view.data) + batch * view.stride_batch + seq * view.stride_seqlen +
         head * view.stride_head;
}

// The running softmax of `rows` rows over some keys: out = o / sum, in units of 2^(score - max).
// Rows that saw no key have max = -inf, sum = 0, o = 0.
struct SoftmaxState {
  float* max;   // (rows,)
  float* sum;   // (rows,)
  float* o;     // (rows, ldo)
  int64_t ldo;  // headdim_v rounded up to whole vectors

  static int64_t floats(int64_t rows, int64_t ldo) { return rows * (ldo + 2); }
  static SoftmaxState at(float* memory, int64_t rows, int64_t ldo) {
    return {memory + rows * ldo, memory + rows * ldo + rows, memory, ldo};
  }
};

template <class Vec>
inline float exp2_of_difference(float a, float b) {  // 2^(a - b), where b = -inf stands for "nothing yet"
  return first(exp2(Vec::set1(a - (b == -kInfinity ? 0.0f : b))));
}

// total += part, in place (Milakov and Gimelshein, arXiv 1805.02867).
template <class Vec>
inline void merge(const SoftmaxState& total, const SoftmaxState& part, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) {
    const float max = part.max[r] > total.max[r] ? part.max[r] : total.max[r];
    const float keep = exp2_of_difference<Vec>(total.max[r], max);
    const float add = exp2_of_difference<Vec>(part.max[r], max);
    total.max[r] = max;
    total.sum[r] = first(fma(Vec::set1(part.sum[r]), Vec::set1(add), Vec::set1(total.sum[r] * keep)));
    float* o = total.o + r * total.ldo;
    const float* x = part.o + r * part.ldo;
    for (int64_t d = 0; d < total.ldo; d += Vec::kLanes)
      fma(Vec::load(x + d), Vec::set1(add), Vec::load(o + d) * Vec::set1(keep)).store(o + d);
  }
}

// Divide and store: out and lse of the block's rows.
template <class Vec, class T>
inline void finalize(const AttentionParams& p, const RowBlock& block, const SoftmaxState& state) {
  const int64_t group = p.nheads / p.nheads_k;
  for (int64_t r = 0; r < block.rows; ++r) {
    const int64_t row = block.first_row + r;
    const int64_t query = row / group, head = block.head_k * group + row % group;
    T* out = const_cast<T*>(row_pointer<T>(p.out, block.batch, query, head));
    const float* o = state.o + r * state.ldo;
    const bool empty = state.sum[r] == 0.0f;  // not "> 0": a NaN must reach the output
    const Vec scale = Vec::set1(empty ? 0.0f : 1.0f / state.sum[r]);
    int64_t d = 0;
    for (; d + Vec::kLanes <= p.headdim_v; d += Vec::kLanes) (Vec::load(o + d) * scale).store(out + d);
    if (d < p.headdim_v) (Vec::load(o + d) * scale).store_n(out + d, static_cast<int>(p.headdim_v - d));
    if (p.lse)
      p.lse[(block.batch * p.nheads + head) * p.seqlen_q + query] =
          empty ? -kInfinity : kLn2 * (state.max[r] + __builtin_log2f(state.sum[r]));
  }
}

}  // namespace
}  // namespace fastattn
