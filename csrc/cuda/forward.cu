// The attention kernels of one headdim, FASTATTN_HEADDIM.
#include "cuda/launch.cuh"

namespace fastattn {

template <>
int forward_headdim<FASTATTN_HEADDIM>(const AttentionParams& p, const SplitPlan& plan, float* partial_out,
                                      float* partial_lse, void* stream) {
  return launch_dtype<FASTATTN_HEADDIM, FASTATTN_CUDA_TYPES>(p, plan, partial_out, partial_lse, stream);
}

}  // namespace fastattn
