// What one ISA exports: its name and its functions. Plain pointers, so that no ISA's code can leak into another's.
#pragma once

#include "params.h"

namespace fastattn {

struct KernelTable {
  const char* name;
  void (*attention_forward)(const AttentionParams&);
  void (*attention_backward)(const AttentionBackwardParams&);
  void (*append_kv)(const KVAppendParams&);
  int64_t (*packed_linear_floats)(int64_t in_features, int64_t out_features, DType dtype);
  void (*pack_linear)(const PackLinearParams&);
  void (*linear)(const LinearParams&);
  void (*rms_norm)(const RmsNormParams&);
  void (*activate)(const ActivateParams&);
  void (*sample)(const SamplingParams&);
  void (*speculate)(const SpeculativeParams&);
  double (*fma_loop)(int64_t iterations, int nthreads);  // benchmarks' limits: limits.h
  double (*read_loop)(const float* data, int64_t floats, int nthreads);
  float (*max_loop)(const float* data, int64_t floats);
};

}  // namespace fastattn
