// Per-thread working memory that outlives a call, so that a decode step does not pay for page faults.
#pragma once

#include <cstddef>

namespace fastattn {

// What a thread may need at the same time; each slot is its own buffer.
enum class ScratchSlot : int { kTile = 0, kShared = 1, kCount };

// At least `bytes` bytes of this thread's slot, 64-byte aligned; the content is what the last user left.
// Throws std::bad_alloc where memory is exhausted: take it before a parallel region, or expect to terminate.
void* thread_scratch(ScratchSlot slot, size_t bytes);

}  // namespace fastattn
