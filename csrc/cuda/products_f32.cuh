// The two products of attention on floats, by FMAs on the lanes of a warp: in the tensor core's layout of results, so
// that all between and around them is the 16-bit kernel's. A lane's addresses are its own in the tile's first panel;
// all others are an exclusive or of constants and a constant away, as lane_offset says.
#pragma once

#include "cuda/products.cuh"
#include "cuda/score_modifiers.cuh"

namespace fastattn {
namespace {

constexpr int kPanelChunks = kPanelBytes / 16;

// S = Q K^T over the headdim of a warp: each lane's rows by each lane's keys, four dimensions at a time.
template <class Traits>
FASTATTN_DEVICE void multiply_keys_f32(ScoreTile<Traits>& scores, uint32_t queries, int warp_row, uint32_t keys) {
  const int lane = thread_index() % 32;
  uint32_t q_lane = queries + static_cast<uint32_t>(warp_row * kPanelBytes) + lane_offset(lane / 4, 0);
  uint32_t k_lane = keys + lane_offset(lane % 4 * 2, 0);
  clear(scores);
#pragma unroll 1
  for (int panel = 0; panel < Traits::kWarpChunks / kPanelChunks; ++panel) {
#pragma unroll Traits::kChunksAtOnce
    for (int chunk = 0; chunk < kPanelChunks; ++chunk) {
      const uint32_t turn = static_cast<uint32_t>(chunk * 16);
      uint32_t q[Traits::kRowTiles][2][4];  // (rows, 4 dims)
#pragma unroll
      for (int m = 0; m < Traits::kRowTiles; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          load_shared16(q[m][half], (q_lane ^ turn) + static_cast<uint32_t>((16 * m + 8 * half) * kPanelBytes));
#pragma unroll
      for (int n = 0; n < Traits::kKeys / 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          uint32_t k[4];  // (4 dims)
          load_shared16(k, (k_lane ^ (turn + static_cast<uint32_t>(e * kPanelBytes))) +
                               static_cast<uint32_t>(8 * n * kPanelBytes));
#pragma unroll
          for (int m = 0; m < Traits::kRowTiles; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
              for (int d = 0; d < 4; ++d) {
                float& s = scores[m][n][2 * half + e];
                s = fused_multiply_add(float_of_bits(q[m][half][d]), float_of_bits(k[d]), s);
              }
        }
    }
    // The next panel, where neighbouring rows have changed places.
    q_lane = (q_lane ^ kPanelBytes) + static_cast<uint32_t>(Traits::kRows * kPanelBytes);
    k_lane = (k_lane ^ kPanelBytes) + static_cast<uint32_t>(Traits::kKeys * kPanelBytes);
  }
}

// O += P V: key after key, whose probabilities come from the lane of each row's four that has them.
template <class Traits>
FASTATTN_DEVICE void multiply_values_f32(float (&out)[Traits::kRowTiles][Traits::kWarpDim / 8][4],
                                         const ScoreTile<Traits>& probs, uint32_t values) {
  const int lane = thread_index() % 32;
#pragma unroll
  for (int n = 0; n < Traits::kKeys / 8; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e)
#pragma unroll 1
      for (int owner = 0; owner < 4; ++owner) {
        float p[Traits::kRowTiles][2];  // (rows)
#pragma unroll
        for (int m = 0; m < Traits::kRowTiles; ++m)
#pragma unroll
          for (int half = 0; half < 2; ++half)
            p[m][half] = shuffle_from(probs[m][n][2 * half + e], lane / 4 * 4 + owner);
        // Of key 2 owner; those of 8 n + e more follow.
        const uint32_t v_lane = values + lane_offset(2 * owner, lane % 4 / 2) + static_cast<uint32_t>(lane % 2 * 8);
#pragma unroll
        for (int d = 0; d < Traits::kWarpDim / 8; ++d) {
          const int panel = d / 2;
          const uint64_t pair =
              load_shared8((v_lane ^ static_cast<uint32_t>(d % 2 * 32)) +
                           static_cast<uint32_t>((panel * Traits::kKeys + 8 * n + (e ^ panel % 2)) * kPanelBytes));
          const float v[2] = {float_of_bits(static_cast<uint32_t>(pair)),
                              float_of_bits(static_cast<uint32_t>(pair >> 32))};
#pragma unroll
          for (int m = 0; m < Traits::kRowTiles; ++m)
#pragma unroll
            for (int i = 0; i < 4; ++i) out[m][d][i] = fused_multiply_add(p[m][i / 2], v[i % 2], out[m][d][i]);
        }
      }
}

}  // namespace
}  // namespace fastattn
