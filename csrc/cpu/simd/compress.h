// Packing chosen lanes to the front, for the instruction sets that have no instruction for it.
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

}  // namespace
}  // namespace fastattn
