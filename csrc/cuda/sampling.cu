// The host functions of launch.h for sampling. Compiled without contraction of products and sums: sampling_order.h.
#include "cuda/launch.h"
#include "cuda/sampling.cuh"

namespace fastattn {
namespace {

constexpr int64_t kRowTokens = 8192;                  // a row up to this has one block; else
constexpr int64_t kSliceTokens = 4096;                // a block for as many,
constexpr int64_t kBlocks = 256, kMaxRowBlocks = 32;  // until so many are under way

template <class T>
RowNumber<T> number_of(const PerRow<T>& value) {
  return value.stride ? RowNumber<T>{value.data, T{}} : RowNumber<T>{nullptr, *value.data};
}

int64_t rounded_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

template <class T>
int launch_steps(const SamplingParams& p, SampleParams params, void* stream) {
  const Launch at{static_cast<unsigned>(p.batch), static_cast<unsigned>(params.blocks), kSampleSharedBytes,
                  static_cast<decltype(Launch::stream)>(stream)};
  const bool never_limited = !params.top_k.data && params.top_k.number <= 0;
  const bool never_nucleus = !params.top_p.data && params.top_p.number >= 1.0;
  const int steps = 3 + (never_limited ? 0 : kSearchSteps) + (never_nucleus ? 0 : 1 + kSearchSteps);
  if (params.blocks == 1) {
    params.last_step = steps - 1;
    return launch_kernel(sample_rows<T>, kSampleThreads, at, params);
  }
  for (int step = 0; step < steps; ++step) {
    params.first_step = params.last_step = step;
    if (const int error = launch_kernel(sample_rows<T>, kSampleThreads, at, params)) return error;
  }
  return 0;
}

}  // namespace

SamplingPlan plan_sampling(int64_t batch, int64_t vocab) {
  int64_t blocks = 1;
  if (vocab > kRowTokens) blocks = (vocab + kSliceTokens - 1) / kSliceTokens;
  const int64_t share = batch > 0 ? kBlocks / batch : 1;
  if (blocks > share) blocks = share;
  if (blocks > kMaxRowBlocks) blocks = kMaxRowBlocks;
  if (blocks < 1) blocks = 1;
  return {static_cast<int>(blocks), batch * 2 * board_words(static_cast<int>(blocks))};
}

int cuda_sample(const SamplingParams& p, const SamplingPlan& plan, uint64_t* board, void* stream) {
  if (p.batch == 0) return 0;
  SampleParams params{};
  params.logits = p.logits;
  params.stride_batch = p.stride_batch;
  params.temperature = number_of(p.temperature);
  params.top_k = number_of(p.top_k);
  params.top_p = number_of(p.top_p);
  params.min_p = number_of(p.min_p);
  params.seeds = number_of(p.seeds);
  params.positions = number_of(p.positions);
  params.tokens = p.tokens;
  params.kept = reinterpret_cast<uint8_t*>(p.kept);
  params.board = board;
  params.vocab = static_cast<int>(p.vocab);
  params.blocks = plan.blocks;
  params.slice = static_cast<int>(rounded_up((p.vocab + plan.blocks - 1) / plan.blocks, kNoiseBlock));
  switch (p.dtype) {
    case DType::f32: return launch_steps<float>(p, params, stream);
    case DType::bf16: return launch_steps<bf16_t>(p, params, stream);
    case DType::f16: return launch_steps<f16_t>(p, params, stream);
    default: return kNoKernel;
  }
}

}  // namespace fastattn
