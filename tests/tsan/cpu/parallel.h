// csrc/cpu/parallel.h for ThreadSanitizer, found before it: threads that TSan can follow. GCC's OpenMP runtime is not
// instrumented, so under it TSan reports races that do not exist and misses some that do.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace fastattn {
namespace {

template <class Fn>
void parallel_for(int64_t items, int nthreads, Fn&& fn, int64_t grain = 1) {
  if (nthreads <= 1 || items <= 1) {
    for (int64_t item = 0; item < items; ++item) fn(item);
    return;
  }
  std::atomic<int64_t> next{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < nthreads; ++t)
    threads.emplace_back([&] {
      // Relaxed, so that drawing an item orders nothing: whatever order items need, they must make themselves.
      for (int64_t first; (first = next.fetch_add(grain, std::memory_order_relaxed)) < items;)
        for (int64_t item = first; item < items && item < first + grain; ++item) fn(item);
    });
  for (std::thread& thread : threads) thread.join();
}

}  // namespace
}  // namespace fastattn
