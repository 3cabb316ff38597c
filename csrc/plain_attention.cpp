// The call that most programs make, plain attention on CPU tensors, straight from the interpreter to the kernel.
//
// Tensors are read through DLPack's exchange API (https://dmlc.github.io/dlpack, version 1.2 and later): a table of C
// functions that the Tensor class publishes, so that neither torch's headers nor its ABI come in. Whatever is not
// plain, or not understood, is answered with None: the caller then takes the long way, which checks and explains.
#include "plain_attention.h"

#include <cmath>
#include <cstdint>
#include <cstdlib>

#include "cpu/registry.h"
#include "params.h"

namespace fastattn {
namespace {

struct DLVersion {
  uint32_t major, minor;
};
struct DLDevice {
  int32_t type, id;
};
struct DLDataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};
struct DLExchangeHeader {
  DLVersion version;
  DLExchangeHeader* previous;
};
struct DLExchange {
  DLExchangeHeader header;
  void* allocate;
  void* from_object;
  void* to_object;
  int (*view)(void* object, DLTensor* out);  // borrows: valid while the object lives; may be null
  void* current_stream;
};
constexpr int32_t kDLCpu = 1;
constexpr uint8_t kDLFloat = 2, kDLBfloat = 4;
constexpr int64_t kMaxHeaddim = 512;

// What the module learns once, in bind_tensor.
struct Binding {
  const DLExchange* exchange = nullptr;
  PyTypeObject* tensor = nullptr;
  PyTypeObject* parameter = nullptr;
  PyObject* empty_like = nullptr;
  PyObject* requires_grad = PyUnicode_InternFromString("requires_grad");
  PyObject* new_empty = PyUnicode_InternFromString("new_empty");
};
Binding& binding() {
  static Binding b;
  return b;
}

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

bool is_float(DLDataType t, DType* out) {
  if (t.lanes != 1) return false;
  if (t.code == kDLBfloat && t.bits == 16) return *out = DType::bf16, true;
  if (t.code != kDLFloat) return false;
  switch (t.bits) {
    case 16: return *out = DType::f16, true;
    case 32: return *out = DType::f32, true;
    case 64: return *out = DType::f64, true;
    default: return false;
  }
}

// A plain CPU tensor (batch, seqlen, heads, dim) with unit stride along dim, and no gradient wanted.
bool view_of(PyObject* object, DLTensor* out, DType* dtype) {
  const Binding& b = binding();
  if (Py_TYPE(object) != b.tensor && Py_TYPE(object) != b.parameter) return false;
  PyObject* wants = PyObject_GetAttr(object, b.requires_grad);
  Py_XDECREF(wants);
  if (wants != Py_False || b.exchange->view(object, out) != 0) return false;
  return out->device.type == kDLCpu && out->ndim == 4 && is_float(out->dtype, dtype) && out->strides &&
         (out->strides[3] == 1 || out->shape[3] == 1);
}

TensorView tensor_view(const DLTensor& t) {
  return {static_cast<char*>(t.data) + t.byte_offset, t.strides[0], t.strides[1], t.strides[2]};
}

bool is_contiguous(const DLTensor& t) {
  return t.strides[3] == 1 && t.strides[2] == t.shape[3] && t.strides[1] == t.shape[2] * t.strides[2] &&
         t.strides[0] == t.shape[1] * t.strides[1];
}

// A fresh contiguous (batch, seqlen_q, nheads, headdim_v).
PyObject* make_out(PyObject* q, const DLTensor& view, int64_t headdim_v) {
  const Binding& b = binding();
  if (headdim_v == view.shape[3] && is_contiguous(view)) return PyObject_CallOneArg(b.empty_like, q);
  PyObject* shape =
      Py_BuildValue("(LLLL)", static_cast<long long>(view.shape[0]), static_cast<long long>(view.shape[1]),
                    static_cast<long long>(view.shape[2]), static_cast<long long>(headdim_v));
  PyObject* out = shape ? PyObject_CallMethodOneArg(q, b.new_empty, shape) : nullptr;
  Py_XDECREF(shape);
  return out;
}

// Whether q, k, v and the scale make a valid call; then p is filled but for out.
bool fill(const DLTensor& q, const DLTensor& k, const DLTensor& v, PyObject* scale, AttentionParams* p) {
  const int64_t nheads = q.shape[2], nheads_k = k.shape[2], headdim = q.shape[3], headdim_v = v.shape[3];
  if (k.shape[0] != q.shape[0] || v.shape[0] != q.shape[0] || k.shape[1] != v.shape[1] || v.shape[2] != nheads_k ||
      nheads_k == 0 || nheads == 0 || nheads % nheads_k != 0 || k.shape[3] != headdim || headdim < 1 ||
      headdim > kMaxHeaddim || headdim_v < 1 || headdim_v > kMaxHeaddim)
    return false;
  p->q = tensor_view(q);
  p->kv.k = tensor_view(k);
  p->kv.v = tensor_view(v);
  p->batch = q.shape[0];
  p->seqlen_q = q.shape[1];
  p->kv.seqlen = k.shape[1];
  p->nheads = nheads;
  p->nheads_k = nheads_k;
  p->headdim = headdim;
  p->headdim_v = headdim_v;
  if (scale == Py_None) {
    p->softmax_scale = 1.0 / std::sqrt(static_cast<double>(headdim));
    return true;
  }
  if (!PyFloat_CheckExact(scale)) return false;
  p->softmax_scale = PyFloat_AS_DOUBLE(scale);
  return std::isfinite(p->softmax_scale);
}

// plain_attention(q, k, v, causal, softmax_scale, nthreads) -> out, or None where this is not for here.
PyObject* plain_attention(PyObject*, PyObject* const* args, Py_ssize_t n) {
  if (n != 6) return PyErr_Format(PyExc_TypeError, "plain_attention: expected 6 arguments, got %zd", n);
  const char* forced = std::getenv("FASTATTN_BACKEND");
  if (!binding().exchange || (forced && *forced) || !PyBool_Check(args[3])) Py_RETURN_NONE;
  AttentionParams p{};
  DLTensor q, k, v;
  if (!view_of(args[0], &q, &p.dtype) || !view_of(args[1], &k, &p.kv.dtype) || p.dtype != p.kv.dtype ||
      !view_of(args[2], &v, &p.kv.dtype) || p.dtype != p.kv.dtype || !fill(q, k, v, args[4], &p)) {
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
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace fastattn
