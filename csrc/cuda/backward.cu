// The gradient kernels of one headdim, FASTATTN_HEADDIM.
#include "cuda/launch.cuh"

namespace fastattn {

template <>
int backward_headdim<FASTATTN_HEADDIM>(const AttentionBackwardParams& call, void* stream) {
  const auto launch = [&](auto element) {
    using T = decltype(element);
    if constexpr (FASTATTN_HEADDIM <= kMaxGradientHeaddim<T>)
      return launch_backward_headdim<T, FASTATTN_HEADDIM>(call, stream);
    else
      return kNoKernel;
  };
  return with_dtype<decltype(launch), FASTATTN_CUDA_TYPES>(call.fwd.dtype, launch);
}

}  // namespace fastattn
