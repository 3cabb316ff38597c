// The forward pass: which rows and keys make a work item, who runs it, and how partial results meet.
#pragma once

#include "cpu/attention_decode.h"
#include "cpu/attention_fwd.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "dispatch.h"

namespace fastattn {
namespace {

constexpr int64_t kSerialWork = int64_t{1} << 18;  // multiply-adds below which waking threads costs more than it saves

// Kernel is ForwardTile or DecodeRows: attend(begin, end, state) over one RowBlock.
template <class Vec, class T, class Kernel>
void attend_all(const AttentionParams& p, int64_t rows_per_item) {
  const int64_t rows = p.seqlen_q * (p.nheads / p.nheads_k);
  const int64_t heads = p.batch * p.nheads_k;
  const int64_t blocks = ceil_div(rows, rows_per_item);
  const int64_t items = heads * blocks;
  const int64_t ldo = round_up(p.headdim_v, Vec::kLanes);
  const int64_t state_floats = SoftmaxState::floats(rows_per_item, ldo);
  const int64_t kernel_floats = Kernel::floats(p, rows_per_item);
  const bool small = rows * heads * p.seqlen_k * (p.headdim + p.headdim_v) < kSerialWork;
  const int nthreads = small ? 1 : p.nthreads;

  // Heads fastest, and the last (under a causal mask the longest) rows first.
  const auto block_of = [&](int64_t item) {
    const int64_t head = item % heads, first = (blocks - 1 - item / heads) * rows_per_item;
    return RowBlock{head / p.nheads_k, head % p.nheads_k, first,
                    rows - first < rows_per_item ? rows - first : rows_per_item};
  };
  const auto memory = [&](int64_t states) {
    const size_t floats = static_cast<size_t>(kernel_floats + states * state_floats);
    return static_cast<float*>(thread_scratch(ScratchSlot::kTile, floats * sizeof(float)));
  };

  const int64_t chunks = ceil_div(p.seqlen_k, chunk_keys(p.seqlen_k));
  if (nthreads == 1 || chunks <= 1 || items >= 4 * nthreads) {
    parallel_for(items, nthreads, [&](int64_t item) {
      const RowBlock block = block_of(item);
      float* own = memory(2);
      const SoftmaxState total = SoftmaxState::at(own + kernel_floats, block.rows, ldo);
      const SoftmaxState part = SoftmaxState::at(own + kernel_floats + state_floats, block.rows, ldo);
      Kernel kernel(p, block, own);
      const int64_t seqlen_k = Lengths(p, block.batch).seqlen_k, step = chunk_keys(seqlen_k);
      kernel.attend(0, step < seqlen_k ? step : seqlen_k, total);
      for (int64_t key = step; key < seqlen_k; key += step) {
        kernel.attend(key, key + step < seqlen_k ? key + step : seqlen_k, part);
        merge<Vec>(total, part, block.rows);
      }
      finalize<Vec, T>(p, block, total);
    });
    return;
  }

  // Few rows and many keys: every chunk is an item of its own, merged in the same order afterwards.
  const size_t shared_floats = static_cast<size_t>(items * kMaxChunks * state_floats);
  float* shared = static_cast<float*>(thread_scratch(ScratchSlot::kShared, shared_floats * sizeof(float)));
  const auto state_of = [&](int64_t item, int64_t chunk, int64_t block_rows) {
    return SoftmaxState::at(shared + (item * kMaxChunks + chunk) * state_floats, block_rows, ldo);
  };
  parallel_for(items * kMaxChunks, nthreads, [&](int64_t index) {
    const int64_t item = index / kMaxChunks, chunk = index % kMaxChunks;
    const RowBlock block = block_of(item);
    const int64_t seqlen_k = Lengths(p, block.batch).seqlen_k, step = chunk_keys(seqlen_k);
    if (chunk > 0 && chunk * step >= seqlen_k) return;
    const int64_t end = (chunk + 1) * step < seqlen_k ? (chunk + 1) * step : seqlen_k;
    Kernel(p, block, memory(0)).attend(chunk * step, end, state_of(item, chunk, block.rows));
  });
  for (int64_t item = 0; item < items; ++item) {
    const RowBlock block = block_of(item);
    const int64_t seqlen_k = Lengths(p, block.batch).seqlen_k, step = chunk_keys(seqlen_k);
    const SoftmaxState total = state_of(item, 0, block.rows);
    for (int64_t chunk = 1; chunk * step < seqlen_k; ++chunk)
      merge<Vec>(total, state_of(item, chunk, block.rows), block.rows);
    finalize<Vec, T>(p, block, total);
  }
}

template <class Vec>
void attention_forward(const AttentionParams& p) {
  if (p.batch == 0 || p.seqlen_q == 0) return;
  visit_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using Decode = DecodeRows<Vec, T>;
    using Tile = ForwardTile<Vec, T>;
    const int64_t rows = p.seqlen_q * (p.nheads / p.nheads_k);
    if (rows <= Decode::kMaxRows) return attend_all<Vec, T, Decode>(p, rows);
    // Smaller items where there would be too few of them to keep the threads evenly busy.
    int64_t per_item = Tile::max_rows(p);
    while (per_item > Tile::kStrip && p.batch * p.nheads_k * ceil_div(rows, per_item) < 4 * p.nthreads)
      per_item -= Tile::kStrip;
    attend_all<Vec, T, Tile>(p, rows < per_item ? rows : per_item);
  });
}

}  // namespace
}  // namespace fastattn
