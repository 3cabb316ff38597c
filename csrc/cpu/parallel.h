// Threads: one dynamic loop over independent work items on the OpenMP pool that torch already owns.
// Results never depend on which thread ran an item.
#pragma once

#include <cstdint>

namespace fastattn {
namespace {

template <class Fn>
void parallel_for(int64_t items, int nthreads, Fn&& fn) {
  if (nthreads <= 1 || items <= 1) {
    for (int64_t item = 0; item < items; ++item) fn(item);
    return;
  }
#pragma omp parallel for schedule(dynamic, 1) num_threads(nthreads)
  for (int64_t item = 0; item < items; ++item) fn(item);
}

}  // namespace
}  // namespace fastattn
