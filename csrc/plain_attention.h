// attention, attention_with_kvcache and sample without the tour through Python: see plain_attention.cpp,
// plain_kvcache.cpp, plain_sampling.cpp.
#pragma once

#include <Python.h>

namespace fastattn {

// plain_kvcache(q, k_cache, v_cache, k, v, cache_seqlens, rotary_cos, rotary_sin, rotary_interleaved, causal,
// softmax_scale, nthreads) -> out, or None where this is not for here.
PyObject* plain_kvcache(PyObject*, PyObject* const* args, Py_ssize_t n);

// plain_sample(logits, temperature, top_k, top_p, min_p, seeds, positions, repetition_penalty, presence_penalty,
// frequency_penalty, token_counts, prompt_mask, logit_bias, allowed, return_logprobs, nthreads) -> tokens (batch,)
// int64, with n = return_logprobs > 0 a tuple of them, logprobs (batch,), top_ids (batch, n) and top_logprobs
// (batch, n); or None where this is not for here. TokenCounts come as (vocab, ids, counts, lengths, unseen).
PyObject* plain_sample(PyObject*, PyObject* const* args, Py_ssize_t n);

extern PyMethodDef plain_attention_methods[];

}  // namespace fastattn
