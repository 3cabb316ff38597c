// Tiles as wgmma reads them, and what a block of the Hopper kernel keeps in shared memory.
#pragma once

#include "cuda/traits.cuh"

namespace fastattn {
namespace {

// A tile lies as panels of 64 columns: 128 bytes a row, whose 8 chunks of 16 bytes are permuted by the row's number.
// That is the 128-byte swizzle of wgmma, if the tile begins at a multiple of 1024.
struct WidePanels {
  static constexpr int kBytes = 128;  // of a row
  template <int kTileRows>
  FASTATTN_DEVICE static uint32_t chunk_offset(int row, int chunk) {
    return static_cast<uint32_t>(chunk / 8 * kTileRows * kBytes + row * kBytes + ((chunk % 8) ^ (row % 8)) * 16);
  }
};

// The matrix descriptor of wgmma (PTX ISA, "Matrix descriptor format"): address and strides in units of 16 bytes in
// bits 0 to 13, 16 to 29 and 32 to 45, and the swizzle in bits 62 and 63. Eight rows are a unit of the swizzle,
// `stride` apart; `leading` is from panel to panel where the panel's columns are the product's.
FASTATTN_DEVICE uint64_t matrix_descriptor(uint32_t address, uint32_t leading, uint32_t stride) {
  constexpr uint64_t kSwizzle128 = 1;
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | static_cast<uint64_t>(leading >> 4) << 16 |
         static_cast<uint64_t>(stride >> 4) << 32 | kSwizzle128 << 62;
}

constexpr uint32_t kEightRows = 8 * WidePanels::kBytes;

// Operands of one tile differ by a number added to its descriptor: no shared address carries out of the 14 bits.

// Dimensions 16 k to 16 k + 15 of all rows of a tile: an operand whose rows are the product's.
template <int kTileRows>
FASTATTN_DEVICE uint64_t rows_operand(uint32_t tile, int k) {
  const uint32_t panel = static_cast<uint32_t>(k / 4 * kTileRows * WidePanels::kBytes);
  return matrix_descriptor(tile, 16, kEightRows) + (panel + static_cast<uint32_t>(k % 4 * 32)) / 16;
}

// Rows 16 k to 16 k + 15 of a tile with all their columns: an operand that the product sums over by rows.
template <int kTileRows>
FASTATTN_DEVICE uint64_t columns_operand(uint32_t tile, int k) {
  return matrix_descriptor(tile, static_cast<uint32_t>(kTileRows * WidePanels::kBytes), kEightRows) +
         static_cast<uint32_t>(k) * 2 * kEightRows / 16;
}

// kDim: the headdim, padded. One warpgroup copies, the others each own kGroupRows rows.
template <int kDim_>
struct HopperTraits {
  using Panels = WidePanels;
  static constexpr int kDim = kDim_, kRowTiles = 1, kElementBytes = 2;
  static constexpr int kGroups = 2, kGroupRows = 64, kRows = kGroups * kGroupRows, kKeys = 128, kStages = 2;
  static constexpr int kBlockThreads = kThreads * (1 + kGroups);
  // Of a thread that copies and of one that multiplies, in eights: together what the block was launched with, 168 each.
  // Pages are looked up by the threads that copy. So chosen, nothing spills.
  template <bool paged>
  static constexpr int kCopyRegisters = paged        ? 56
                                        : kDim <= 64 ? 24
                                                     : 40;
  template <bool paged>
  static constexpr int kProductRegisters = (3 * 168 - kCopyRegisters<paged>) / kGroups / 8 * 8;

  static constexpr int kChunkElements = 8, kChunks = kDim / kChunkElements;
  static constexpr int kRowLanes = 8, kCopyRows = kThreads / kRowLanes, kCopyColumns = kChunks / kRowLanes;

  // Where a group's q lay, its out goes: rows padded so that 8 of them begin in 8 different banks of 16 bytes.
  static constexpr uint32_t kOutPitch = kDim * kElementBytes + 16, kGroupBytes = kGroupRows * kOutPitch;
  static constexpr uint32_t kTileBytes = kKeys * kDim * kElementBytes;
  static constexpr uint32_t kSwizzleBytes = 1024;  // tiles begin at multiples; shared memory itself at those of 128
  static_assert(kGroupBytes % kSwizzleBytes == 0 && kTileBytes % kSwizzleBytes == 0);
  static constexpr int kBarriers = 1 + 4 * kStages;
  static constexpr int kSharedBytes =
      static_cast<int>(kSwizzleBytes + kGroups * kGroupBytes + kStages * 2 * kTileBytes + kBarriers * 8);
};

// Shared addresses: q by group, the ring of stages, and the barriers of both.
template <class Traits>
class HopperShared {
 public:
  FASTATTN_DEVICE HopperShared()
      : base_((shared_base() + Traits::kSwizzleBytes - 1) / Traits::kSwizzleBytes * Traits::kSwizzleBytes) {}

  FASTATTN_DEVICE uint32_t queries(int group) const {
    return base_ + static_cast<uint32_t>(group) * Traits::kGroupBytes;
  }
  FASTATTN_DEVICE uint32_t keys(int stage) const {
    return queries(Traits::kGroups) + static_cast<uint32_t>(stage) * 2 * Traits::kTileBytes;
  }
  FASTATTN_DEVICE uint32_t values(int stage) const { return keys(stage) + Traits::kTileBytes; }

  // Full: a tile has landed. Empty: all warps that multiply are done with it.
  FASTATTN_DEVICE uint32_t queries_full() const { return keys(Traits::kStages); }
  FASTATTN_DEVICE uint32_t keys_full(int stage) const { return barrier(0, stage); }
  FASTATTN_DEVICE uint32_t values_full(int stage) const { return barrier(1, stage); }
  FASTATTN_DEVICE uint32_t keys_empty(int stage) const { return barrier(2, stage); }
  FASTATTN_DEVICE uint32_t values_empty(int stage) const { return barrier(3, stage); }

  // By all threads of the block.
  FASTATTN_DEVICE void init_barriers() const {
    if (thread_index() == 0) {
      mbarrier_init(queries_full(), kThreads);
      for (int stage = 0; stage < Traits::kStages; ++stage) {
        mbarrier_init(keys_full(stage), kThreads);
        mbarrier_init(values_full(stage), kThreads);
        mbarrier_init(keys_empty(stage), Traits::kGroups * kWarps);
        mbarrier_init(values_empty(stage), Traits::kGroups * kWarps);
      }
    }
    block_barrier();
  }

 private:
  FASTATTN_DEVICE uint32_t barrier(int kind, int stage) const {
    return queries_full() + 8 + static_cast<uint32_t>(kind * Traits::kStages + stage) * 8;
  }
  const uint32_t base_;
};

// A stage of the ring, and the parity of its barriers' phase.
template <class Traits>
struct RingPlace {
  int stage = 0, parity = 0;

  FASTATTN_DEVICE void advance() {
    if (++stage == Traits::kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

}  // namespace
}  // namespace fastattn
