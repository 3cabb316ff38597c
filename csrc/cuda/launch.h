// What the host may ask of the GPU. Nothing here allocates or synchronises, so all of it can be captured in a graph.
#pragma once

#include "params.h"

namespace fastattn {

// How the keys of few queries are split among blocks, and what the partial results need: floats
// (splits, batch, nheads_k, padded_rows, headdim_v) and (splits, batch, nheads_k, padded_rows). splits = 1: nothing.
struct SplitPlan {
  int splits, padded_rows;
};

// How many blocks share a row of logits, and the words of 8 bytes of the board, on which they leave what they find.
struct SamplingPlan {
  int blocks;
  int64_t board_words;
};

constexpr int kNoKernel = 1;  // cudaErrorInvalidValue

const char* cuda_error_text(int error);
const char* cuda_architectures();  // "sm_80 sm_90 ..."

// Which kernel cuda_attention_forward launches. wgmma (attention_fwd_sm90.cuh): 16-bit calls of more than 64 rows of a
// KV head (queries times its GQA group) and headdim 33 to 64 or 97 to 128, on GPUs of compute capability 9.0, where
// FASTATTN_CUDA_SM90A says that hopper.cu is linked in. mma (attention_fwd.cuh): all others.
enum class ForwardKernel { mma, wgmma };
ForwardKernel forward_kernel(const AttentionParams& p);

SplitPlan plan_splits(const AttentionParams& p);

// q, k, v and out are f16, bf16 or f32; headdim and headdim_v are multiples of 8 up to 256, addresses and strides (of v
// too) are multiples of 16 bytes; alibi_slopes and sinks are float. Returns a cudaError_t.
int cuda_attention_forward(const AttentionParams& p, float* partial_out, float* partial_lse, void* stream);

// As above, of a call that is neither paged nor in a cache; dq, dk and dv are of q's dtype, and as dense as q, k and v.
// dbias, where wanted, is float (batch, nheads, seqlen_q, seqlen_k) of zeros. The same bits every time.
int cuda_attention_backward(const AttentionBackwardParams& call, void* stream);

// All of one 16-bit dtype; kv.seqlens says where each sequence of the cache ends. Returns a cudaError_t.
int cuda_append_kv(const KVAppendParams& p, void* stream);

SamplingPlan plan_sampling(int64_t batch, int64_t vocab);

// The working memory of a call.
struct SamplingMemory {
  uint64_t* board;  // (board_words,)
  float* edited;    // (batch, vocab); null without edits
  uint64_t* ranks;  // (batch, best); null without log-probabilities
};

// logits are f32, f16 or bf16. A parameter of stride 0 is read here and now, on the host; all else lies on the GPU.
// bias_ids ascend in each row, those of one token in the order in which their values are added.
// Rows without a token have a negative SamplingError, of a row with edits that of the edited row, and kEditedHasNaN for
// an id of bias_ids that is none. Their log-probabilities are NaN, and those of a row that came without a finite logit
// or with NaN or +inf, which has no token then, are all NaN, of ids -1. Returns a cudaError_t.
int cuda_sample(const SamplingParams& p, const SamplingPlan& plan, const SamplingMemory& memory, void* stream);

}  // namespace fastattn
