// The shapes of tiles and how they lie in shared memory.
#pragma once

#include "cuda/ptx.h"

namespace fastattn {
namespace {

constexpr float kInfinity = __builtin_huge_valf();
constexpr float kLowestFloat = -3.402823466e38f;
constexpr double kLog2e = 1.4426950408889634;
constexpr float kLn2 = 0.6931471805599453f;

struct alignas(16) Float4 {
  float value[4];
};
template <class T>
struct alignas(16) Eight {
  T value[8];
};

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kPanelBytes = 64;  // a row of a panel: 4 chunks of 16 bytes

// A tile lies as panels of 32 columns, 64 bytes a row, two rows to the 128 bytes that are all banks. The chunks of a
// row are permuted by its pair's number, and odd panels swap the rows of a pair, so that the 8 rows of an 8x8 matrix,
// and the 8 neighbouring chunks of a row, both fall into different banks.
template <int kTileRows>
FASTATTN_DEVICE uint32_t chunk_offset(int row, int chunk) {
  const int panel = chunk / 4;
  return static_cast<uint32_t>(panel * kTileRows * kPanelBytes + (row ^ (panel & 1)) * kPanelBytes +
                               ((chunk % 4) ^ (row / 2 % 4)) * 16);
}

// The same for the lane that brings row `row`, chunk `chunk` (0 or 1) of the first columns. The 16 columns from 16 n on
// are at panel_offset(n) + (lane's address ^ panel_turn(n)), which costs one instruction for every fourth n.
FASTATTN_DEVICE uint32_t lane_offset(int row, int chunk) {
  return static_cast<uint32_t>(row * kPanelBytes + (chunk ^ (row / 2 % 4)) * 16);
}
FASTATTN_DEVICE constexpr uint32_t panel_turn(int n) { return static_cast<uint32_t>(n % 4) * 32; }
template <int kTileRows>
FASTATTN_DEVICE constexpr uint32_t panel_offset(int n) {
  return static_cast<uint32_t>(n / 2 * kTileRows * kPanelBytes);
}

// How tiles lie that ldmatrix reads.
struct NarrowPanels {
  static constexpr int kBytes = kPanelBytes;  // of a row
  template <int kTileRows>
  FASTATTN_DEVICE static uint32_t chunk_offset(int row, int chunk) {
    return fastattn::chunk_offset<kTileRows>(row, chunk);
  }
};

// kDim: the headdim, padded; kRowTiles: 16-row tiles of each warp; kElementBytes: of q, k and v.
template <int kDim_, int kRowTiles_, int kElementBytes_ = 2>
struct Traits {
  using Panels = NarrowPanels;
  static constexpr int kDim = kDim_, kRowTiles = kRowTiles_, kElementBytes = kElementBytes_;
  static constexpr int kWarpRows = 16 * kRowTiles, kRows = kWarps * kWarpRows;
  static constexpr int kRowBytes = kDim * kElementBytes;
  // So many that, with kRows queries, they fit the shared memory of every GPU.
  static constexpr int kKeys = kRowBytes <= 128 ? 64 : kRowBytes <= 512 ? 32 : kRowBytes <= 768 ? 16 : 8;
  static constexpr int kStages = 2;
  static constexpr int kChunkElements = 16 / kElementBytes;
  static constexpr int kChunks = kDim / kChunkElements;         // of 16 bytes in a row
  static constexpr int kWarpDim = kDim, kWarpChunks = kChunks;  // of a warp
  static constexpr int kChunksAtOnce = 4;                       // of a row of floats: all of a panel's
  // Threads that copy one row: of few keys so many that all threads together copy no more than a tile.
  static constexpr int kRowLanes = kKeys < 16 ? 16 : kChunks % 8 == 0 ? 8 : 4;
  static constexpr int kCopyRows = kThreads / kRowLanes;    // rows that all threads copy at once
  static constexpr int kCopyColumns = kChunks / kRowLanes;  // copies of a thread in one row
  static_assert(kKeys % kCopyRows == 0 && kChunks % kRowLanes == 0);
  static constexpr uint32_t kQueryBytes = kRows * kDim * kElementBytes, kTileBytes = kKeys * kDim * kElementBytes;
  static constexpr int kSharedBytes = static_cast<int>(kQueryBytes + kStages * 2 * kTileBytes);
  static constexpr bool kQueryInRegisters =
      kElementBytes == 2 && kDim * kRowTiles <= 64;  // else its fragments are read again for every tile
};

// Of the gradients' kernels: a block has two tiles of kRows lines of its own.
template <int kDim, int kElementBytes>
struct BackwardTraits : Traits<kDim, 1, kElementBytes> {
  using Base = Traits<kDim, 1, kElementBytes>;
  // Warps that share lines, each with its part of their headdim: two tiles of 64 wide lines fit no shared memory, and
  // half as many lines shall still occupy four warps.
  static constexpr int kParts = Base::kRowBytes > 512 ? 2 : 1, kRows = Base::kRows / kParts;
  static constexpr int kWarpDim = kDim / kParts, kWarpChunks = Base::kChunks / kParts;
  static constexpr int kChunksAtOnce = kWarpDim < 128 ? 4 : 2;  // beside two gradients there are no registers for more
  static constexpr bool kSplitsGradients = kWarpDim > 128;      // both of a key exceed the registers of a warp
  // Lines of the tiles that a block walks; of floats so few that four warps have registers for them.
  static constexpr int kKeys = kElementBytes == 4 ? (kDim <= 64    ? 32
                                                     : kDim <= 192 ? 16
                                                                   : 8)
                               : kDim <= 64       ? 64
                               : kDim <= 128      ? 32
                                                  : 16;
  static constexpr uint32_t kOwnBytes = kRows * Base::kRowBytes, kTileBytes = kKeys * Base::kRowBytes;
  // Lse and delta of every row; behind them a tile begins, at a multiple of all banks.
  static constexpr uint32_t kStatisticsBytes = kKeys < 16 ? 128 : kKeys * 8;
  static constexpr uint32_t kSumBytes = 512;  // a warp's sums over its part of the headdim, 8 columns at a time
  static constexpr int kSharedBytes = static_cast<int>(
      2 * kOwnBytes + Base::kStages * (2 * kTileBytes + kStatisticsBytes) + (kParts > 1 ? kWarps * kSumBytes : 0));
  static_assert(kKeys % Base::kCopyRows == 0);
  static_assert(Base::kStages == 2);  // KeyGradients holds the statistics of one tile on the way
};

}  // namespace
}  // namespace fastattn
