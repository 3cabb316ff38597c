// The host functions of launch.h for sampling. Compiled without contraction of products and sums: sampling_order.h.
#include "cuda/launch.h"
#include "cuda/sampling.cuh"
#include "cuda/sampling_edits.cuh"
#include "cuda/sampling_logprobs.cuh"

namespace fastattn {
namespace {

constexpr int64_t kRowTokens = 8192;                  // a row up to this has one block; else
constexpr int64_t kSliceTokens = 4096;                // a block for as many,
constexpr int64_t kBlocks = 256, kMaxRowBlocks = 32;  // until so many are under way

template <class T>
RowNumber<T> number_of(const PerRow<T>& value) {
  return value.stride ? RowNumber<T>{value.data, T{}} : RowNumber<T>{nullptr, *value.data};
}

int64_t slices_of(int64_t tokens, int64_t slice) { return (tokens + slice - 1) / slice; }

// The slices of rows, for kernels that go in steps.
RowParams row_params(const SamplingParams& p, const SamplingPlan& plan, uint64_t* board) {
  RowParams params{};
  params.logits = p.logits;
  params.stride_batch = p.stride_batch;
  params.board = board;
  params.vocab = static_cast<int>(p.vocab);
  params.blocks = plan.blocks;
  params.slice = static_cast<int>(slices_of(slices_of(p.vocab, plan.blocks), kNoiseBlock) * kNoiseBlock);
  return params;
}

// One launch for rows of one block, else one for each step.
template <class Params>
int launch_steps(void (*kernel)(Params), int64_t batch, int steps, Params params, void* stream) {
  const Launch at{static_cast<unsigned>(batch), static_cast<unsigned>(params.blocks), kSampleSharedBytes,
                  static_cast<decltype(Launch::stream)>(stream)};
  if (params.blocks == 1) {
    params.last_step = steps - 1;
    return launch_kernel(kernel, kSampleThreads, at, params);
  }
  for (int step = 0; step < steps; ++step) {
    params.first_step = params.last_step = step;
    if (const int error = launch_kernel(kernel, kSampleThreads, at, params)) return error;
  }
  return 0;
}

template <class T>
int launch_edits(const SamplingParams& p, float* edited, void* stream) {
  const LogitEdits& e = *p.edits;
  const EditParams params{
      p.logits, p.stride_batch, number_of(e.repetition),  number_of(e.presence), number_of(e.frequency),
      e,        edited,         static_cast<int>(p.vocab)};
  const Launch at{static_cast<unsigned>(p.batch), static_cast<unsigned>(slices_of(p.vocab, kEditTokens)), 0,
                  static_cast<decltype(Launch::stream)>(stream)};
  return launch_kernel(edit_rows<T>, kEditThreads, at, params);
}

template <class T>
int launch_draw(const SamplingParams& p, const RowParams& rows, void* stream) {
  SampleParams params{};
  static_cast<RowParams&>(params) = rows;
  params.temperature = number_of(p.temperature);
  params.top_k = number_of(p.top_k);
  params.top_p = number_of(p.top_p);
  params.min_p = number_of(p.min_p);
  params.seeds = number_of(p.seeds);
  params.positions = number_of(p.positions);
  params.tokens = p.tokens;
  params.kept = reinterpret_cast<uint8_t*>(p.kept);
  params.is_edited = p.edits != nullptr;
  const bool never_limited = !params.top_k.data && params.top_k.number <= 0;
  const bool never_nucleus = !params.top_p.data && params.top_p.number >= 1.0;
  const int steps = 3 + (never_limited ? 0 : kSearchSteps) + (never_nucleus ? 0 : 1 + kSearchSteps);
  return launch_steps(sample_rows<T>, p.batch, steps, params, stream);
}

template <class T>
int launch_logprobs(const SamplingParams& p, const RowParams& rows, uint64_t* ranks, void* stream) {
  RankParams params{};
  static_cast<RowParams&>(params) = rows;
  params.tokens = p.tokens;
  params.ranks = ranks;
  params.logprobs = p.logprobs;
  params.best_ids = p.best_ids;
  params.best_logprobs = p.best_logprobs;
  params.n = static_cast<int>(p.best);
  return launch_steps(rank_rows<T>, p.batch, 4 + kSearchSteps, params, stream);
}

template <class T>
int launch_sampling(const SamplingParams& p, const SamplingPlan& plan, const SamplingMemory& memory, void* stream) {
  const RowParams rows = row_params(p, plan, memory.board);
  if (p.edits) {
    RowParams edited = rows;
    edited.logits = memory.edited;
    edited.stride_batch = p.vocab;
    if (const int error = launch_edits<T>(p, memory.edited, stream)) return error;
    if (const int error = launch_draw<float>(p, edited, stream)) return error;
  } else if (const int error = launch_draw<T>(p, rows, stream)) {
    return error;
  }
  return p.best > 0 ? launch_logprobs<T>(p, rows, memory.ranks, stream) : 0;
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

int cuda_sample(const SamplingParams& p, const SamplingPlan& plan, const SamplingMemory& memory, void* stream) {
  if (p.batch == 0) return 0;
  switch (p.dtype) {
    case DType::f32: return launch_sampling<float>(p, plan, memory, stream);
    case DType::bf16: return launch_sampling<bf16_t>(p, plan, memory, stream);
    case DType::f16: return launch_sampling<f16_t>(p, plan, memory, stream);
    default: return kNoKernel;
  }
}

}  // namespace fastattn
