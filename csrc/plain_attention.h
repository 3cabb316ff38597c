// attention(q, k, v, causal, softmax_scale) without the tour through Python: see plain_attention.cpp.
#pragma once

#include <Python.h>

namespace fastattn {

extern PyMethodDef plain_attention_methods[];

}  // namespace fastattn
