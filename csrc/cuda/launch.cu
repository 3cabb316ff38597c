// The kernels of fastattn._cuda.
#include "cuda/launch.cuh"

#ifndef FASTATTN_CUDA_ARCHITECTURES
#define FASTATTN_CUDA_ARCHITECTURES "emulated"
#endif

namespace fastattn {

const char* cuda_error_text(int error) { return error_text(error); }
const char* cuda_architectures() { return FASTATTN_CUDA_ARCHITECTURES; }

SplitPlan plan_splits(const AttentionParams& p) {
  constexpr int padded_rows = 64;  // Traits<..., 1>::kRows
  if (!has_few_rows(p) || p.dropout_p > 0 || p.kv.seqlen <= kMinSplitKeys) return {1, padded_rows};
  const int64_t splits = (p.kv.seqlen + kMinSplitKeys - 1) / kMinSplitKeys;
  return {static_cast<int>(splits < kMaxSplits ? splits : kMaxSplits), padded_rows};
}

int cuda_attention_forward(const AttentionParams& p, float* partial_out, float* partial_lse, void* stream) {
  if (p.batch == 0 || p.seqlen_q == 0) return 0;
  const SplitPlan plan = plan_splits(p);
  if (p.dtype == DType::bf16)
    return launch_fitting<bf16_t, FASTATTN_CUDA_HEADDIMS>(p, plan, partial_out, partial_lse, stream);
  return launch_fitting<f16_t, FASTATTN_CUDA_HEADDIMS>(p, plan, partial_out, partial_lse, stream);
}

}  // namespace fastattn
