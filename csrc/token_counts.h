// What rows have read and written, as fastattn.TokenCounts keeps it: distinct tokens, ascending, their counts, and a
// bit for every token of the vocabulary that is none of them.
#pragma once

#include <cstdint>
#include <cstring>

namespace fastattn {

struct TokenCountsParams {
  int32_t* ids;           // (batch, capacity) contiguous; more than the largest token behind a row's last
  int32_t* counts;        // (batch, capacity)
  int32_t* lengths;       // (batch,), each below the capacity
  uint8_t* unseen;        // (batch, unseen_bytes): bit id % 8 of byte id / 8
  const int64_t* tokens;  // (batch,) contiguous: one more for each row; negative = none
  int64_t batch, capacity, unseen_bytes;
};

inline void count_tokens(const TokenCountsParams& p) {
  for (int64_t row = 0; row < p.batch; ++row) {
    const int64_t token = p.tokens[row];
    if (token < 0) continue;
    int32_t *ids = p.ids + row * p.capacity, *counts = p.counts + row * p.capacity;
    int64_t low = 0, high = p.lengths[row];  // the token's place is in [low, high]
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (ids[middle] < token)
        low = middle + 1;
      else
        high = middle;
    }
    const int64_t behind = p.lengths[row] - low;
    if (behind == 0 || ids[low] != token) {
      memmove(ids + low + 1, ids + low, static_cast<size_t>(behind) * sizeof *ids);
      memmove(counts + low + 1, counts + low, static_cast<size_t>(behind) * sizeof *counts);
      ids[low] = static_cast<int32_t>(token);
      counts[low] = 0;
      uint8_t& byte = p.unseen[row * p.unseen_bytes + token / 8];
      byte = static_cast<uint8_t>(byte & ~(1u << token % 8));
      ++p.lengths[row];
    }
    ++counts[low];
  }
}

}  // namespace fastattn
