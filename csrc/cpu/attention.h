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

constexpr int64_t kSharedFloats = int64_t{1} << 20;  // partial results that may wait in memory to be merged

// Kernel is ForwardTile or DecodeRows: attend(begin, end, state) over one RowBlock.
template <class Vec, class T, class Kernel>
class Forward {
 public:
  Forward(const AttentionParams& p, int64_t rows_per_item)
      : p_(p),
        rows_(p.seqlen_q * (p.nheads / p.nheads_k)),
        rows_per_item_(rows_per_item),
        heads_(p.batch * p.nheads_k),
        blocks_(ceil_div(rows_, rows_per_item)),
        items_(heads_ * blocks_),
        ldo_(round_up(p.headdim_v, Vec::kLanes)),
        state_floats_(SoftmaxState::floats(rows_per_item, ldo_)),
        kernel_floats_(Kernel::floats(p, rows_per_item)) {}

  void run() const {
    const bool small = rows_ * heads_ * p_.seqlen_k * (p_.headdim + p_.headdim_v) < kSerialWork;
    const int nthreads = small ? 1 : p_.nthreads;
    const int64_t most = ceil_div(p_.seqlen_k, kMinChunk), chunks = most < kMaxChunks ? most : kMaxChunks;
    const bool few_items = nthreads > 1 && items_ < 4 * nthreads;
    if (chunks > 1 && (few_items || items_ * chunks * state_floats_ <= kSharedFloats))
      run_chunks(chunks, nthreads);
    else
      run_items(nthreads);
  }

 private:
  struct Chunks {  // of one batch row
    int64_t seqlen_k, step;
    Chunks(const AttentionParams& p, int64_t batch)
        : seqlen_k(Lengths(p, batch).seqlen_k), step(chunk_keys(seqlen_k)) {}
    int64_t count() const { return seqlen_k > 0 ? ceil_div(seqlen_k, step) : 1; }
    int64_t begin(int64_t chunk) const { return chunk * step; }
    int64_t end(int64_t chunk) const { return begin(chunk + 1) < seqlen_k ? begin(chunk + 1) : seqlen_k; }
  };

  // Heads fastest, and the last (under a causal mask the longest) rows first.
  RowBlock block_of(int64_t item) const {
    const int64_t head = item % heads_, first = (blocks_ - 1 - item / heads_) * rows_per_item_;
    return {head / p_.nheads_k, head % p_.nheads_k, first,
            rows_ - first < rows_per_item_ ? rows_ - first : rows_per_item_};
  }

  float* memory(int64_t states) const {
    const size_t floats = static_cast<size_t>(kernel_floats_ + states * state_floats_);
    return static_cast<float*>(thread_scratch(ScratchSlot::kTile, floats * sizeof(float)));
  }

  // Many rows: an item walks through all its keys.
  void run_items(int nthreads) const {
    parallel_for(items_, nthreads, [&](int64_t item) {
      const RowBlock block = block_of(item);
      float* own = memory(2);
      const SoftmaxState total = SoftmaxState::at(own + kernel_floats_, block.rows, ldo_);
      const SoftmaxState part = SoftmaxState::at(own + kernel_floats_ + state_floats_, block.rows, ldo_);
      Kernel kernel(p_, block, own);
      const Chunks chunks(p_, block.batch);
      kernel.attend(chunks.begin(0), chunks.end(0), total);
      for (int64_t chunk = 1; chunk < chunks.count(); ++chunk) {
        kernel.attend(chunks.begin(chunk), chunks.end(chunk), part);
        merge<Vec>(total, part, block.rows);
      }
      finalize<Vec, T>(p_, block, total);
    });
  }

  // Few rows and many keys: every chunk of keys is an item of its own, merged in order afterwards. All heads of a chunk
  // come before the next chunk: in a (seqlen, heads, dim) cache they share pages, and so address translations.
  void run_chunks(int64_t most, int nthreads) const {
    const size_t floats = static_cast<size_t>(items_ * most * state_floats_);
    float* shared = static_cast<float*>(thread_scratch(ScratchSlot::kShared, floats * sizeof(float)));
    const auto state_of = [&](int64_t item, int64_t chunk, const RowBlock& block) {
      return SoftmaxState::at(shared + (item * most + chunk) * state_floats_, block.rows, ldo_);
    };
    parallel_for(most * items_, nthreads, [&](int64_t index) {
      const int64_t chunk = index / items_, item = index % items_;
      const RowBlock block = block_of(item);
      const Chunks chunks(p_, block.batch);
      if (chunk < chunks.count())
        Kernel(p_, block, memory(0)).attend(chunks.begin(chunk), chunks.end(chunk), state_of(item, chunk, block));
    });
    for (int64_t item = 0; item < items_; ++item) {
      const RowBlock block = block_of(item);
      const int64_t count = Chunks(p_, block.batch).count();
      const SoftmaxState total = state_of(item, 0, block);
      for (int64_t chunk = 1; chunk < count; ++chunk) merge<Vec>(total, state_of(item, chunk, block), block.rows);
      finalize<Vec, T>(p_, block, total);
    }
  }

  const AttentionParams& p_;
  const int64_t rows_, rows_per_item_, heads_, blocks_, items_;
  const int64_t ldo_, state_floats_, kernel_floats_;
};

template <class Vec>
void attention_forward(const AttentionParams& p) {
  if (p.batch == 0 || p.seqlen_q == 0) return;
  visit_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using Decode = DecodeRows<Vec, T>;
    using Tile = ForwardTile<Vec, T>;
    const int64_t rows = p.seqlen_q * (p.nheads / p.nheads_k);
    if (rows <= Decode::kMaxRows) return Forward<Vec, T, Decode>(p, rows).run();
    // Smaller items where there would be too few of them to keep the threads evenly busy.
    int64_t per_item = Tile::max_rows(p);
    while (per_item > Tile::kStrip && p.batch * p.nheads_k * ceil_div(rows, per_item) < 4 * p.nthreads)
      per_item -= Tile::kStrip;
    Forward<Vec, T, Tile>(p, rows < per_item ? rows : per_item).run();
  });
}

}  // namespace
}  // namespace fastattn
