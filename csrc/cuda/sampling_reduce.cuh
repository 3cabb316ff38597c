// What the threads of a sampling block find out together, in shared memory.
#pragma once

#include "cuda/ptx.h"

namespace fastattn {
namespace {

constexpr int kSampleThreads = 256, kSampleWarps = kSampleThreads / 32;
constexpr int kBuckets = 256;

// Weights by bucket, 64 bits as two words, which are added to apart: a sum of low words that wraps carries one. Each
// bucket has copies in different banks, so that equal digits, which neighbours often have, seldom meet.
struct Histogram {
  static constexpr int kCopies = 8, kWords = kBuckets * kCopies;
  static constexpr uint32_t kBytes = 2 * kWords * 4;

  FASTATTN_DEVICE static void clear() {
    for (int i = thread_index(); i < 2 * kWords; i += kSampleThreads)
      store_shared4(shared_base() + static_cast<uint32_t>(i) * 4, 0);
  }
  FASTATTN_DEVICE static void add(int bucket, uint64_t weight) {
    const uint32_t low = place(bucket, thread_index() % kCopies);
    const auto added = static_cast<uint32_t>(weight);
    const uint32_t before = add_shared4(low, added);
    const uint32_t carried = static_cast<uint32_t>(weight >> 32) + (before + added < before);
    if (carried > 0) add_shared4(low + kWords * 4, carried);
  }
  FASTATTN_DEVICE static uint64_t sum(int bucket) {
    uint64_t total = 0;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const uint32_t low = place(bucket, (i + bucket / 4) % kCopies);  // each lane another bank
      total += load_shared4(low) + (static_cast<uint64_t>(load_shared4(low + kWords * 4)) << 32);
    }
    return total;
  }

 private:
  FASTATTN_DEVICE static uint32_t place(int bucket, int copy) {
    return shared_base() + static_cast<uint32_t>(bucket * kCopies + copy) * 4;
  }
};

// Behind the histogram: what warps tell each other, in words of 8 bytes. No two uses of a step share a word.
constexpr int kMaxReduced = 4, kTotalsAt = 0, kCrossingAt = kTotalsAt + kSampleWarps, kReducedAt = kCrossingAt + 3;
constexpr int kCounterAt = kReducedAt + kSampleWarps * kMaxReduced;
constexpr int kSampleSharedBytes = Histogram::kBytes + (kCounterAt + 1) * 8;
FASTATTN_DEVICE uint32_t word_at(int i) { return shared_base() + Histogram::kBytes + static_cast<uint32_t>(i) * 8; }

// merge() of all threads' values, written to `out` by thread 0.
template <int n, class Merge>
FASTATTN_DEVICE void reduce_block(uint64_t (&mine)[n], Merge merge, uint64_t* out) {
  static_assert(n <= kMaxReduced, "room for them");
  const int warp = thread_index() / 32;
  uint64_t other[n];
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
#pragma unroll
    for (int i = 0; i < n; ++i) other[i] = shuffle_xor(mine[i], mask);
    merge(mine, other);
  }
  if (thread_index() % 32 == 0)
    for (int i = 0; i < n; ++i) store_shared8(word_at(kReducedAt + warp * n + i), mine[i]);
  block_barrier();
  if (thread_index() > 0) return;
  for (int w = 1; w < kSampleWarps; ++w) {
    for (int i = 0; i < n; ++i) other[i] = load_shared8(word_at(kReducedAt + w * n + i));
    merge(mine, other);
  }
  for (int i = 0; i < n; ++i) store_global(out + i, mine[i]);
}

// Where a running sum of the buckets' weights, from the last bucket down, reaches a target.
struct Crossing {
  uint64_t bucket, above, weight;  // above: of all later buckets, below the target
};

// `own` is the weight of the bucket with the thread's number.
FASTATTN_DEVICE Crossing find_crossing(uint64_t own, uint64_t target) {
  const int warp = thread_index() / 32, lane = thread_index() % 32;
  uint64_t total = own, above = 0;
#pragma unroll
  for (int mask = 1; mask < 32; mask *= 2) {  // halves of twice the size: the upper one is above the lower
    const uint64_t other = shuffle_xor(total, mask);
    if (!(lane & mask)) above += other;
    total += other;
  }
  if (lane == 0) store_shared8(word_at(kTotalsAt + warp), total);
  block_barrier();
  for (int w = warp + 1; w < kSampleWarps; ++w) above += load_shared8(word_at(kTotalsAt + w));
  if (above < target && target <= above + own) {  // of one thread
    store_shared8(word_at(kCrossingAt), static_cast<uint64_t>(thread_index()));
    store_shared8(word_at(kCrossingAt + 1), above);
    store_shared8(word_at(kCrossingAt + 2), own);
  }
  block_barrier();
  return {load_shared8(word_at(kCrossingAt)), load_shared8(word_at(kCrossingAt + 1)),
          load_shared8(word_at(kCrossingAt + 2))};
}

}  // namespace
}  // namespace fastattn
