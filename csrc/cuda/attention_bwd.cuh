// Gradients on tensor cores, of floats by FMAs: S and P are computed again from q, k and lse (FlashAttention-2, Dao,
// arXiv 2307.08691).
//
// Two kernels of one build, each other's mirror image. One owns rows of dQ and walks tiles of keys, the other owns keys
// of dK and dV and walks tiles of rows with everything transposed; either way a warp's products and its gradients stay
// in registers, and the result layout of dS is its operand layout. So nothing is added up in memory: no atomics, the
// same bits every time. It costs S and dP twice, 7 products where 5 would do. Above headdim 128, where both gradients
// of a key exceed the registers, one block makes dK and another dV.
#pragma once

#include "cuda/products_f32.cuh"

namespace fastattn {
namespace {

struct BackwardParams {
  AttentionBackwardParams call;
  CopySteps k_steps, v_steps;
  int row_blocks, key_blocks;  // of the longest sequence
};

// Which gradients of the keys a block makes.
enum class Gradients { both, keys, values };

template <bool modify, bool dropout, Gradients gradients = Gradients::both>
struct BackwardPolicy {
  static constexpr bool kModify = modify, kDropout = dropout;
  static constexpr bool kKeys = gradients != Gradients::values, kValues = gradients != Gradients::keys;
};

// Tiles 0 to count - 1 through a ring of stages: send(stage, i) begins the copies of tile i, land(stage) runs before
// the barrier that makes them everybody's, step(stage, i) works.
template <class Traits, class Send, class Land, class Step>
FASTATTN_DEVICE void stream_tiles(int count, Send send, Land land, Step step) {
#pragma unroll
  for (int stage = 0; stage < Traits::kStages - 1; ++stage) {
    if (stage < count) send(stage, stage);
    cp_async_commit();
  }
  int stage = 0;
  for (int i = 0; i < count; ++i) {
    land(stage);
    cp_async_wait<Traits::kStages - 2>();
    block_barrier();
    const int next = i + Traits::kStages - 1;
    if (next < count) send(stage == 0 ? Traits::kStages - 1 : stage - 1, next);
    cp_async_commit();
    step(stage, i);
    stage = stage + 1 == Traits::kStages ? 0 : stage + 1;
  }
  cp_async_wait<0>();
}

// What both kernels know.
template <class T, class Traits>
class BackwardBlock {
 protected:
  FASTATTN_DEVICE BackwardBlock(const BackwardParams& params, const Sequence& sequence)
      : params_(params),
        p_(params.call.fwd),
        sequence_(sequence),
        warp_line_(thread_index() / 32 * Traits::kWarpRows),
        own_(shared_base()),
        scale_(static_cast<float>(p_.softmax_scale * kLog2e)) {
    const int lane = thread_index() % 32;
    line_lane_ = lane_offset(lane % 16, lane / 16);
    column_lane_ = lane_offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  }

  // The block's own two tiles (q and dout, or k and v), then the ring of stages with two tiles and statistics each.
  FASTATTN_DEVICE uint32_t own_tile(int i) const { return own_ + static_cast<uint32_t>(i) * Traits::kOwnBytes; }
  FASTATTN_DEVICE uint32_t stage_tile(int stage, int i) const {
    return own_tile(2) + static_cast<uint32_t>(stage) * (2 * Traits::kTileBytes + Traits::kStatisticsBytes) +
           static_cast<uint32_t>(i) * Traits::kTileBytes;
  }
  FASTATTN_DEVICE uint32_t statistics(int stage) const { return stage_tile(stage, 2); }

  // scores (lines, columns) = this warp's lines of an own tile times a walked tile, transposed
  FASTATTN_DEVICE void multiply(ScoreTile<Traits>& scores, uint32_t own, uint32_t tile) const {
    if constexpr (sizeof(T) == 4)
      multiply_keys_f32<Traits>(scores, own, warp_line_, tile);
    else
      multiply_on_tensor_cores(scores, own, tile);
  }
  FASTATTN_DEVICE void multiply_on_tensor_cores(ScoreTile<Traits>& scores, uint32_t own, uint32_t tile) const {
    clear(scores);
#pragma unroll
    for (int k = 0; k < Traits::kDim / 16; ++k) {
      uint32_t a[4];  // (16 lines, 16 dims)
      ldmatrix_x4(a, panel_offset<Traits::kRows>(k) +
                         ((own + static_cast<uint32_t>(warp_line_ * kPanelBytes) + line_lane_) ^ panel_turn(k)));
      const uint32_t lane = (tile + column_lane_) ^ panel_turn(k);
#pragma unroll
      for (int n = 0; n < Traits::kKeys / 16; ++n) {
        uint32_t b[4];  // (16 dims, 16 columns)
        ldmatrix_x4(b, lane + panel_offset<Traits::kKeys>(k) + static_cast<uint32_t>(n * 16 * kPanelBytes));
        mma_16816<T>(scores[0][2 * n], a, b[0], b[1]);
        mma_16816<T>(scores[0][2 * n + 1], a, b[2], b[3]);
      }
    }
  }

  // gradient (lines, dims) += weights (lines, columns) times a walked tile
  FASTATTN_DEVICE void accumulate(float (&gradient)[1][Traits::kDim / 8][4], const ScoreTile<Traits>& weights,
                                  uint32_t tile) const {
    if constexpr (sizeof(T) == 4)
      multiply_values_f32<Traits>(gradient, weights, tile);
    else
      add_product<T, Traits>(gradient, weights, tile, line_lane_);
  }

  // The log2 of what a row's exp2 scores sum to, and delta; a row that does not exist or sees nothing has no weights.
  FASTATTN_DEVICE Float2 statistics_of_row(int row) const {
    if (row >= sequence_.rows()) return {kInfinity, 0.0f};
    const int64_t place = lse_place(p_, sequence_, sequence_.query(row), sequence_.head(row));
    const float lse = load_global(static_cast<const float*>(p_.lse) + place);
    return {lse == -kInfinity ? kInfinity : lse * static_cast<float>(kLog2e),
            load_global(static_cast<const float*>(params_.call.delta) + place)};
  }

  // Scores become P (what dropout keeps of it, before the scale), and dprobs, which come as dP, become dS: of the
  // scaled scores before the softcap. `statistics_of(r)`: of the layout's row r. `masked`: some may be hidden.
  template <class Policy, class Layout, class StatisticsOf, class Report>
  FASTATTN_DEVICE void differentiate(ScoreTile<Traits>& scores, ScoreTile<Traits>& dprobs, Layout at, bool masked,
                                     StatisticsOf statistics_of, Report report) const {
    static_assert(Layout::kRows * Layout::kKeys <= 32);
    uint32_t dropped_bits = 0;
    if constexpr (Policy::kDropout)
      draw_dropout(p_, sequence_, at, [&](int r, int k, bool dropped) {
        dropped_bits |= static_cast<uint32_t>(dropped) << (r * Layout::kKeys + k);
      });
    if constexpr (!Policy::kModify) {
      if (masked) hide_invisible(scores, sequence_, at, 0, sequence_.seqlen_k);
    }
    const Softcap softcap(p_);
    const float kept = Policy::kDropout ? dropout_scale(p_.dropout_p) : 1.0f;
#pragma unroll
    for (int r = 0; r < Layout::kRows; ++r) {
      const Float2 statistics = statistics_of(r);
      const RowModifiers modifiers(p_, sequence_, at.row(r));
      int begin = 0, end = 0;
      if constexpr (Policy::kModify) {
        begin = sequence_.begin(modifiers.query());
        end = sequence_.end(modifiers.query());
      }
#pragma unroll
      for (int pair = 0; pair < Layout::kKeys; pair += 2)
#pragma unroll
        for (int k = pair; k < pair + 2; ++k) {
          float &s = Layout::at(scores, r, k), &d = Layout::at(dprobs, r, k);
          float slope = 1.0f;
          if constexpr (Policy::kModify) {
            const int key = at.key(k);
            s = softcap(s);
            slope = softcap.slope(s);
            if (modifiers.has(key)) modifiers.apply(s, key);
            if (key < begin || key >= end) s = -kInfinity;
            s = exp2_approx(s - statistics.x);
          } else {
            s = exp2_approx(fused_multiply_add(s, scale_, -statistics.x));
          }
          float kept_share = 1.0f;
          if constexpr (Policy::kDropout) kept_share = dropped_bits >> (r * Layout::kKeys + k) & 1 ? 0.0f : kept;
          const float ds = s * ((Policy::kDropout ? kept_share * d : d) - statistics.y);
          if constexpr (Policy::kDropout) s = kept_share == 0 ? 0.0f : s;
          if constexpr (Policy::kModify) report(modifiers, at.key(k), ds);
          d = ds * slope;
        }
    }
  }

  const BackwardParams& params_;
  const AttentionParams& p_;
  const Sequence& sequence_;
  const int warp_line_;
  const uint32_t own_;
  const float scale_;
  uint32_t line_lane_, column_lane_;
};

template <class T, class Traits, class Policy>
class QueryGradients : BackwardBlock<T, Traits> {
  using Base = BackwardBlock<T, Traits>;
  using Base::own_tile, Base::p_, Base::params_, Base::sequence_, Base::stage_tile, Base::warp_line_;
  using Layout = ScoreLayout<Traits, false>;

 public:
  FASTATTN_DEVICE QueryGradients(const BackwardParams& params, const Sequence& sequence, int first_row)
      : Base(params, sequence),
        first_row_(first_row),
        k_(p_.kv.k, params.k_steps, p_.kv, sequence, p_.headdim),
        v_(p_.kv.v, params.v_steps, p_.kv, sequence, p_.headdim_v) {
    clear(dq_);
  }

  FASTATTN_DEVICE void run() {
    const KeyRange range(sequence_, first_row_, Traits::kRows);
    if (range.begin < range.end) walk(range);
#pragma unroll
    for (int n = 0; n < Traits::kDim / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) dq_[0][n][e] *= static_cast<float>(p_.softmax_scale);
    store_lines<T, Traits>(own_tile(0), warp_line_, dq_, p_.headdim, [&](int line) {
      const int row = first_row_ + line;
      return row < sequence_.rows() ? row_pointer<T>(params_.call.dq, sequence_.q_row,
                                                     sequence_.q_first + sequence_.query(row), sequence_.head(row))
                                    : nullptr;
    });
  }

 private:
  FASTATTN_DEVICE void walk(const KeyRange& range) {
    constexpr int kKeys = Traits::kKeys;
    const int first = range.begin / kKeys, last = (range.end - 1) / kKeys;
    const int open_first = (range.open_begin + kKeys - 1) / kKeys, open_last = range.open_end / kKeys;
    copy_rows<Traits, Traits::kRows>(own_tile(0), p_.q, p_.headdim, sequence_, first_row_);
    copy_rows<Traits, Traits::kRows>(own_tile(1), params_.call.dout, p_.headdim_v, sequence_, first_row_);
    k_.seek(last * kKeys);
    v_.seek(last * kKeys);
    Float2 statistics[Layout::kRows];
#pragma unroll
    for (int r = 0; r < Layout::kRows; ++r)
      statistics[r] = this->statistics_of_row(Layout(first_row_ + warp_line_, 0).row(r));
    stream_tiles<Traits>(
        last - first + 1,
        [&](int stage, int i) {
          k_.template copy<true>(stage_tile(stage, 0), (last - i) * kKeys, sequence_.seqlen_k);
          v_.template copy<true>(stage_tile(stage, 1), (last - i) * kKeys, sequence_.seqlen_k);
        },
        [](int) {},
        [&](int stage, int i) {
          const int tile = last - i;
          float scores[1][Traits::kKeys / 8][4], dprobs[1][Traits::kKeys / 8][4];  // (rows, keys)
          this->multiply(scores, own_tile(0), stage_tile(stage, 0));
          this->multiply(dprobs, own_tile(1), stage_tile(stage, 1));
          const Layout at(first_row_ + warp_line_, tile * kKeys);
          this->template differentiate<Policy>(
              scores, dprobs, at, tile >= open_last || tile < open_first, [&](int r) { return statistics[r]; },
              [&](const RowModifiers& row, int key, float ds) {
                const ScoreView& dbias = params_.call.dbias;
                if (dbias.data && row.has(key))
                  store_global(static_cast<float*>(dbias.data) + sequence_.batch * dbias.stride_batch +
                                   row.head() * dbias.stride_head + row.query() * dbias.stride_q + key * dbias.stride_k,
                               ds);
              });
          this->accumulate(dq_, dprobs, stage_tile(stage, 0));
        });
  }

  const int first_row_;
  KeyCopy<Traits, false> k_, v_;
  float dq_[1][Traits::kDim / 8][4];  // (rows, headdim)
};

template <class T, class Traits, class Policy>
class KeyGradients : BackwardBlock<T, Traits> {
  using Base = BackwardBlock<T, Traits>;
  using Base::own_tile, Base::p_, Base::params_, Base::sequence_, Base::stage_tile, Base::warp_line_;
  using Layout = ScoreLayout<Traits, true>;

 public:
  FASTATTN_DEVICE KeyGradients(const BackwardParams& params, const Sequence& sequence, int first_key)
      : Base(params, sequence), first_key_(first_key) {
    if constexpr (Policy::kKeys) clear(dk_);
    if constexpr (Policy::kValues) clear(dv_);
  }

  FASTATTN_DEVICE void run() {
    const RowRange range(sequence_, first_key_, Traits::kRows);
    if (range.begin < range.end) walk(range);
    if constexpr (Policy::kKeys)
      store(own_tile(0), dk_, params_.call.dk, p_.headdim, static_cast<float>(p_.softmax_scale));
    if constexpr (Policy::kValues)
      store(own_tile(1), dv_, params_.call.dv, p_.headdim_v, Policy::kDropout ? dropout_scale(p_.dropout_p) : 1.0f);
  }

 private:
  FASTATTN_DEVICE void walk(const RowRange& range) {
    constexpr int kRows = Traits::kKeys;  // of a walked tile
    copy_keys<Traits>(own_tile(0), p_.kv.k, p_.headdim, sequence_, first_key_);
    copy_keys<Traits>(own_tile(1), p_.kv.v, p_.headdim_v, sequence_, first_key_);
    Float2 coming{};  // statistics of one row of the next tile
    const auto row_of = [&](int i) { return range.begin + i * kRows; };
    stream_tiles<Traits>(
        (range.end - range.begin + kRows - 1) / kRows,
        [&](int stage, int i) {
          copy_rows<Traits, kRows>(stage_tile(stage, 0), p_.q, p_.headdim, sequence_, row_of(i));
          copy_rows<Traits, kRows>(stage_tile(stage, 1), params_.call.dout, p_.headdim_v, sequence_, row_of(i));
          if (thread_index() < kRows) coming = this->statistics_of_row(row_of(i) + thread_index());
        },
        [&](int stage) {
          if (thread_index() < kRows)
            store_shared_pair(this->statistics(stage) + static_cast<uint32_t>(thread_index()) * 8, coming);
        },
        [&](int stage, int i) {
          const int first_row = row_of(i);
          float scores[1][Traits::kKeys / 8][4], dprobs[1][Traits::kKeys / 8][4];  // (keys, rows)
          this->multiply(scores, own_tile(0), stage_tile(stage, 0));
          this->multiply(dprobs, own_tile(1), stage_tile(stage, 1));
          const bool masked =
              first_row < range.open_begin || at_most(sequence_.rows(), first_row + kRows) > range.open_end;
          const Layout at(first_key_ + warp_line_, first_row);
          this->template differentiate<Policy>(
              scores, dprobs, at, masked,
              [&](int r) {
                return load_shared_pair(this->statistics(stage) + static_cast<uint32_t>(at.row(r) - first_row) * 8);
              },
              [](const RowModifiers&, int, float) {});
          if constexpr (Policy::kValues) this->accumulate(dv_, scores, stage_tile(stage, 1));
          if constexpr (Policy::kKeys) this->accumulate(dk_, dprobs, stage_tile(stage, 0));
        });
  }

  FASTATTN_DEVICE void store(uint32_t tile, float (&gradient)[1][Traits::kDim / 8][4], const TensorView& view,
                             int64_t dims, float scale) const {
#pragma unroll
    for (int n = 0; n < Traits::kDim / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) gradient[0][n][e] *= scale;
    store_lines<T, Traits>(tile, warp_line_, gradient, dims, [&](int line) {
      const int key = first_key_ + line;
      return key < sequence_.seqlen_k
                 ? row_pointer<T>(view, sequence_.kv_row, sequence_.kv_first + key, sequence_.head_k)
                 : nullptr;
    });
  }

  const int first_key_;
  float dk_[1][Policy::kKeys ? Traits::kDim / 8 : 1][4],
      dv_[1][Policy::kValues ? Traits::kDim / 8 : 1][4];  // (keys, dims)
};

template <class T, class Traits, class Policy>
FASTATTN_KERNEL(kThreads, Traits::kDim <= 128 ? 2 : 1)
query_gradients(FASTATTN_GRID_CONSTANT BackwardParams params) {
  const AttentionParams& p = params.call.fwd;
  const int block = params.row_blocks - 1 - block_index_x() % params.row_blocks;  // causal: the long rows first
  const int place = block_index_x() / params.row_blocks, nheads_k = static_cast<int>(p.nheads_k);
  const Sequence sequence(p, place / nheads_k, place % nheads_k);
  if (block * Traits::kRows >= sequence.rows()) return;
  QueryGradients<T, Traits, Policy>(params, sequence, block * Traits::kRows).run();
}

template <class T, class Traits, class Policy>
FASTATTN_KERNEL(kThreads, Traits::kDim <= 128 ? 2 : 1)
key_gradients(FASTATTN_GRID_CONSTANT BackwardParams params) {
  const AttentionParams& p = params.call.fwd;
  const int block = block_index_x() % params.key_blocks, place = block_index_x() / params.key_blocks;
  const int nheads_k = static_cast<int>(p.nheads_k);
  const Sequence sequence(p, place / nheads_k, place % nheads_k);
  if (block * Traits::kRows >= sequence.seqlen_k) return;
  KeyGradients<T, Traits, Policy>(params, sequence, block * Traits::kRows).run();
}

// delta = rowsum(dout * out) - dlse: what a row's probabilities have in common in their gradients. 8 lanes for one row.
template <class T>
FASTATTN_KERNEL(kThreads, 8)
row_deltas(FASTATTN_GRID_CONSTANT AttentionBackwardParams call) {
  const AttentionParams& p = call.fwd;
  constexpr int kLanes = 8;
  const int nheads = static_cast<int>(p.nheads), seqlen_q = static_cast<int>(p.seqlen_q);
  const int64_t row = static_cast<int64_t>(block_index_x()) * (kThreads / kLanes) + thread_index() / kLanes;
  const int head = static_cast<int>(row % nheads), query = static_cast<int>(row / nheads % seqlen_q);
  const int batch = static_cast<int>(row / nheads / seqlen_q);
  const int safe_batch = at_most(static_cast<int>(p.batch) - 1, batch);
  const Sequence sequence(p, safe_batch, head / (nheads / static_cast<int>(p.nheads_k)));
  const bool exists = batch == safe_batch && query < sequence.seqlen_q;
  float sum = 0;
  if (exists) {
    const T* out = row_pointer<const T>(p.out, sequence.q_row, sequence.q_first + query, head);
    const T* dout = row_pointer<const T>(call.dout, sequence.q_row, sequence.q_first + query, head);
    for (int d = thread_index() % kLanes * 8; d < static_cast<int>(p.headdim_v); d += kLanes * 8) {
      const auto a = load_global(reinterpret_cast<const Eight<T>*>(out + d));
      const auto b = load_global(reinterpret_cast<const Eight<T>*>(dout + d));
#pragma unroll
      for (int i = 0; i < 8; ++i) sum = fused_multiply_add(to_float(a.value[i]), to_float(b.value[i]), sum);
    }
  }
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2) sum += shuffle_xor(sum, step);
  if (!exists || thread_index() % kLanes != 0) return;
  const int64_t place = lse_place(p, sequence, query, head);
  if (call.dlse) sum -= load_global(static_cast<const float*>(call.dlse) + place);
  store_global(static_cast<float*>(call.delta) + place, sum);
}

}  // namespace
}  // namespace fastattn
