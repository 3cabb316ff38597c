// attention and attention_with_kvcache without the tour through Python: see plain_attention.cpp, plain_kvcache.cpp.
#pragma once

#include <Python.h>

namespace fastattn {

// plain_kvcache(q, k_cache, v_cache, k, v, cache_seqlens, rotary_cos, rotary_sin, rotary_interleaved, causal,
// softmax_scale, nthreads) -> out, or None where this is not for here.
PyObject* plain_kvcache(PyObject*, PyObject* const* args, Py_ssize_t n);

extern PyMethodDef plain_attention_methods[];

}  // namespace fastattn
