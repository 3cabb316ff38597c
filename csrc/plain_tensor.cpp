#include "plain_tensor.h"

#include <cmath>

namespace fastattn {

Binding& binding() {
  static Binding b;
  return b;
}

namespace {

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

}  // namespace

bool read_tensor(PyObject* object, DLTensor* out) {
  const Binding& b = binding();
  if (Py_TYPE(object) != b.tensor && Py_TYPE(object) != b.parameter) return false;
  PyObject* wants = PyObject_GetAttr(object, b.requires_grad);
  Py_XDECREF(wants);
  return wants == Py_False && b.exchange->view(object, out) == 0 && out->device.type == kDLCpu && out->strides;
}

bool view_of(PyObject* object, DLTensor* out, DType* dtype) {
  return read_tensor(object, out) && out->ndim == 4 && is_float(out->dtype, dtype) &&
         (out->strides[3] == 1 || out->shape[3] == 1);
}

bool is_contiguous(const DLTensor& t) {
  return t.strides[3] == 1 && t.strides[2] == t.shape[3] && t.strides[1] == t.shape[2] * t.strides[2] &&
         t.strides[0] == t.shape[1] * t.strides[1];
}

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

bool fill_attention(const DLTensor& q, const DLTensor& k, const DLTensor& v, PyObject* scale, AttentionParams* p) {
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

}  // namespace fastattn
