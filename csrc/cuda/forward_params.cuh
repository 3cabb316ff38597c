// What the forward kernels are launched with, and which rows and tiles a block has.
#pragma once

#include "cuda/tile_copy.cuh"

namespace fastattn {
namespace {

struct ForwardParams {
  AttentionParams attention;
  CopySteps k_steps, v_steps;
  int row_blocks;  // of the longest sequence
  float*
      partial_out;  // (splits, batch, nheads_k, rows, headdim_v) of row_blocks * kRows rows; null = keys are not split
  float* partial_lse;  // (splits, batch, nheads_k, rows), in units of log2
};

// What is decided at compile time: score modifiers at all, dropout, pages, and whether blocks may split the keys.
template <bool modify, bool dropout, bool paged, bool split>
struct Policy {
  static constexpr bool kModify = modify, kDropout = dropout, kPaged = paged, kMaySplit = split;
};

// The rows of a block: of one KV head of one sequence.
struct BlockPlace {
  int batch, head_k, row_block;

  FASTATTN_DEVICE explicit BlockPlace(const ForwardParams& params) {
    const int place = block_index_x() / params.row_blocks, nheads_k = static_cast<int>(params.attention.nheads_k);
    batch = place / nheads_k;
    head_k = place % nheads_k;
    row_block = params.row_blocks - 1 - block_index_x() % params.row_blocks;  // causal: the long rows first
  }
};

// The tiles of keys that a block walks, from the last to the first.
struct TileRange {
  int first, last;            // of those that any row sees
  int open_first, open_last;  // tiles [open_first, open_last) need no mask

  FASTATTN_DEVICE TileRange(const KeyRange& range, int keys, int split_begin, int split_end) {
    const int open_begin = at_least(split_begin, range.open_begin), open_end = at_most(split_end, range.open_end);
    first = range.begin / keys;
    last = (range.end - 1) / keys;
    open_first = (open_begin + keys - 1) / keys;
    open_last = open_end / keys;
  }

  FASTATTN_DEVICE bool needs_mask(int tile) const { return tile >= open_last || tile < open_first; }
};

}  // namespace
}  // namespace fastattn
