// What rows have read and written, as fastattn.TokenCounts keeps it: distinct tokens, ascending, and their counts.
#pragma once

#include <cstdint>
#include <cstring>

namespace fastattn {

struct TokenCountsParams {
  int32_t* ids;           // (batch, capacity) contiguous; more than the largest token behind a row's last
  int32_t* counts;        // (batch, capacity)
  int32_t* lengths;       // (batch,), each below the capacity
  const int64_t* tokens;  // (batch,) contiguous: one more for each row; negative = none
  int64_t batch, capacity;
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
      ++p.lengths[row];
    }
    ++counts[low];
  }
}

}  // namespace fastattn
