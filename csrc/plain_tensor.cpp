#include "plain_tensor.h"

#include <cmath>
#include <cstdlib>

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

bool is_tensor(PyObject* object) {
  return Py_TYPE(object) == binding().tensor || Py_TYPE(object) == binding().parameter;
}

bool wants_gradient(PyObject* tensor) {
  PyObject* wants = PyObject_GetAttr(tensor, binding().requires_grad);
  Py_XDECREF(wants);
  return wants != Py_False;
}

bool is_negated(PyObject* tensor) {
  PyObject* negated = PyObject_CallMethodNoArgs(tensor, binding().is_neg);
  Py_XDECREF(negated);
  return negated != Py_False;
}

bool view_of(PyObject* tensor, DLTensor* out) {
  return binding().exchange->view(tensor, out) == 0 && out->device.type == kDLCpu && (out->strides || out->ndim == 0);
}

bool is_contiguous(const DLTensor& t) {
  int64_t stride = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    if (t.shape[i] != 1 && t.strides[i] != stride) return false;
    stride *= t.shape[i] > 0 ? t.shape[i] : 1;
  }
  return true;
}

bool read_tensor(PyObject* object, DLTensor* out) {
  return is_tensor(object) && !wants_gradient(object) && view_of(object, out) && out->strides;
}

bool read_rows(PyObject* object, bool heads_first, HeadRows* out, DType* dtype) {
  DLTensor t;
  if (!view_of(object, &t) || t.ndim != 4 || !is_float(t.dtype, dtype)) return false;
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
  return is_tensor(object) && !wants_gradient(object) && read_rows(object, heads_first, out, dtype);
}

PyObject* make_out(PyObject* object, const HeadRows& q, int64_t headdim_v, bool heads_first, bool out_heads_first) {
  const Binding& b = binding();
  if (headdim_v == q.dim && heads_first == out_heads_first && (heads_first || q.is_contiguous()))
    return PyObject_CallOneArg(b.empty_like, object);
  PyObject* shape = Py_BuildValue(
      "(LLLL)", static_cast<long long>(q.batch), static_cast<long long>(out_heads_first ? q.heads : q.seqlen),
      static_cast<long long>(out_heads_first ? q.seqlen : q.heads), static_cast<long long>(headdim_v));
  PyObject* out = shape ? PyObject_CallMethodOneArg(object, b.new_empty, shape) : nullptr;
  Py_XDECREF(shape);
  return out;
}

PyObject* make_integers(int64_t n, int64_t** data) {
  constexpr size_t kAlignment = 64;  // as torch's
  struct Block {
    DLManagedTensor managed;
    int64_t size, stride;
    alignas(kAlignment) int64_t data[kAlignment / sizeof(int64_t)];  // and what follows
  };
  const size_t bytes = sizeof(Block) + static_cast<size_t>(n) * sizeof(int64_t);
  auto* block = static_cast<Block*>(std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment));
  if (!block) return nullptr;
  block->size = n;
  block->stride = 1;
  block->managed = {
      {1, 0},
      nullptr,
      [](DLManagedTensor* self) { std::free(self); },
      0,
      {block->data, {kDLCpu, 0}, 1, {kDLInt, 64, 1}, &block->size, &block->stride, 0},
  };
  void* object = nullptr;
  if (binding().exchange->to_object(&block->managed, &object) != 0) return nullptr;
  *data = block->data;
  return static_cast<PyObject*>(object);
}

PyObject* make_statistics(PyObject* object, const AttentionParams& p) {
  const Binding& b = binding();
  PyObject* shape = Py_BuildValue("(LLL)", static_cast<long long>(p.batch), static_cast<long long>(p.nheads),
                                  static_cast<long long>(p.seqlen_q));
  PyObject* out = !shape                  ? nullptr
                  : p.dtype == DType::f64 ? PyObject_CallMethodOneArg(object, b.new_empty, shape)
                                          : PyObject_CallOneArg(b.empty_floats, shape);
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
