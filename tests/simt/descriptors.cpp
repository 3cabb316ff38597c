// The layout of wgmma's operands as the kernels have it, and as the emulator reads it: plain C, for ctypes.
#include "cuda/hopper_tiles.cuh"

extern "C" {
#define FASTATTN_TILE(rows)                                                                                         \
  uint32_t chunk_offset_##rows(int row, int chunk) { return fastattn::WidePanels::chunk_offset<rows>(row, chunk); } \
  uint64_t rows_operand_##rows(uint32_t tile, int k) { return fastattn::rows_operand<rows>(tile, k); }              \
  uint64_t columns_operand_##rows(uint32_t tile, int k) { return fastattn::columns_operand<rows>(tile, k); }
FASTATTN_TILE(64)
FASTATTN_TILE(128)

uint32_t address_of_row(uint64_t descriptor, int row, int chunk) {
  return simt::Descriptor(descriptor).of_row(row, chunk);
}
uint32_t address_of_line(uint64_t descriptor, int line, int chunk) {
  return simt::Descriptor(descriptor).of_line(line, chunk);
}
}
