// The attention kernels of one headdim, FASTATTN_HEADDIM.
#include "cuda/launch.cuh"

namespace fastattn {

template <>
int forward_headdim<FASTATTN_HEADDIM>(const AttentionParams& p, const SplitPlan& plan, float* partial_out,
                                      float* partial_lse, void* stream) {
  const auto launch = [&](auto element) {
    return launch_headdim<decltype(element), FASTATTN_HEADDIM>(p, plan, partial_out, partial_lse, stream);
  };
  return with_dtype<decltype(launch), FASTATTN_CUDA_TYPES>(p.dtype, launch);
}

}  // namespace fastattn
