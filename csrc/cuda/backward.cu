// The gradient kernels of one headdim, FASTATTN_HEADDIM.
#include "cuda/launch.cuh"

namespace fastattn {

template <>
int backward_headdim<FASTATTN_HEADDIM>(const AttentionBackwardParams& call, void* stream) {
  const auto launch = [&](auto element) {
    return launch_backward_headdim<decltype(element), FASTATTN_HEADDIM>(call, stream);
  };
  return with_dtype<decltype(launch), FASTATTN_CUDA_TYPES>(call.fwd.dtype, launch);
}

}  // namespace fastattn
