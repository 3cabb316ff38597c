// Attention forward for Hopper, sm_90a: FlashAttention-3's division of labour (Shah et al., arXiv 2407.08608).
//
// A block of three warpgroups owns 128 rows of one KV head. The first copies tiles of K and V into a ring of stages, by
// cp.async, which serves any strides, pages and ragged ends; the others multiply 64 rows each by wgmma. They meet at
// mbarriers only: a stage is full when its copies have landed, and empty when all warps that multiply have read it.
// S stays in registers, becomes P there, and goes into the second product as it lies. The product with a tile's V runs
// beside the next tile's QK^T and its softmax.
#pragma once

#include "cuda/forward_params.cuh"
#include "cuda/hopper_tiles.cuh"
#include "cuda/online_softmax.cuh"
#include "cuda/products.cuh"

namespace fastattn {
namespace {

// What the first warpgroup does: everything that is copied in.
template <class Traits, class Policy>
class HopperProducer {
 public:
  FASTATTN_DEVICE HopperProducer(const ForwardParams& params, const Sequence& sequence, int first_row)
      : p_(params.attention),
        sequence_(sequence),
        first_row_(first_row),
        k_(p_.kv.k, params.k_steps, p_.kv, sequence, p_.headdim),
        v_(p_.kv.v, params.v_steps, p_.kv, sequence, p_.headdim_v) {}

  FASTATTN_DEVICE void run(const TileRange& tiles) {
#pragma unroll
    for (int group = 0; group < Traits::kGroups; ++group)
      copy_rows<Traits, Traits::kGroupRows>(shared_.queries(group), p_.q, p_.headdim, sequence_,
                                            first_row_ + group * Traits::kGroupRows);
    mbarrier_arrive_copies(shared_.queries_full());
    k_.seek(tiles.last * Traits::kKeys);
    v_.seek(tiles.last * Traits::kKeys);
    copy_tile<true>(tiles.last);
    for (int tile = tiles.last - 1; tile >= tiles.first; --tile) copy_tile<false>(tile);
    cp_async_wait_all();
  }

 private:
  template <bool edge>
  FASTATTN_DEVICE void copy_tile(int tile) {
    const int stage = place_.stage, key = tile * Traits::kKeys;
    mbarrier_wait(shared_.keys_empty(stage), place_.parity ^ 1);
    k_.template copy<edge>(shared_.keys(stage), key, sequence_.seqlen_k);
    mbarrier_arrive_copies(shared_.keys_full(stage));
    mbarrier_wait(shared_.values_empty(stage), place_.parity ^ 1);
    v_.template copy<edge>(shared_.values(stage), key, sequence_.seqlen_k);
    mbarrier_arrive_copies(shared_.values_full(stage));
    place_.advance();
  }

  const AttentionParams& p_;
  const Sequence& sequence_;
  const int first_row_;
  const HopperShared<Traits> shared_;
  RingPlace<Traits> place_;
  KeyCopy<Traits, Policy::kPaged> k_, v_;
};

// What each of the other warpgroups does: all arithmetic on its rows.
template <class T, class Traits, class Policy>
class HopperConsumer {
 public:
  FASTATTN_DEVICE HopperConsumer(const AttentionParams& p, const Sequence& sequence, int first_row)
      : p_(p),
        sequence_(sequence),
        group_(thread_index() / kThreads - 1),
        group_row_(first_row + group_ * Traits::kGroupRows),
        warp_line_(thread_index() / 32 % kWarps * 16),
        queries_(shared_.queries(group_)),
        softmax_(p) {
    clear(out_);
  }

  FASTATTN_DEVICE void walk(const TileRange& tiles) {
    mbarrier_wait(shared_.queries_full(), 0);
    begin(tiles.last, tiles.needs_mask(tiles.last));
    int tile = tiles.last - 1;
    if constexpr (Policy::kModify) {  // every tile has work of its own: one loop, and masks where they are needed
      for (; tile >= tiles.first; --tile) step<true>(tile, tiles.needs_mask(tile));
    } else {
      for (; tile >= tiles.first && tile >= tiles.open_last; --tile) step<true>(tile, true);
      for (; tile >= tiles.first && tile >= tiles.open_first; --tile) step<false>(tile, false);
      for (; tile >= tiles.first; --tile) step<true>(tile, true);
    }
    end();
  }

  // Divides by the sums and writes out and lse.
  FASTATTN_DEVICE void finish() {
    conclude_rows(softmax_, out_, sequence_, group_row_ + warp_line_, static_cast<const float*>(p_.sinks),
                  Policy::kDropout ? dropout_scale(p_.dropout_p) : 1.0f,
                  [&](int row, float lse) { write_row_lse(p_, sequence_, row, lse); });
    named_barrier(1 + group_, kThreads);  // q has been read: out takes its place
    store_out();
  }

 private:
  using Layout = ScoreLayout<Traits, false>;
  using Scores = ScoreTile<Traits>;

  // The first tile's S: nothing runs beside it.
  FASTATTN_DEVICE void begin(int tile, bool masked) {
    Scores scores;  // (rows, keys)
    await(shared_.keys_full(k_place_.stage), k_place_.parity);
    wgmma_fence();
    multiply_keys(scores);
    wgmma_wait<0>();
    pin(scores[0]);
    release(shared_.keys_empty(k_place_.stage));
    k_place_.advance();
    RowFactors<Traits> shrink;  // of nothing
    soften<true>(scores, tile, masked, shrink);
    take_probabilities(scores);
  }

  // P V of the tile before, and S of this one. `may_mask`: whether there is code for masks; `masked`: whether this tile
  // needs them.
  template <bool may_mask>
  FASTATTN_DEVICE void step(int tile, bool masked) {
    Scores scores;                                                // (rows, keys)
    await(shared_.values_full(v_place_.stage), v_place_.parity);  // was sent for before the keys
    await(shared_.keys_full(k_place_.stage), k_place_.parity);
    pin_operands();
    wgmma_fence();
    multiply_keys(scores);
    add_values();
    wgmma_wait<1>();
    pin(scores[0]);
    release(shared_.keys_empty(k_place_.stage));
    k_place_.advance();
    RowFactors<Traits> shrink;
    soften<may_mask>(scores, tile, masked, shrink);
    wgmma_wait<0>();
    pin_operands();
    release(shared_.values_empty(v_place_.stage));
    v_place_.advance();
    scale_rows<Traits>(out_, shrink);
    take_probabilities(scores);
  }

  // P V of the last tile.
  FASTATTN_DEVICE void end() {
    await(shared_.values_full(v_place_.stage), v_place_.parity);
    pin_operands();
    wgmma_fence();
    add_values();
    wgmma_wait<0>();
    pin_operands();
  }

  // A tile that has landed; wgmma reads what cp.async wrote only behind the fence.
  FASTATTN_DEVICE void await(uint32_t full, int parity) const {
    mbarrier_wait(full, parity);
    fence_proxy_async();
  }
  // This warp's products have read it.
  FASTATTN_DEVICE void release(uint32_t empty) const {
    if (thread_index() % 32 == 0) mbarrier_arrive(empty);
  }
  FASTATTN_DEVICE void pin_operands() {
    pin(out_[0]);
    pin(probs_);
  }

  // S = Q K^T
  FASTATTN_DEVICE void multiply_keys(Scores& scores) {
    const uint32_t keys = shared_.keys(k_place_.stage);
    uint32_t queries = queries_;
    if constexpr (Policy::kModify) pin(queries);  // or its descriptors take registers all along
#pragma unroll
    for (int k = 0; k < Traits::kDim / 16; ++k)
      wgmma_rows<T>(scores[0], rows_operand<Traits::kGroupRows>(queries, k), rows_operand<Traits::kKeys>(keys, k),
                    k > 0);
    wgmma_commit();
  }

  // out += P V
  FASTATTN_DEVICE void add_values() {
    const uint32_t values = shared_.values(v_place_.stage);
#pragma unroll
    for (int k = 0; k < Traits::kKeys / 16; ++k)
      wgmma_columns<T>(out_[0], probs_[k], columns_operand<Traits::kKeys>(values, k), true);
    wgmma_commit();
  }

  template <bool may_mask>
  FASTATTN_DEVICE void soften(Scores& scores, int tile, bool masked, RowFactors<Traits>& shrink) {
    const Layout at(group_row_ + warp_line_, tile * Traits::kKeys);
    if constexpr (Policy::kModify) modify_scores(scores, p_, sequence_, at);
    if (may_mask && masked) hide_invisible(scores, sequence_, at, 0, sequence_.seqlen_k);
    softmax_.template soften<may_mask>(scores, shrink);
    if constexpr (Policy::kDropout)
      draw_dropout(p_, sequence_, at, [&](int r, int k, bool dropped) {
        if (dropped) Layout::at(scores, r, k) = 0;
      });
  }

  // The result layout of a product is the layout of its first operand.
  FASTATTN_DEVICE void take_probabilities(const Scores& scores) {
#pragma unroll
    for (int k = 0; k < Traits::kKeys / 16; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        probs_[k][i] = pack2<T>(scores[0][2 * k + i / 2][i % 2 * 2], scores[0][2 * k + i / 2][i % 2 * 2 + 1]);
  }

  // Through shared memory, so that a row goes in one piece.
  FASTATTN_DEVICE void store_out() {
    const int lane = thread_index() % 32;
    const uint32_t lines = queries_ + static_cast<uint32_t>(warp_line_) * Traits::kOutPitch;
#pragma unroll
    for (int n = 0; n < Traits::kDim / 8; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        store_shared4(lines + static_cast<uint32_t>(8 * half + lane / 4) * Traits::kOutPitch +
                          static_cast<uint32_t>(16 * n + lane % 4 * 4),
                      pack2<T>(out_[0][n][2 * half], out_[0][n][2 * half + 1]));
    fence_proxy_async();
    warp_barrier();
    const int row = group_row_ + warp_line_ + lane;
    if (lane < 16 && row < sequence_.rows())
      bulk_store(row_pointer<T>(p_.out, sequence_.q_row, sequence_.q_first + sequence_.query(row), sequence_.head(row)),
                 lines + static_cast<uint32_t>(lane) * Traits::kOutPitch,
                 static_cast<uint32_t>(p_.headdim_v) * Traits::kElementBytes);
    bulk_commit();
    bulk_wait_read();
  }

  const AttentionParams& p_;
  const Sequence& sequence_;
  const HopperShared<Traits> shared_;
  const int group_, group_row_;
  const int warp_line_;  // of the group's rows
  const uint32_t queries_;
  RingPlace<Traits> k_place_, v_place_;
  OnlineSoftmax<Traits, Policy::kModify> softmax_;
  uint32_t probs_[Traits::kKeys / 16][4];  // P (rows, keys), 16 keys by 16
  OutTile<Traits> out_;                    // (rows, headdim_v)
};

template <class T, class Traits, class Policy>
FASTATTN_KERNEL(Traits::kBlockThreads, 1)
attention_forward_sm90(FASTATTN_GRID_CONSTANT ForwardParams params) {
  const BlockPlace place(params);
  const Sequence sequence(params.attention, place.batch, place.head_k);
  const int first_row = place.row_block * Traits::kRows;
  if (first_row >= sequence.rows()) return;
  const KeyRange range(sequence, first_row, Traits::kRows);
  const TileRange tiles(range, Traits::kKeys, 0, sequence.seqlen_k);
  HopperShared<Traits>().init_barriers();
  const bool sees_keys = range.begin < range.end;
  if (thread_index() < kThreads) {
    give_registers_back<Traits::template kCopyRegisters<Policy::kPaged>>();
    if (sees_keys) HopperProducer<Traits, Policy>(params, sequence, first_row).run(tiles);
  } else {
    take_registers<Traits::template kProductRegisters<Policy::kPaged>>();
    HopperConsumer<T, Traits, Policy> consumer(params.attention, sequence, first_row);
    if (sees_keys) consumer.walk(tiles);
    consumer.finish();
  }
}

}  // namespace
}  // namespace fastattn
