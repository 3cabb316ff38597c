// Products of tiles on the tensor cores, and the way of their results to global memory.
#pragma once

#include "cuda/tile_copy.cuh"

namespace fastattn {
namespace {

template <int kTiles, int kColumns>
FASTATTN_DEVICE void clear(float (&tile)[kTiles][kColumns][4]) {
#pragma unroll
  for (int m = 0; m < kTiles; ++m)
#pragma unroll
    for (int n = 0; n < kColumns; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) tile[m][n][e] = 0;
}

// out (lines, kDim) += probs (lines, kKeys) times the tile (kKeys, kDim): the tensor core's result layout is its
// operand layout. `lane`: lane_offset of row lane % 16, chunk lane / 16.
template <class T, class Traits>
FASTATTN_DEVICE void add_product(float (&out)[Traits::kRowTiles][Traits::kDim / 8][4],
                                 const float (&probs)[Traits::kRowTiles][Traits::kKeys / 8][4], uint32_t tile,
                                 uint32_t lane) {
#pragma unroll
  for (int k = 0; k < Traits::kKeys / 16; ++k) {
    uint32_t a[Traits::kRowTiles][4];  // (16 lines, 16 keys)
#pragma unroll
    for (int m = 0; m < Traits::kRowTiles; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        a[m][i] = pack2<T>(probs[m][2 * k + i / 2][i % 2 * 2], probs[m][2 * k + i / 2][i % 2 * 2 + 1]);
#pragma unroll
    for (int n = 0; n < Traits::kDim / 16; ++n) {
      uint32_t b[4];  // (16 keys, 16 dims)
      ldmatrix_x4_trans(b, ((tile + lane) ^ panel_turn(n)) + panel_offset<Traits::kKeys>(n) +
                               static_cast<uint32_t>(k * 16 * kPanelBytes));
#pragma unroll
      for (int m = 0; m < Traits::kRowTiles; ++m) {
        mma_16816<T>(out[m][2 * n], a[m], b[0], b[1]);
        mma_16816<T>(out[m][2 * n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// A warp's lines as floats, from registers: four lanes fill the 32 bytes that memory moves at once.
// `line_of(line of the tile)`: where they go, null for nowhere.
template <class Traits, class LineOf>
FASTATTN_DEVICE void store_float_lines(int warp_line, const float (&lines)[Traits::kRowTiles][Traits::kWarpDim / 8][4],
                                       int64_t dims, LineOf line_of) {
  const int lane = thread_index() % 32;
#pragma unroll
  for (int m = 0; m < Traits::kRowTiles; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Float2* line = reinterpret_cast<Float2*>(line_of(warp_line + 16 * m + 8 * half + lane / 4));
      if (!line) continue;
#pragma unroll
      for (int n = 0; n < Traits::kWarpDim / 8; ++n)
        if (8 * n < dims)
          store_global(line + 4 * n + lane % 4, Float2{lines[m][n][2 * half], lines[m][n][2 * half + 1]});
    }
}

// The same as 16-bit elements, through the warp's part of a tile (Traits::kRows lines) that nobody reads any more, so
// that a thread writes 16 bytes at once.
template <class T, class Traits, class LineOf>
FASTATTN_DEVICE void store_packed_lines(uint32_t tile, int warp_line,
                                        const float (&lines)[Traits::kRowTiles][Traits::kDim / 8][4], int64_t dims,
                                        LineOf line_of) {
  const int lane = thread_index() % 32;
  warp_barrier();
#pragma unroll
  for (int m = 0; m < Traits::kRowTiles; ++m)
#pragma unroll
    for (int n = 0; n < Traits::kDim / 8; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        store_shared4(tile + chunk_offset<Traits::kRows>(warp_line + 16 * m + 8 * half + lane / 4, n) +
                          static_cast<uint32_t>(lane % 4 * 4),
                      pack2<T>(lines[m][n][2 * half], lines[m][n][2 * half + 1]));
  warp_barrier();
  constexpr int kLinesAtOnce = 32 / Traits::kRowLanes;
#pragma unroll
  for (int r = 0; r < Traits::kWarpRows; r += kLinesAtOnce) {
    const int in_tile = warp_line + r + lane / Traits::kRowLanes;
    T* line = line_of(in_tile);
#pragma unroll
    for (int c = 0; c < Traits::kChunks; c += Traits::kRowLanes) {
      const int chunk = c + lane % Traits::kRowLanes;
      uint32_t bytes[4];
      load_shared16(bytes, tile + chunk_offset<Traits::kRows>(in_tile, chunk));
      if (line && chunk < dims / 8) store_global16(line + chunk * 8, bytes);
    }
  }
}

// The same as elements of either size.
template <class T, class Traits, class LineOf>
FASTATTN_DEVICE void store_lines(uint32_t tile, int warp_line,
                                 const float (&lines)[Traits::kRowTiles][Traits::kWarpDim / 8][4], int64_t dims,
                                 LineOf line_of) {
  if constexpr (sizeof(T) == 4)
    store_float_lines<Traits>(warp_line, lines, dims, line_of);
  else
    store_packed_lines<T, Traits>(tile, warp_line, lines, dims, line_of);
}

}  // namespace
}  // namespace fastattn
