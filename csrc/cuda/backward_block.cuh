// What the kernels of both gradients share: the ring of walked tiles, their products, and what becomes of scores.
#pragma once

#include "cuda/products_f32.cuh"

namespace fastattn {
namespace {

struct BackwardParams {
  AttentionBackwardParams call;
  Softcap softcap;  // here it costs no registers, which the gradients fill
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

// Which of the walked tiles, in their order, need no mask: all between.
struct OpenTiles {
  int first, last;
};

// Whether a tile is masked, for the compiler to know.
template <bool masked>
struct Masked {
  static constexpr bool value = masked;
};

// Tiles 0 to count - 1 through a ring of stages: send(stage, i) begins the copies of tile i, land(stage) runs before
// the barrier that makes them everybody's, step(Masked, stage, i) works. Tiles that need no mask have a
// loop without; where `kMasks` is false there is no other.
template <class Traits, bool kMasks, class Send, class Land, class Step>
FASTATTN_DEVICE void stream_tiles(int count, OpenTiles open, Send send, Land land, Step step) {
#pragma unroll
  for (int stage = 0; stage < Traits::kStages - 1; ++stage) {
    if (stage < count) send(stage, stage);
    cp_async_commit();
  }
  int i = 0;
  const auto walk_until = [&](int end, auto masked) {
    for (; i < count && i < end; ++i) {
      land(i % Traits::kStages);
      cp_async_wait<Traits::kStages - 2>();
      block_barrier();
      const int next = i + Traits::kStages - 1;
      if (next < count) send(next % Traits::kStages, next);
      cp_async_commit();
      step(masked, i % Traits::kStages, i);
    }
  };
  if constexpr (kMasks) {
    walk_until(open.first, Masked<true>{});
    walk_until(open.last, Masked<false>{});
    walk_until(count, Masked<true>{});
  } else {
    walk_until(count, Masked<false>{});
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
        warp_line_(thread_index() / 32 / Traits::kParts * Traits::kWarpRows) {
    const int lane = thread_index() % 32;
    line_lane_ = lane_offset(lane % 16, lane / 16);
    column_lane_ = lane_offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  }

  // The block's own two tiles (q and dout, or k and v), then the ring of stages with two tiles and statistics each.
  FASTATTN_DEVICE uint32_t own_tile(int i) const {
    return shared_base() + static_cast<uint32_t>(i) * Traits::kOwnBytes;
  }
  FASTATTN_DEVICE uint32_t stage_tile(int stage, int i) const {
    return own_tile(2) + static_cast<uint32_t>(stage) * (2 * Traits::kTileBytes + Traits::kStatisticsBytes) +
           static_cast<uint32_t>(i) * Traits::kTileBytes;
  }
  FASTATTN_DEVICE uint32_t statistics(int stage) const { return stage_tile(stage, 2); }

  // scores (lines, columns) = this warp's lines of an own tile times a walked tile, transposed
  FASTATTN_DEVICE void multiply(ScoreTile<Traits>& scores, uint32_t own, uint32_t tile) const {
    if constexpr (sizeof(T) == 4) {
      multiply_keys_f32<Traits>(scores, own + part_offset<Traits::kRows>(), warp_line_,
                                tile + part_offset<Traits::kKeys>());
      if constexpr (Traits::kParts > 1) add_other_part(scores);
    } else {
      multiply_on_tensor_cores(scores, own, tile);
    }
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

  // A warp's part of the headdim of its lines, and where it begins in a tile of kTileRows lines.
  FASTATTN_DEVICE static int part() { return thread_index() / 32 % Traits::kParts; }
  template <int kTileRows>
  FASTATTN_DEVICE static uint32_t part_offset() {
    return static_cast<uint32_t>(part() * (Traits::kWarpDim * Traits::kElementBytes) * kTileRows);
  }

  // Two warps have each summed over its part of the headdim: both get the sum of both, the same to the bit.
  FASTATTN_DEVICE void add_other_part(ScoreTile<Traits>& sums) const {
    static_assert(Traits::kParts == 2);
    const int warp = thread_index() / 32;
    const auto place = [&](int of, int half) {
      return stage_tile(Traits::kStages, 0) + static_cast<uint32_t>(of) * Traits::kSumBytes +
             static_cast<uint32_t>(half * 256 + thread_index() % 32 * 8);
    };
#pragma unroll
    for (int n = 0; n < Traits::kKeys / 8; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half)
        store_shared_pair(place(warp, half), {sums[0][n][2 * half], sums[0][n][2 * half + 1]});
      named_barrier(1 + warp / 2, 64);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Float2 other = load_shared_pair(place(warp ^ 1, half));
        sums[0][n][2 * half] += other.x;
        sums[0][n][2 * half + 1] += other.y;
      }
      named_barrier(1 + warp / 2, 64);  // both have read: the next sums take their place
    }
  }

  // What a warp has of its lines' gradients.
  using Gradient = float[1][Traits::kWarpDim / 8][4];  // (lines, dims)

  // gradient += weights (lines, columns) times a walked tile
  FASTATTN_DEVICE void accumulate(Gradient& gradient, const ScoreTile<Traits>& weights, uint32_t tile) const {
    if constexpr (sizeof(T) == 4)
      multiply_values_f32<Traits>(gradient, weights, tile + part_offset<Traits::kKeys>());
    else
      add_product<T, Traits>(gradient, weights, tile, line_lane_);
  }

  // Scaled to memory, through an own tile that nobody reads any more. `line_of`: as of store_lines.
  template <class LineOf>
  FASTATTN_DEVICE void store(uint32_t tile, Gradient& gradient, float scale, int64_t dims, LineOf line_of) const {
#pragma unroll
    for (int n = 0; n < Traits::kWarpDim / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) gradient[0][n][e] *= scale;
    const int first = part() * Traits::kWarpDim;
    store_lines<T, Traits>(tile, warp_line_, gradient, dims - first, [&](int line) {
      T* whole = line_of(line);
      return whole ? whole + first : nullptr;
    });
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
  // scaled scores before the softcap. `statistics_of(r)`: of the layout's row r. `kMasked`: some may be hidden.
  template <class Policy, bool kMasked, class Layout, class StatisticsOf, class Report>
  FASTATTN_DEVICE void differentiate(ScoreTile<Traits>& scores, ScoreTile<Traits>& dprobs, Layout at,
                                     StatisticsOf statistics_of, Report report) const {
    static_assert(Layout::kRows * Layout::kKeys <= 32);
    uint32_t dropped_bits = 0;
    if constexpr (Policy::kDropout)
      draw_dropout(p_, sequence_, at, [&](int r, int k, bool dropped) {
        dropped_bits |= static_cast<uint32_t>(dropped) << (r * Layout::kKeys + k);
      });
    if constexpr (kMasked) hide_invisible(scores, sequence_, at, 0, sequence_.seqlen_k);
    const Softcap& softcap = params_.softcap;
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
            s = exp2_approx(fused_multiply_add(s, softcap.scale(), -statistics.x));
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
  uint32_t line_lane_, column_lane_;
};

}  // namespace
}  // namespace fastattn
