#include "plain_tensor.h"

#include <cmath>

namespace fastattn {

Binding& binding() {
  static Binding b;
  return b;
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

namespace {

// No subclass, and no gradient wanted.
bool is_plain(PyObject* object) {
  const Binding& b = binding();
  if (Py_TYPE(object) != b.tensor && Py_TYPE(object) != b.parameter) return false;
  PyObject* wants = PyObject_GetAttr(object, b.requires_grad);
  Py_XDECREF(wants);
  return wants == Py_False;
}

}  // namespace

bool read_tensor(PyObject* object, DLTensor* out) {
  return is_plain(object) && binding().exchange->view(object, out) == 0 && out->device.type == kDLCpu && out->strides;
}

bool read_rows(PyObject* object, bool heads_first, HeadRows* out, DType* dtype) {
  DLTensor t;
  if (binding().exchange->view(object, &t) != 0) return false;
  if (t.device.type != kDLCpu || t.ndim != 4 || !is_float(t.dtype, dtype) || !t.strides) return false;
  const int seqlen = heads_first ? 2 : 1, heads = heads_first ? 1 : 2;
  *out = {static_cast<char*>(t.data) + t.byte_offset,
          t.shape[0],
          t.shape[seqlen],
          t.shape[heads],
          t.shape[3],
          t.strides[0],
          t.strides[seqlen],
          t.strides[heads],
          t.strides[3]};
  return out->has_unit_stride();
}

bool rows_of(PyObject* object, bool heads_first, HeadRows* out, DType* dtype) {
  return is_plain(object) && read_rows(object, heads_first, out, dtype);
}

PyObject* make_out(PyObject* object, const HeadRows& q, int64_t headdim_v, bool heads_first) {
  const Binding& b = binding();
  if (headdim_v == q.dim && (heads_first || q.is_contiguous())) return PyObject_CallOneArg(b.empty_like, object);
  PyObject* shape =
      Py_BuildValue("(LLLL)", static_cast<long long>(q.batch), static_cast<long long>(heads_first ? q.heads : q.seqlen),
                    static_cast<long long>(heads_first ? q.seqlen : q.heads), static_cast<long long>(headdim_v));
  PyObject* out = shape ? PyObject_CallMethodOneArg(object, b.new_empty, shape) : nullptr;
  Py_XDECREF(shape);
  return out;
}

bool fill_attention(const HeadRows& q, const HeadRows& k, const HeadRows& v, PyObject* scale, AttentionParams* p) {
  if (k.batch != q.batch || v.batch != q.batch || k.seqlen != v.seqlen || v.heads != k.heads || k.heads == 0 ||
      q.heads == 0 || q.heads % k.heads != 0 || k.dim != q.dim || q.dim < 1 || q.dim > kMaxHeaddim || v.dim < 1 ||
      v.dim > kMaxHeaddim)
    return false;
  p->q = q.view();
  p->kv.k = k.view();
  p->kv.v = v.view();
  p->batch = q.batch;
  p->seqlen_q = q.seqlen;
  p->kv.seqlen = k.seqlen;
  p->nheads = q.heads;
  p->nheads_k = k.heads;
  p->headdim = q.dim;
  p->headdim_v = v.dim;
  if (scale == Py_None) {
    p->softmax_scale = 1.0 / std::sqrt(static_cast<double>(q.dim));
    return true;
  }
  if (!PyFloat_CheckExact(scale)) return false;
  p->softmax_scale = PyFloat_AS_DOUBLE(scale);
  return std::isfinite(p->softmax_scale);
}

}  // namespace fastattn
