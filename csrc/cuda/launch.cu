// The host functions of launch.h.
#include "cuda/kv_append.cuh"
#include "cuda/launch.cuh"

// The headdims that there are kernels for; others are padded to the next within the kernel. A build may ask for fewer.
#ifndef FASTATTN_CUDA_HEADDIMS
#define FASTATTN_CUDA_HEADDIMS 32, 64, 96, 128, 192, 256
#endif
#ifndef FASTATTN_CUDA_ARCHITECTURES
#define FASTATTN_CUDA_ARCHITECTURES "emulated"
#endif

// Whether hopper.cu is linked in.
#ifdef FASTATTN_CUDA_SM90A
#define FASTATTN_HAS_HOPPER true
#else
#define FASTATTN_HAS_HOPPER false
#endif

namespace fastattn {
namespace {

template <int value>
struct Constant {
  constexpr operator int() const { return value; }
};

// launch(headdim) with the least headdim that holds both of a call's, as a constant.
template <class Launch, int kDim, int... kLarger>
int with_headdim(const AttentionParams& p, Launch launch) {
  if (p.headdim <= kDim && p.headdim_v <= kDim) return launch(Constant<kDim>{});
  if constexpr (sizeof...(kLarger) > 0)
    return with_headdim<Launch, kLarger...>(p, launch);
  else
    return kNoKernel;
}

}  // namespace

const char* cuda_error_text(int error) { return error_text(error); }
const char* cuda_architectures() { return FASTATTN_CUDA_ARCHITECTURES; }

ForwardKernel forward_kernel(const AttentionParams& p) {
  const int64_t headdim = p.headdim > p.headdim_v ? p.headdim : p.headdim_v;
  const bool fits = (headdim > 32 && headdim <= 64) || (headdim > 96 && headdim <= 128);
  const bool takes = p.dtype != DType::f32 && fits && !has_few_rows(p);
  return FASTATTN_HAS_HOPPER && takes && compute_capability() == 90 ? ForwardKernel::wgmma : ForwardKernel::mma;
}

SplitPlan plan_splits(const AttentionParams& p) {
  constexpr int padded_rows = 64;  // Traits<..., 1>::kRows
  if (!has_few_rows(p) || p.dropout_p > 0 || p.kv.seqlen <= kMinSplitKeys) return {1, padded_rows};
  const int64_t splits = (p.kv.seqlen + kMinSplitKeys - 1) / kMinSplitKeys;
  return {static_cast<int>(splits < kMaxSplits ? splits : kMaxSplits), padded_rows};
}

int cuda_attention_forward(const AttentionParams& p, float* partial_out, float* partial_lse, void* stream) {
  if (p.batch == 0 || p.seqlen_q == 0) return 0;
  const bool on_hopper = forward_kernel(p) == ForwardKernel::wgmma;
  const auto launch = [&](auto headdim) {
    if constexpr (FASTATTN_HAS_HOPPER && (headdim == 64 || headdim == 128))
      if (on_hopper) return hopper_headdim<headdim>(p, stream);
    return forward_headdim<headdim>(p, plan_splits(p), partial_out, partial_lse, stream);
  };
  return with_headdim<decltype(launch), FASTATTN_CUDA_HEADDIMS>(p, launch);
}

int cuda_attention_backward(const AttentionBackwardParams& call, void* stream) {
  if (call.fwd.batch == 0) return 0;
  const auto launch = [&](auto headdim) { return backward_headdim<headdim>(call, stream); };
  return with_headdim<decltype(launch), FASTATTN_CUDA_HEADDIMS>(call.fwd, launch);
}

int cuda_append_kv(const KVAppendParams& p, void* stream) {
  const int64_t rows = append_query_rows(p) + 2 * append_key_rows(p);
  if (rows == 0) return 0;
  const Launch at{static_cast<unsigned>((rows + kWarps - 1) / kWarps), 1, 0,
                  static_cast<decltype(Launch::stream)>(stream)};
  const auto kernel = p.dtype == DType::bf16  ? append_rows<bf16_t>
                      : p.dtype == DType::f16 ? append_rows<f16_t>
                                              : append_rows<float>;
  return launch_kernel(kernel, kThreads, at, p);
}

}  // namespace fastattn
