// Threads: one dynamic loop over independent work items on the OpenMP pool that torch already owns.
// Results never depend on which thread ran an item.
#pragma once

#include <cstdint>

namespace fastattn {
namespace {

// A thread takes `grain` neighbouring items at a time.
template <class Fn>
void parallel_for(int64_t items, int nthreads, Fn&& fn, int64_t grain = 1) {
  if (nthreads <= 1 || items <= 1) {
    for (int64_t item = 0; item < items; ++item) fn(item);
    return;
  }
#pragma omp parallel for schedule(dynamic, grain) num_threads(nthreads)
  for (int64_t item = 0; item < items; ++item) fn(item);
}

}  // namespace
}  // namespace fastattn
