// Packing chosen lanes to the front and comparing bytes, for the instruction sets that have no instruction for it.
#pragma once

#include <cstdint>

namespace fastattn {
namespace {

inline int compress_lanes(uint32_t chosen, const float* lanes, int32_t first_id, float* values, int32_t* ids) {
  int n = 0;
  for (; chosen; chosen &= chosen - 1, ++n) {
    const int lane = __builtin_ctz(chosen);
    values[n] = lanes[lane];
    ids[n] = first_id + lane;
  }
  return n;
}

// Bit i: byte i of the 16 is >= least.
template <class U64>
inline uint64_t portable_bytes_reaching(U64 x, uint8_t least) {
  typedef uint8_t Bytes __attribute__((vector_size(16)));
  static_assert(sizeof(U64) == sizeof(Bytes), "16 bytes");
  const U64 reached = reinterpret_cast<U64>(reinterpret_cast<Bytes>(x) >= least);
  // Byte k of a half keeps its bit k; the product adds them up in the top byte.
  const U64 bits = ((reached & 0x8040201008040201u) * 0x0101010101010101u) >> 56;
  return bits[0] | bits[1] << 8;
}

}  // namespace
}  // namespace fastattn
