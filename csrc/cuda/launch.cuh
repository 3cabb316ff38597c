// From run-time values to kernels: which instantiation, how many blocks.
#pragma once

#include "cuda/attention_bwd.cuh"
#include "cuda/combine.cuh"
#include "cuda/launch.h"

namespace fastattn {
namespace {

// Few rows: one row tile a warp, so that a block of 64 rows wastes less and the keys may be split.
inline int64_t rows_of(const AttentionParams& p) { return p.seqlen_q * (p.nheads / p.nheads_k); }
inline bool has_few_rows(const AttentionParams& p) { return rows_of(p) <= 64; }

// The plain kernel multiplies by the scale after the maximum: that needs a positive one.
inline bool is_modified(const AttentionParams& p) {
  return p.softcap > 0 || p.alibi_slopes || p.bias.data || p.mask.data || p.softmax_scale <= 0 || p.dropout_p > 0;
}

template <class Traits>
ForwardParams forward_params(const AttentionParams& p) {
  return {p,
          CopySteps::of<Traits>(p.kv.k),
          CopySteps::of<Traits>(p.kv.v),
          static_cast<int>((rows_of(p) + Traits::kRows - 1) / Traits::kRows),
          nullptr,
          nullptr};
}

template <class T, class Traits, class Policy>
int launch_forward(const AttentionParams& p, const SplitPlan& plan, float* partial_out, float* partial_lse,
                   void* stream) {
  ForwardParams params = forward_params<Traits>(p);
  if (plan.splits > 1) params.partial_out = partial_out;
  params.partial_lse = partial_lse;
  Launch at{static_cast<unsigned>(params.row_blocks * p.nheads_k * p.batch), static_cast<unsigned>(plan.splits),
            Traits::kSharedBytes, static_cast<decltype(Launch::stream)>(stream)};
  int error = launch_kernel(attention_forward<T, Traits, Policy>, kThreads, at, params);
  if (error || plan.splits == 1) return error;
  const int64_t threads = p.batch * p.nheads_k * plan.padded_rows * (p.headdim_v / 8);
  at = {static_cast<unsigned>((threads + kThreads - 1) / kThreads), 1, 0, at.stream};
  return launch_kernel(combine_splits<T>, kThreads, at, CombineParams{params, plan.padded_rows});
}

template <class T, int kDim>
int launch_headdim(const AttentionParams& p, const SplitPlan& plan, float* partial_out, float* partial_lse,
                   void* stream) {
  constexpr int kBytes = sizeof(T);
  using Narrow = Traits<kDim, 1, kBytes>;
  using Wide = Traits<kDim, kDim * kBytes <= 256 ? 2 : 1, kBytes>;
  const auto launch = [&](auto traits, auto policy) {
    return launch_forward<T, decltype(traits), decltype(policy)>(p, plan, partial_out, partial_lse, stream);
  };
  const bool modified = is_modified(p);
  if (p.dropout_p > 0) return launch(Narrow{}, Policy<true, true, false, false>{});
  if (p.kv.block_table)
    return modified ? launch(Narrow{}, Policy<true, false, true, true>{})
                    : launch(Narrow{}, Policy<false, false, true, true>{});
  if (has_few_rows(p))
    return modified ? launch(Narrow{}, Policy<true, false, false, true>{})
                    : launch(Narrow{}, Policy<false, false, false, true>{});
  return modified ? launch(Wide{}, Policy<true, false, false, false>{})
                  : launch(Wide{}, Policy<false, false, false, false>{});
}

inline int64_t blocks_of(int64_t items, int each) { return (items + each - 1) / each; }

template <class T, class Traits, bool modify, bool dropout>
int launch_backward(const AttentionBackwardParams& call, void* stream) {
  const AttentionParams& p = call.fwd;
  const BackwardParams params{call,
                              Softcap(p),
                              CopySteps::of<Traits>(p.kv.k),
                              CopySteps::of<Traits>(p.kv.v),
                              static_cast<int>(blocks_of(rows_of(p), Traits::kRows)),
                              static_cast<int>(blocks_of(p.kv.seqlen, Traits::kRows))};
  const auto launch = [&](auto kernel, int blocks) {
    const Launch at{static_cast<unsigned>(blocks * p.nheads_k * p.batch), 1, Traits::kSharedBytes,
                    static_cast<decltype(Launch::stream)>(stream)};
    return at.blocks_x == 0 ? 0 : launch_kernel(kernel, kThreads, at, params);
  };
  if (const int64_t rows = p.batch * p.seqlen_q * p.nheads) {
    const Launch at{static_cast<unsigned>(blocks_of(rows, kThreads / 8)), 1, 0,
                    static_cast<decltype(Launch::stream)>(stream)};
    if (const int error = launch_kernel(row_deltas<T>, kThreads, at, call)) return error;
  }
  if (const int error = launch(query_gradients<T, Traits, BackwardPolicy<modify, dropout>>, params.row_blocks))
    return error;
  if constexpr (Traits::kSplitsGradients) {
    using Keys = BackwardPolicy<modify, dropout, Gradients::keys>;
    using Values = BackwardPolicy<modify, dropout, Gradients::values>;
    if (const int error = launch(key_gradients<T, Traits, Keys>, params.key_blocks)) return error;
    return launch(key_gradients<T, Traits, Values>, params.key_blocks);
  } else {
    return launch(key_gradients<T, Traits, BackwardPolicy<modify, dropout>>, params.key_blocks);
  }
}

template <class T, int kDim>
int launch_backward_headdim(const AttentionBackwardParams& call, void* stream) {
  using Shapes = BackwardTraits<kDim, sizeof(T)>;
  if (call.fwd.dropout_p > 0) return launch_backward<T, Shapes, true, true>(call, stream);
  return is_modified(call.fwd) ? launch_backward<T, Shapes, true, false>(call, stream)
                               : launch_backward<T, Shapes, false, false>(call, stream);
}

// The dtypes that there are kernels for. A build may ask for fewer.
#ifndef FASTATTN_CUDA_TYPES
#define FASTATTN_CUDA_TYPES f16_t, bf16_t, float
#endif

template <class T>
constexpr DType dtype_of = sizeof(T) == 4 ? DType::f32
                           : is_bf16<T>   ? DType::bf16
                                          : DType::f16;

// launch(T{}) for the T that `dtype` names.
template <class Launch, class T, class... Others>
int with_dtype(DType dtype, Launch launch) {
  if (dtype == dtype_of<T>) return launch(T{});
  if constexpr (sizeof...(Others) > 0)
    return with_dtype<Launch, Others...>(dtype, launch);
  else
    return kNoKernel;
}

}  // namespace

// One translation unit each, forward.cu, hopper.cu and backward.cu: they take minutes, and so they take them side by
// side.
template <int kDim>
int forward_headdim(const AttentionParams& p, const SplitPlan& plan, float* partial_out, float* partial_lse,
                    void* stream);
template <int kDim>
int hopper_headdim(const AttentionParams& p, void* stream);
template <int kDim>
int backward_headdim(const AttentionBackwardParams& call, void* stream);

}  // namespace fastattn
