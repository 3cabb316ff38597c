// The calls that most programs make, plain attention, decode steps and draws on CPU tensors, straight from the
// interpreter to the kernel. Whatever is not plain, or not understood, is answered with None: the caller then takes the
// long way, which checks and explains.
#include "plain_attention.h"

#include <cstdlib>

#include "cpu/registry.h"
#include "plain_tensor.h"

namespace fastattn {
namespace {

// bind_tensor(Tensor, Parameter, empty_like, empty_tokens, empty_floats) -> bool: whether this torch publishes the API.
PyObject* bind_tensor(PyObject*, PyObject* const* args, Py_ssize_t n) {
  if (n != 5) return PyErr_Format(PyExc_TypeError, "bind_tensor: expected 5 arguments, got %zd", n);
  Binding& b = binding();
  PyObject* capsule = PyObject_GetAttrString(args[0], "__dlpack_c_exchange_api__");
  const auto* exchange =
      static_cast<const DLExchange*>(capsule ? PyCapsule_GetPointer(capsule, "dlpack_exchange_api") : nullptr);
  Py_XDECREF(capsule);
  PyErr_Clear();
  if (!exchange || exchange->header.version.major != 1 || !exchange->view) Py_RETURN_FALSE;
  b.tensor = reinterpret_cast<PyTypeObject*>(Py_NewRef(args[0]));
  b.parameter = reinterpret_cast<PyTypeObject*>(Py_NewRef(args[1]));
  b.empty_like = Py_NewRef(args[2]);
  b.empty_tokens = Py_NewRef(args[3]);
  b.empty_floats = Py_NewRef(args[4]);
  b.exchange = exchange;
  Py_RETURN_TRUE;
}

// A causal mask with its corner top-left, in terms of one whose corner is bottom-right: with more keys than queries
// the last keys are seen by nobody, with fewer the last queries see all.
void align_top_left(AttentionParams* p) {
  if (p->kv.seqlen > p->seqlen_q) p->kv.seqlen = p->seqlen_q;
  p->window_right = p->seqlen_q - p->kv.seqlen;
}

// The call's arguments are q, k, v, causal, softmax_scale and nthreads; None where this is not for here.
PyObject* run(PyObject* const* args, bool heads_first, bool shares_heads) {
  const char* forced = std::getenv("FASTATTN_BACKEND");
  if (!binding().exchange || (forced && *forced) || !PyBool_Check(args[3])) Py_RETURN_NONE;
  AttentionParams p{};
  HeadRows q, k, v, out_rows;
  DType k_dtype, v_dtype;
  if (!rows_of(args[0], heads_first, &q, &p.dtype) || !rows_of(args[1], heads_first, &k, &k_dtype) ||
      !rows_of(args[2], heads_first, &v, &v_dtype) || p.dtype != k_dtype || p.dtype != v_dtype ||
      !fill_attention(q, k, v, args[4], &p) || !(shares_heads || k.heads == q.heads || k.heads == 1)) {
    PyErr_Clear();
    Py_RETURN_NONE;
  }
  p.kv.dtype = k_dtype;
  p.window_left = p.window_right = -1;
  if (args[3] == Py_True) {
    p.window_right = 0;
    if (heads_first) align_top_left(&p);
  }
  p.nthreads = static_cast<int>(PyLong_AsLong(args[5]));
  PyObject* out = make_out(args[0], q, p.headdim_v, heads_first);
  if (!out) return nullptr;
  if (!read_rows(out, heads_first, &out_rows, &v_dtype)) {
    Py_DECREF(out);
    PyErr_Clear();
    Py_RETURN_NONE;
  }
  p.out = out_rows.view();
  Py_BEGIN_ALLOW_THREADS;
  kernels().attention_forward(p);
  Py_END_ALLOW_THREADS;
  return out;
}

// plain_attention(q, k, v, causal, softmax_scale, nthreads) -> out (batch, seqlen_q, nheads, headdim_v) or None.
PyObject* plain_attention(PyObject*, PyObject* const* args, Py_ssize_t n) {
  if (n != 6) return PyErr_Format(PyExc_TypeError, "plain_attention: expected 6 arguments, got %zd", n);
  return run(args, false, true);
}

// plain_sdpa(q, k, v, is_causal, scale, nthreads, enable_gqa) -> out (batch, nheads, seqlen_q, headdim_v) or None:
// torch's layout, its causal corner, and heads that are shared by permission only.
PyObject* plain_sdpa(PyObject*, PyObject* const* args, Py_ssize_t n) {
  if (n != 7) return PyErr_Format(PyExc_TypeError, "plain_sdpa: expected 7 arguments, got %zd", n);
  return run(args, true, args[6] == Py_True);
}

// METH_FASTCALL functions have another signature than the table's field.
template <class Fn>
PyCFunction as_method(Fn* fn) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(fn));
}

}  // namespace

PyMethodDef plain_attention_methods[] = {
    {"bind_tensor", as_method(bind_tensor), METH_FASTCALL, nullptr},
    {"plain_attention", as_method(plain_attention), METH_FASTCALL, nullptr},
    {"plain_kvcache", as_method(plain_kvcache), METH_FASTCALL, nullptr},
    {"plain_sample", as_method(plain_sample), METH_FASTCALL, nullptr},
    {"plain_sdpa", as_method(plain_sdpa), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace fastattn
