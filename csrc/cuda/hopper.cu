// The Hopper attention kernels of one headdim, FASTATTN_HEADDIM; for sm_90a only.
#include "cuda/attention_fwd_sm90.cuh"
#include "cuda/launch.cuh"

namespace fastattn {

template <>
int hopper_headdim<FASTATTN_HEADDIM>(const AttentionParams& p, void* stream) {
  const auto launch = [&](auto element, auto policy) {
    using T = decltype(element);
    using Traits = HopperTraits<FASTATTN_HEADDIM>;
    const ForwardParams params = forward_params<Traits>(p);
    const Launch at{static_cast<unsigned>(params.row_blocks * p.nheads_k * p.batch), 1, Traits::kSharedBytes,
                    static_cast<decltype(Launch::stream)>(stream)};
    return launch_kernel(attention_forward_sm90<T, Traits, decltype(policy)>, Traits::kBlockThreads, at, params);
  };
  const auto launch_dtype = [&](auto element) {
    if constexpr (sizeof(element) == 2) {
      const bool modified = is_modified(p);
      if (p.dropout_p > 0) return launch(element, Policy<true, true, false, false>{});
      if (p.kv.block_table)
        return modified ? launch(element, Policy<true, false, true, false>{})
                        : launch(element, Policy<false, false, true, false>{});
      return modified ? launch(element, Policy<true, false, false, false>{})
                      : launch(element, Policy<false, false, false, false>{});
    } else {
      return kNoKernel;
    }
  };
  return with_dtype<decltype(launch_dtype), FASTATTN_CUDA_TYPES>(p.dtype, launch_dtype);
}

}  // namespace fastattn
