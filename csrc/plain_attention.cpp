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

// A tensor by the meaning of its dimensions, whichever way they lie.
struct Rows {
  char* data;
  int64_t batch, seqlen, heads, dim;
  int64_t stride_batch, stride_seqlen, stride_heads, stride_dim;

  bool has_unit_stride() const { return stride_dim == 1 || dim == 1; }
  bool is_contiguous() const {  // as (batch, seqlen, heads, dim)
    return stride_dim == 1 && stride_heads == dim && stride_seqlen == heads * stride_heads &&
           stride_batch == seqlen * stride_seqlen;
  }
  TensorView view() const { return {data, stride_batch, stride_seqlen, stride_heads}; }
};

// Reads (batch, seqlen, heads, dim), or torch SDPA's (batch, heads, seqlen, dim).
bool read_rows(PyObject* object, bool heads_first, Rows* out, DType* dtype) {
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

// A plain CPU tensor with unit stride along dim, and no gradient wanted.
bool rows_of(PyObject* object, bool heads_first, Rows* out, DType* dtype) {
  const Binding& b = binding();
  if (Py_TYPE(object) != b.tensor && Py_TYPE(object) != b.parameter) return false;
  PyObject* wants = PyObject_GetAttr(object, b.requires_grad);
  Py_XDECREF(wants);
  return wants == Py_False && read_rows(object, heads_first, out, dtype);
}

// A fresh (batch, seqlen_q, nheads, headdim_v), contiguous; heads first it lies in memory as q does, as torch's.
PyObject* make_out(PyObject* object, const Rows& q, int64_t headdim_v, bool heads_first) {
  const Binding& b = binding();
  if (headdim_v == q.dim && (heads_first || q.is_contiguous())) return PyObject_CallOneArg(b.empty_like, object);
  PyObject* shape =
      Py_BuildValue("(LLLL)", static_cast<long long>(q.batch), static_cast<long long>(heads_first ? q.heads : q.seqlen),
                    static_cast<long long>(heads_first ? q.seqlen : q.heads), static_cast<long long>(headdim_v));
  PyObject* out = shape ? PyObject_CallMethodOneArg(object, b.new_empty, shape) : nullptr;
  Py_XDECREF(shape);
  return out;
}

// Whether q, k, v and the scale make a valid call; then p is filled but for out.
bool fill(const Rows& q, const Rows& k, const Rows& v, PyObject* scale, AttentionParams* p) {
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
  Rows q, k, v, out_rows;
  DType k_dtype, v_dtype;
  if (!rows_of(args[0], heads_first, &q, &p.dtype) || !rows_of(args[1], heads_first, &k, &k_dtype) ||
      !rows_of(args[2], heads_first, &v, &v_dtype) || p.dtype != k_dtype || p.dtype != v_dtype ||
      !fill(q, k, v, args[4], &p) || !(shares_heads || k.heads == q.heads || k.heads == 1)) {
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
    {"plain_sdpa", as_method(plain_sdpa), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace fastattn
