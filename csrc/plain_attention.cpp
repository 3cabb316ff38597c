// The calls that most programs make, plain attention and plain decode steps on CPU tensors, straight from the
// interpreter to the kernel. Whatever is not plain, or not understood, is answered with None: the caller then takes the
// long way, which checks and explains.
#include "plain_attention.h"

#include <cstdlib>

#include "cpu/registry.h"
#include "plain_tensor.h"

namespace fastattn {
namespace {

// bind_tensor(Tensor, Parameter, empty_like) -> bool: whether this torch publishes the API.
PyObject* bind_tensor(PyObject*, PyObject* const* args, Py_ssize_t n) {
  if (n != 3) return PyErr_Format(PyExc_TypeError, "bind_tensor: expected 3 arguments, got %zd", n);
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
  b.exchange = exchange;
  Py_RETURN_TRUE;
}

// plain_attention(q, k, v, causal, softmax_scale, nthreads) -> out, or None where this is not for here.
PyObject* plain_attention(PyObject*, PyObject* const* args, Py_ssize_t n) {
  if (n != 6) return PyErr_Format(PyExc_TypeError, "plain_attention: expected 6 arguments, got %zd", n);
  const char* forced = std::getenv("FASTATTN_BACKEND");
  if (!binding().exchange || (forced && *forced) || !PyBool_Check(args[3])) Py_RETURN_NONE;
  AttentionParams p{};
  DLTensor q, k, v;
  if (!view_of(args[0], &q, &p.dtype) || !view_of(args[1], &k, &p.kv.dtype) || p.dtype != p.kv.dtype ||
      !view_of(args[2], &v, &p.kv.dtype) || p.dtype != p.kv.dtype || !fill_attention(q, k, v, args[4], &p)) {
    PyErr_Clear();
    Py_RETURN_NONE;
  }
  p.window_left = -1;
  p.window_right = args[3] == Py_True ? 0 : -1;
  p.nthreads = static_cast<int>(PyLong_AsLong(args[5]));
  PyObject* out = make_out(args[0], q, p.headdim_v);
  if (!out) return nullptr;
  DLTensor view;
  if (binding().exchange->view(out, &view) != 0) {
    Py_DECREF(out);
    return nullptr;
  }
  p.out = tensor_view(view);
  Py_BEGIN_ALLOW_THREADS;
  kernels().attention_forward(p);
  Py_END_ALLOW_THREADS;
  return out;
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
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace fastattn
