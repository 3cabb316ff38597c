// Attention forward on tensor cores, sm_80 and later: FlashAttention-2 (Dao, arXiv 2307.08691) over tiles of keys.
//
// A block of 4 warps owns kRows rows of one KV head (queries times its GQA group) and walks the keys they see from the
// last tile to the first. Each warp owns its rows: scores and probabilities never leave registers, and the tensor
// core's result layout of S is its operand layout of P. K and V arrive by cp.async in a ring of stages, one barrier a
// tile. Tiles that all rows see whole take the loop without masks; scores stay unscaled until one FMA folds scale and
// maximum into the exponent.
#pragma once

#include "cuda/forward_params.cuh"
#include "cuda/online_softmax.cuh"
#include "cuda/products.cuh"
#include "cuda/products_f32.cuh"

namespace fastattn {
namespace {

template <class T, class Traits, class Policy>
class ForwardBlock {
 public:
  FASTATTN_DEVICE ForwardBlock(const ForwardParams& params, const Sequence& sequence, int first_row)
      : params_(params),
        p_(params.attention),
        sequence_(sequence),
        first_row_(first_row),
        warp_row_(thread_index() / 32 * Traits::kWarpRows),
        queries_(shared_base()),
        softmax_(p_),
        split_begin_(0),
        split_end_(sequence.seqlen_k),
        range_(sequence, first_row, Traits::kRows),
        k_(p_.kv.k, params.k_steps, p_.kv, sequence, p_.headdim),
        v_(p_.kv.v, params.v_steps, p_.kv, sequence, p_.headdim_v) {
    const int lane = thread_index() % 32;
    k_lane_ = lane_offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
    v_lane_ = lane_offset(lane % 16, lane / 16);
    if (is_split()) {
      const int keys = split_keys(sequence.seqlen_k);
      split_begin_ = block_index_y() * keys;
      split_end_ = at_most(sequence.seqlen_k, split_begin_ + keys);
      range_.clip(split_begin_, split_end_);
    }
    clear(out_);
  }

  FASTATTN_DEVICE void run() {
    if (range_.begin < range_.end) walk();
    finish();
  }

 private:
  static constexpr bool kSingle = Traits::kElementBytes == 4;  // no tensor core multiplies floats as they are
  using Layout = ScoreLayout<Traits, false>;

  FASTATTN_DEVICE void walk() {
    constexpr int kKeys = Traits::kKeys;
    const TileRange tiles(range_, kKeys, split_begin_, split_end_);
    int tile = tiles.last;
    first_tile_ = tiles.first;
    copy_rows<Traits, Traits::kRows>(queries_, p_.q, p_.headdim, sequence_, first_row_);
    k_.seek(tile * kKeys);
    v_.seek(tile * kKeys);
#pragma unroll
    for (int stage = 0; stage < Traits::kStages - 1; ++stage) {
      if (tile - stage >= first_tile_) copy_tile<true>(stage, tile - stage);
      cp_async_commit();
    }
    int stage = 0;
    bool fresh = true;
    const auto advance = [&] { stage = stage + 1 == Traits::kStages ? 0 : stage + 1; };
    // Every tile has work that costs far more than a test: one loop, and masks where they are needed.
    if constexpr (Policy::kModify || kSingle) {
      for (; tile >= first_tile_; --tile, advance()) {
        arrive(tile, stage);
        if (fresh) load_queries();
        fresh = false;
        step<true>(tile, stage, tiles.needs_mask(tile));
      }
    } else {
      for (; tile >= first_tile_ && (tile >= tiles.open_last || fresh); --tile, advance()) {
        arrive(tile, stage);
        if (fresh) load_queries();
        fresh = false;
        step<true>(tile, stage, true);
      }
      for (; tile >= first_tile_ && tile >= tiles.open_first; --tile, advance()) {
        arrive(tile, stage);
        step<false>(tile, stage, false);
      }
      for (; tile >= first_tile_; --tile, advance()) {
        arrive(tile, stage);
        step<true>(tile, stage, true);
      }
    }
    cp_async_wait<0>();
  }

  FASTATTN_DEVICE uint32_t k_tile(int stage) const {
    return queries_ + Traits::kQueryBytes + static_cast<uint32_t>(stage) * 2 * Traits::kTileBytes;
  }

  template <bool edge>
  FASTATTN_DEVICE void copy_tile(int stage, int tile) {
    k_.template copy<edge>(k_tile(stage), tile * Traits::kKeys, sequence_.seqlen_k);
    v_.template copy<edge>(k_tile(stage) + Traits::kTileBytes, tile * Traits::kKeys, sequence_.seqlen_k);
  }

  // Waits for a tile, then sends for the one that takes the place of the tile before it: all are done with that now.
  FASTATTN_DEVICE void arrive(int tile, int stage) {
    cp_async_wait<Traits::kStages - 2>();
    block_barrier();
    const int next = tile - (Traits::kStages - 1);
    if (next >= first_tile_) copy_tile<false>(stage == 0 ? Traits::kStages - 1 : stage - 1, next);
    cp_async_commit();
  }

  FASTATTN_DEVICE void load_query(uint32_t (&q)[4], int m, int k) const {
    ldmatrix_x4(q, panel_offset<Traits::kRows>(k) + static_cast<uint32_t>(m * 16 * kPanelBytes) +
                       ((queries_ + static_cast<uint32_t>(warp_row_ * kPanelBytes) + v_lane_) ^ panel_turn(k)));
  }
  FASTATTN_DEVICE void load_queries() {
    if constexpr (Traits::kQueryInRegisters) {
#pragma unroll
      for (int m = 0; m < Traits::kRowTiles; ++m)
#pragma unroll
        for (int k = 0; k < Traits::kDim / 16; ++k) load_query(query_[m][k], m, k);
    }
  }

  // `may_mask`: whether there is code for masks; `masked`: whether this tile needs them.
  template <bool may_mask>
  FASTATTN_DEVICE void step(int tile, int stage, bool masked) {
    float scores[Traits::kRowTiles][Traits::kKeys / 8][4];  // (rows, keys)
    if constexpr (kSingle)
      multiply_keys_f32<Traits>(scores, queries_, warp_row_, k_tile(stage));
    else
      multiply_keys(scores, k_tile(stage));
    const Layout at(first_row_ + warp_row_, tile * Traits::kKeys);
    if constexpr (Policy::kModify) modify_scores(scores, p_, sequence_, at);
    if (may_mask && masked) hide_invisible(scores, sequence_, at, split_begin_, split_end_);
    RowFactors<Traits> shrink;
    softmax_.template soften<may_mask>(scores, shrink);
    scale_rows<Traits>(out_, shrink);
    if constexpr (Policy::kDropout) drop(scores, at);
    if constexpr (kSingle)
      multiply_values_f32<Traits>(out_, scores, k_tile(stage) + Traits::kTileBytes);
    else
      add_product<T, Traits>(out_, scores, k_tile(stage) + Traits::kTileBytes, v_lane_);
  }

  FASTATTN_DEVICE void drop(ScoreTile<Traits>& probs, Layout at) const {
    draw_dropout(p_, sequence_, at, [&](int r, int k, bool dropped) {
      if (dropped) Layout::at(probs, r, k) = 0;
    });
  }

  // S = Q K^T
  FASTATTN_DEVICE void multiply_keys(ScoreTile<Traits>& scores, uint32_t tile) {
    clear(scores);
#pragma unroll
    for (int k = 0; k < Traits::kDim / 16; ++k) {
      if constexpr (!Traits::kQueryInRegisters) {
#pragma unroll
        for (int m = 0; m < Traits::kRowTiles; ++m) load_query(query_[m][0], m, k);
      }
      const uint32_t lane = (tile + k_lane_) ^ panel_turn(k);
#pragma unroll
      for (int n = 0; n < Traits::kKeys / 16; ++n) {
        uint32_t b[4];  // (16 dims, 16 keys)
        ldmatrix_x4(b, lane + panel_offset<Traits::kKeys>(k) + static_cast<uint32_t>(n * 16 * kPanelBytes));
#pragma unroll
        for (int m = 0; m < Traits::kRowTiles; ++m) {
          const auto& q = query_[m][Traits::kQueryInRegisters ? k : 0];  // (16 rows, 16 dims)
          mma_16816<T>(scores[m][2 * n], q, b[0], b[1]);
          mma_16816<T>(scores[m][2 * n + 1], q, b[2], b[3]);
        }
      }
    }
  }

  // Divides by the sums and writes out and lse.
  FASTATTN_DEVICE void finish() {
    const float* sinks = is_split() ? nullptr : static_cast<const float*>(p_.sinks);
    conclude_rows(softmax_, out_, sequence_, first_row_ + warp_row_, sinks,
                  Policy::kDropout ? dropout_scale(p_.dropout_p) : 1.0f,
                  [&](int row, float lse) { write_lse(row, lse); });
    if (is_split())
      store_float_lines<Traits>(warp_row_, out_, p_.headdim_v, [&](int line) {
        const int row = first_row_ + line;
        return row < sequence_.rows() ? params_.partial_out + partial_row(row) * p_.headdim_v : nullptr;
      });
    else
      write_out();
  }

  FASTATTN_DEVICE bool is_split() const { return Policy::kMaySplit && params_.partial_out; }

  FASTATTN_DEVICE int64_t partial_row(int row) const {
    return partial_place(p_, block_index_y(), sequence_.batch, sequence_.head_k) * params_.row_blocks * Traits::kRows +
           row;
  }

  FASTATTN_DEVICE void write_lse(int row, float lse) {
    if (is_split())
      store_global(params_.partial_lse + partial_row(row), lse);
    else
      write_row_lse(p_, sequence_, row, lse);
  }

  FASTATTN_DEVICE void write_out() {
    // Through the warp's rows of shared memory, where q lay.
    store_lines<T, Traits>(queries_, warp_row_, out_, p_.headdim_v, [&](int line) {
      const int row = first_row_ + line;
      return row < sequence_.rows() ? row_pointer<T>(p_.out, sequence_.q_row, sequence_.q_first + sequence_.query(row),
                                                     sequence_.head(row))
                                    : nullptr;
    });
  }

  const ForwardParams& params_;
  const AttentionParams& p_;
  const Sequence& sequence_;
  const int first_row_, warp_row_;
  const uint32_t queries_;  // shared address of q's tile, then of the ring of stages
  OnlineSoftmax<Traits, Policy::kModify> softmax_;
  int split_begin_, split_end_, first_tile_ = 0;
  KeyRange range_;
  KeyCopy<Traits, Policy::kPaged> k_, v_;
  uint32_t k_lane_, v_lane_;
  uint32_t query_[Traits::kRowTiles][Traits::kQueryInRegisters ? Traits::kDim / 16 : 1][4];
  OutTile<Traits> out_;  // (rows, headdim_v)
};

template <class T, class Traits, class Policy>
FASTATTN_KERNEL(kThreads, Traits::kRowTiles == 1 && Traits::kDim <= 64 && Traits::kElementBytes == 2 ? 3 : 2)
attention_forward(FASTATTN_GRID_CONSTANT ForwardParams params) {
  const BlockPlace place(params);
  const Sequence sequence(params.attention, place.batch, place.head_k);
  const int first_row = place.row_block * Traits::kRows;
  if (first_row >= sequence.rows()) return;
  if (Policy::kMaySplit && block_index_y() >= split_count(sequence.seqlen_k)) return;
  ForwardBlock<T, Traits, Policy>(params, sequence, first_row).run();
}

}  // namespace
}  // namespace fastattn
