// The results of a row's splits become one: each weighs exp(lse), the sink joins the denominator.
#pragma once

#include "cuda/attention_fwd.cuh"

namespace fastattn {
namespace {

struct CombineParams {
  ForwardParams forward;
  int padded_rows;  // of one KV head of one sequence, in the partial results
};

template <class T>
FASTATTN_DEVICE void store_eight(T* line, const float (&x)[8]) {
  uint32_t bytes[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) bytes[i] = pack2<T>(x[2 * i], x[2 * i + 1]);
  store_global16(line, bytes);
}
FASTATTN_DEVICE void store_eight(float* line, const float (&x)[8]) {
#pragma unroll
  for (int i = 0; i < 8; i += 4) {
    uint32_t bytes[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) bytes[e] = bits_of_float(x[i + e]);
    store_global16(line + i, bytes);
  }
}

// One thread for 8 dimensions of one row.
template <class T>
FASTATTN_KERNEL(kThreads, 8)
combine_splits(FASTATTN_GRID_CONSTANT CombineParams params) {
  const AttentionParams& p = params.forward.attention;
  const int chunks = static_cast<int>(p.headdim_v) / 8, nheads_k = static_cast<int>(p.nheads_k);
  const int chunk = (block_index_x() * kThreads + thread_index()) % chunks;
  const int place = (block_index_x() * kThreads + thread_index()) / chunks;  // (batch, nheads_k, rows)
  const int row = place % params.padded_rows, head = place / params.padded_rows;
  if (head >= static_cast<int>(p.batch) * nheads_k) return;
  const Sequence sequence(p, head / nheads_k, head % nheads_k);
  if (row >= sequence.rows()) return;

  const int splits = split_count(sequence.seqlen_k);
  const auto index = [&](int split) {
    return partial_place(p, split, sequence.batch, sequence.head_k) * params.padded_rows + row;
  };
  float top = -kInfinity, sink = -kInfinity;
  if (p.sinks) sink = load_global(static_cast<const float*>(p.sinks) + sequence.head(row)) * static_cast<float>(kLog2e);
  top = sink;
  for (int split = 0; split < splits; ++split)
    top = maximum(top, load_global(params.forward.partial_lse + index(split)));
  const float base = top == -kInfinity ? 0.0f : top;

  float sum = exp2_approx(sink - base), out[8] = {};
  for (int split = 0; split < splits; ++split) {
    const float weight = exp2_approx(load_global(params.forward.partial_lse + index(split)) - base);
    const float* line = params.forward.partial_out + index(split) * p.headdim_v + chunk * 8;
    sum += weight;
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      const Float4 four = load_global(reinterpret_cast<const Float4*>(line + i));
#pragma unroll
      for (int e = 0; e < 4; ++e) out[i + e] = fused_multiply_add(weight, four.value[e], out[i + e]);
    }
  }
  const float factor = sum == 0 ? 0.0f : 1 / sum;
#pragma unroll
  for (float& x : out) x *= factor;
  store_eight(
      row_pointer<T>(p.out, sequence.q_row, sequence.q_first + sequence.query(row), sequence.head(row)) + chunk * 8,
      out);
  if (chunk == 0 && p.lse) {
    float* lse = static_cast<float*>(p.lse) + sequence.q_row * p.lse_stride_batch +
                 sequence.head(row) * p.lse_stride_head + sequence.q_first + sequence.query(row);
    store_global(lse, sum == 0 ? -kInfinity : (top + log2_approx(sum)) * kLn2);
  }
}

}  // namespace
}  // namespace fastattn
