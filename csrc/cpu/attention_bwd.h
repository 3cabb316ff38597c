// The backward pass: which keys make a work item, who runs it, and in which order items add to the same dQ.
#pragma once

#include "cpu/attention.h"
#include "cpu/attention_bwd_delta.h"
#include "cpu/attention_bwd_tile.h"
#include "cpu/turns.h"

namespace fastattn {
namespace {

template <class Vec, class Words>
class Backward {
 public:
  using Real = typename Vec::Real;
  using Tile = BackwardTile<Vec, Words>;

  explicit Backward(const AttentionBackwardParams& b)
      : b_(b),
        p_(b.fwd),
        group_(p_.nheads / p_.nheads_k),
        block_keys_(Tile::block_keys(p_)),
        blocks_(at_least(1, ceil_div(p_.kv.seqlen, block_keys_))),
        heads_(p_.batch * p_.nheads_k),
        joined_sequences_(b.dbias.data && b.dbias.stride_batch == 0 ? p_.batch : 1),
        joined_heads_(b.dbias.data && b.dbias.stride_head == 0 ? p_.nheads_k : 1),
        strips_(strips(p_.seqlen_q)) {
    const int64_t work = p_.batch * p_.nheads * p_.seqlen_q * p_.kv.seqlen * (p_.headdim + p_.headdim_v);
    nthreads_ = work < kSerialWork ? 1 : p_.nthreads;
  }

  void run() {
    Delta<Vec, Words>(b_).run(nthreads_);
    // Items that add to the same dQ take turns by their block of keys. An item waits for items of lower numbers only,
    // and numbers are drawn in order by threads that finish what they began: nobody waits for what nobody runs.
    const size_t counters = static_cast<size_t>(1 + heads_ * strips_);
    int32_t* next = static_cast<int32_t*>(thread_scratch(ScratchSlot::kShared, counters * sizeof(int32_t)));
    memset(next, 0, counters * sizeof(int32_t));
    turns_ = next + 1;
    const int64_t columns = heads_ / (joined_sequences_ * joined_heads_);
    parallel_for(columns * blocks_, nthreads_, [&](int64_t) {
      [[maybe_unused]] const typename Words::Registers registers;
      const int64_t item = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
      run_item(item / columns, item % columns);
    });
  }

 private:
  // Blocks of keys [first, last) that a strip of rows sees.
  struct Blocks {
    int64_t first, last;
  };

  int64_t strips(int64_t seqlen_q) const { return ceil_div(seqlen_q * group_, Tile::kStrip); }

  // Of equal size, give or take a vector.
  RowBlock strip_of(const Sequence& sequence, int64_t head_k, int64_t strip) const {
    const int64_t rows = sequence.seqlen_q * group_, vecs = ceil_div(rows, Vec::kLanes);
    const int64_t count = strips(sequence.seqlen_q), first = strip * vecs / count * Vec::kLanes;
    return {head_k, first, at_most(rows, (strip + 1) * vecs / count * Vec::kLanes) - first};
  }

  Blocks blocks_of(const Visibility& visibility, const RowBlock& rows) const {
    const int64_t begin = visibility.begin(rows.first_row), end = visibility.end(rows.first_row + rows.rows - 1);
    return begin < end ? Blocks{begin / block_keys_, ceil_div(end, block_keys_)} : Blocks{0, 0};
  }

  // A block of keys of one KV head, or of all that share a bias, and so its gradient.
  void run_item(int64_t block, int64_t column) const {
    const int64_t heads = p_.nheads_k / joined_heads_;
    const int64_t batch = column / heads * joined_sequences_, head_k = column % heads * joined_heads_;
    for (int64_t b = batch; b < batch + joined_sequences_; ++b)
      for (int64_t h = head_k; h < head_k + joined_heads_; ++h) run_block(block, b, h);
  }

  void run_block(int64_t block, int64_t batch, int64_t head_k) const {
    const Sequence sequence(p_, batch);
    const Visibility visibility(p_, sequence);
    const int64_t first_key = block * block_keys_, keys = at_most(block_keys_, sequence.seqlen_k - first_key);
    if (block > 0 && keys <= 0) return;
    const size_t bytes = static_cast<size_t>(Tile::reals(p_)) * sizeof(Real);
    Tile tile(b_, sequence, head_k, first_key, keys, static_cast<Real*>(thread_scratch(ScratchSlot::kTile, bytes)));
    for (int64_t strip = 0; strip < strips(sequence.seqlen_q); ++strip) {
      const RowBlock rows = strip_of(sequence, head_k, strip);
      const Blocks blocks = blocks_of(visibility, rows);
      if (block == 0 && blocks.first == blocks.last) clear_dq(sequence, rows, visibility);
      if (block < blocks.first || block >= blocks.last) continue;
      int32_t* turn = turns_ + (batch * p_.nheads_k + head_k) * strips_ + strip;
      tile.add_rows(rows);
      wait_for_turn(turn, static_cast<int32_t>(block - blocks.first));
      tile.store_rows(rows, block == blocks.first);
      pass_turn(turn);
    }
    tile.store_dkv();
  }

  // Of rows that see no key.
  void clear_dq(const Sequence& sequence, const RowBlock& rows, const Visibility& visibility) const {
    for (int64_t row = rows.first_row; row < rows.first_row + rows.rows; ++row)
      memset(sequence.query<Real>(b_.dq, visibility.query(row), visibility.head(rows, row)), 0,
             static_cast<size_t>(p_.headdim) * sizeof(Real));
  }

  const AttentionBackwardParams& b_;
  const AttentionParams& p_;
  const int64_t group_, block_keys_, blocks_, heads_;
  const int64_t joined_sequences_, joined_heads_;  // per item
  const int64_t strips_;
  int nthreads_;
  int32_t* turns_ = nullptr;  // (batch, nheads_k, strips): how many blocks of keys have been added to a strip's dQ
};

// Dot multiplies bf16 by bf16, if the ISA can: tile_gemm.h.
template <class Vec, class VecDouble, class Dot>
void attention_backward(const AttentionBackwardParams& b) {
  if (b.fwd.batch == 0) return;
  if (b.fwd.dtype == DType::f64) return Backward<VecDouble, RealWords<VecDouble>>(b).run();
  if constexpr (Dot::kTiles) {
    if (scores_by_dot<Vec, Dot>(b.fwd)) return Backward<Vec, TileWords<Vec, Dot>>(b).run();
  } else if constexpr (Dot::kPhases == 1) {
    if (scores_by_dot<Vec, Dot>(b.fwd) && b.fast_bf16_dot) return Backward<Vec, Bf16Words<Vec, Dot>>(b).run();
  }
  Backward<Vec, RealWords<Vec>>(b).run();
}

}  // namespace
}  // namespace fastattn
