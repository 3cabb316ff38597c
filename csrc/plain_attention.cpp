// The calls that most programs make, attention, decode steps and draws on dense CPU tensors, straight from the
// interpreter to the kernel. Whatever is not plain, or not understood, is answered with None: the caller then takes the
// long way, which checks and explains.
#include "plain_attention.h"

#include <cstdlib>

#include "cpu/registry.h"
#include "plain_tensor.h"

namespace fastattn {
namespace {

// bind_tensor(Tensor, Parameter, empty_like, empty_tokens, empty_floats) -> bool: whether this torch publishes the API.
// The last two make int64 and float32 tensors of a shape on the CPU.
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

// A call's arguments, in order; fastattn/plain.py makes them.
enum Arg {
  kQ,
  kK,
  kV,
  kCausal,  // bool
  kScale,   // None or a float
  kNthreads,
  kLayout,       // int, a Layout
  kSharesHeads,  // bool: whether k and v may have fewer heads than q, and more than one
  kRecords,      // bool: whether autograd records, so that who wants a gradient gets no answer here
  kWantsLse,     // bool
  kWindow,       // (left, right)
  kSoftcap,
  kBias,  // this and the rest: None or a tensor
  kMask,  // bool; in the layouts with heads first float, too, which is then a bias
  kAlibi,
  kSinks,
  kArgs
};
enum Layout : long {
  kRowsFirst,     // (batch, seqlen, heads, dim)
  kTorch,         // (batch, heads, seqlen, dim), out too, and the causal corner top-left
  kTransformers,  // the same, but out (batch, seqlen, heads, dim)
};
constexpr long long kWidest = 1LL << 40;  // a window wider than any sequence: no sum of places overflows

// What a call's arguments say.
struct Call {
  HeadRows q, k, v;
  AttentionParams p{};
  long layout = kRowsFirst;
  bool wants_grad = false;

  bool heads_first() const { return layout != kRowsFirst; }
  bool out_heads_first() const { return layout == kTorch; }
};

// A causal mask with its corner top-left, in terms of one whose corner is bottom-right: with more keys than queries
// the last keys are seen by nobody, with fewer the last queries see all.
void align_top_left(AttentionParams* p) {
  if (p->kv.seqlen > p->seqlen_q) p->kv.seqlen = p->seqlen_q;
  p->window_right = p->seqlen_q - p->kv.seqlen;
}

// (left, right), each from -1 on.
bool read_window(PyObject* given, bool causal, AttentionParams* p) {
  if (!PyTuple_CheckExact(given) || PyTuple_GET_SIZE(given) != 2) return false;
  int64_t* sides[] = {&p->window_left, &p->window_right};
  for (int i = 0; i < 2; ++i) {
    PyObject* side = PyTuple_GET_ITEM(given, i);
    if (!PyLong_CheckExact(side)) return false;
    const long long keys = PyLong_AsLongLong(side);  // -1 with an exception set where it is huge
    if (keys < -1 || (keys == -1 && PyErr_Occurred())) return false;
    *sides[i] = keys < kWidest ? keys : kWidest;
  }
  if (causal) p->window_right = 0;
  return true;
}

bool read_softcap(PyObject* given, AttentionParams* p) {
  if (!PyFloat_CheckExact(given)) return false;
  p->softcap = PyFloat_AS_DOUBLE(given);
  return p->softcap >= 0.0 && p->softcap <= 1e30;
}

// Slopes (nheads,) or (batch, nheads), and sinks (nheads,), of the dtype that the kernel computes in.
bool read_per_head(PyObject* object, const AttentionParams& p, bool may_have_batch, const void** data, int64_t* batch) {
  DLTensor t;
  DType dtype;
  if (!is_tensor(object) || !view_of(object, &t) || !is_float(t.dtype, &dtype)) return false;
  if (dtype != (p.dtype == DType::f64 ? DType::f64 : DType::f32)) return false;
  const bool by_row = may_have_batch && t.ndim == 2;
  if ((t.ndim != 1 && !by_row) || t.shape[t.ndim - 1] != p.nheads || (by_row && t.shape[0] != p.batch)) return false;
  if (p.nheads > 1 && t.strides[t.ndim - 1] != 1) return false;
  *data = data_of(t);
  if (batch) *batch = by_row ? t.strides[0] : 0;
  return true;
}

// A tensor that broadcasts to the scores. Of floats the kernel reads what Python would not convert first; torch's own
// attention takes of them only float32 and q's dtype.
bool read_scores(PyObject* object, const Call& call, bool is_mask, AttentionParams* p) {
  DLTensor t;
  if (!is_tensor(object) || !view_of(object, &t) || t.ndim > 4 || is_negated(object)) return false;
  if (is_mask && call.layout == kTransformers && t.ndim != 4) return false;
  ScoreView view{};
  const bool is_bool = t.dtype.code == kDLBool && t.dtype.bits == 8 && t.dtype.lanes == 1;
  if (is_bool) {
    view.dtype = DType::i8;
    if (!is_mask) return false;
  } else {
    if (!is_float(t.dtype, &view.dtype) || (is_mask && !call.heads_first())) return false;
    if ((view.dtype == DType::f64) != (p->dtype == DType::f64)) return false;
    if (call.layout == kTorch && view.dtype != p->dtype && view.dtype != DType::f32) return false;
    if (p->bias.data) return false;
  }
  const int64_t full[] = {p->batch, p->nheads, p->seqlen_q, p->kv.seqlen};
  int64_t* strides[] = {&view.stride_batch, &view.stride_head, &view.stride_q, &view.stride_k};
  for (int i = 0; i < t.ndim; ++i) {
    const int at = 4 - t.ndim + i;
    if (t.shape[i] != 1 && t.shape[i] != full[at]) return false;
    *strides[at] = t.shape[i] == 1 ? 0 : t.strides[i];
  }
  view.data = data_of(t);
  (is_bool ? p->mask : p->bias) = view;
  return true;
}

// Whether everything is plain; false, perhaps with an exception set, where it is not.
bool read_call(PyObject* const* args, Call* call) {
  const char* forced = std::getenv("FASTATTN_BACKEND");
  if (!binding().exchange || (forced && *forced) || !PyBool_Check(args[kCausal])) return false;
  call->layout = PyLong_AsLong(args[kLayout]);
  AttentionParams& p = call->p;
  DType k_dtype, v_dtype;
  for (const int i : {kQ, kK, kV})
    if (!is_tensor(args[i])) return false;
  if (!read_rows(args[kQ], call->heads_first(), &call->q, &p.dtype) ||
      !read_rows(args[kK], call->heads_first(), &call->k, &k_dtype) ||
      !read_rows(args[kV], call->heads_first(), &call->v, &v_dtype) || p.dtype != k_dtype || p.dtype != v_dtype ||
      !fill_attention(call->q, call->k, call->v, args[kScale], &p))
    return false;
  if (args[kSharesHeads] != Py_True && call->k.heads != call->q.heads && call->k.heads != 1) return false;
  p.kv.dtype = k_dtype;
  p.nthreads = static_cast<int>(PyLong_AsLong(args[kNthreads]));
  const bool causal = args[kCausal] == Py_True;
  if (!read_window(args[kWindow], causal, &p) || !read_softcap(args[kSoftcap], &p)) return false;
  if (args[kBias] != Py_None && !read_scores(args[kBias], *call, false, &p)) return false;
  if (args[kMask] != Py_None && !read_scores(args[kMask], *call, true, &p)) return false;
  if (args[kAlibi] != Py_None &&
      (wants_gradient(args[kAlibi]) || !read_per_head(args[kAlibi], p, true, &p.alibi_slopes, &p.alibi_stride_batch)))
    return false;
  if (args[kSinks] != Py_None && !read_per_head(args[kSinks], p, false, &p.sinks, nullptr)) return false;
  if (causal && call->heads_first()) {
    if (p.window_left != -1) return false;
    align_top_left(&p);
  }
  if (args[kRecords] == Py_True)
    for (const int i : {kQ, kK, kV, kBias, kMask, kSinks})
      call->wants_grad |= args[i] != Py_None && wants_gradient(args[i]);
  return true;
}

// Of a call that is not for here: no exception, the long way will find the words.
PyObject* not_for_here() {
  PyErr_Clear();
  Py_RETURN_NONE;
}

// (batch, nheads, seqlen_q), contiguous: the log-sum-exp of a call, or its like.
bool read_statistics(PyObject* object, const AttentionParams& p, void** data) {
  DLTensor t;
  DType dtype;
  if (!is_tensor(object) || !view_of(object, &t) || !is_float(t.dtype, &dtype) || t.ndim != 3) return false;
  *data = data_of(t);
  return dtype == (p.dtype == DType::f64 ? DType::f64 : DType::f32) && t.shape[0] == p.batch &&
         t.shape[1] == p.nheads && t.shape[2] == p.seqlen_q && is_contiguous(t);
}

// plain_attention(*call) -> out, or (out, lse), as the layout says; None where this is not for here; False where it is,
// but autograd has to hear of it.
PyObject* plain_attention(PyObject*, PyObject* const* args, Py_ssize_t n) {
  if (n != kArgs) return PyErr_Format(PyExc_TypeError, "plain_attention: expected %d arguments, got %zd", kArgs, n);
  Call call;
  if (!read_call(args, &call)) return not_for_here();
  if (call.wants_grad) Py_RETURN_FALSE;
  AttentionParams& p = call.p;
  PyObject* lse = nullptr;
  PyObject* out = make_out(args[kQ], call.q, p.headdim_v, call.heads_first(), call.out_heads_first());
  if (out && args[kWantsLse] == Py_True) {
    lse = make_statistics(args[kQ], p);
    p.lse_stride_head = p.seqlen_q;
    p.lse_stride_batch = p.nheads * p.seqlen_q;
    if (!lse) Py_CLEAR(out);
  }
  if (!out) return nullptr;
  HeadRows rows;
  DType dtype;
  if (!read_rows(out, call.out_heads_first(), &rows, &dtype) || (lse && !read_statistics(lse, p, &p.lse))) {
    Py_DECREF(out);
    Py_XDECREF(lse);
    return not_for_here();
  }
  p.out = rows.view();
  Py_BEGIN_ALLOW_THREADS;
  kernels().attention_forward(p);
  Py_END_ALLOW_THREADS;
  return lse ? Py_BuildValue("(NN)", out, lse) : out;
}

// plain_attention_backward(*call, dout, out, lse, delta, dq, dk, dv) -> whether it was for here; then the last four are
// written. They are as lse, q, k and v, but dq float32 where q has 16 bits. Nothing for bias and sinks.
PyObject* plain_attention_backward(PyObject*, PyObject* const* args, Py_ssize_t n) {
  enum { kDout = kArgs, kOut, kLse, kDelta, kDq, kDk, kDv, kAll };
  if (n != kAll)
    return PyErr_Format(PyExc_TypeError, "plain_attention_backward: expected %d arguments, got %zd", kAll, n);
  Call call;
  AttentionBackwardParams b{};
  void* lse = nullptr;
  const bool reads = read_call(args, &call) && read_statistics(args[kLse], call.p, &lse) &&
                     read_statistics(args[kDelta], call.p, &b.delta);
  if (!reads) {
    PyErr_Clear();
    Py_RETURN_FALSE;
  }
  AttentionParams& p = call.p;
  HeadRows like_out = call.q;
  like_out.dim = p.headdim_v;
  struct Given {
    int arg;
    bool heads_first;
    const HeadRows& like;
    TensorView* view;
  };
  const Given given[] = {{kDout, call.out_heads_first(), like_out, &b.dout},
                         {kOut, call.out_heads_first(), like_out, &p.out},
                         {kDq, call.heads_first(), call.q, &b.dq},
                         {kDk, call.heads_first(), call.k, &b.dk},
                         {kDv, call.heads_first(), call.v, &b.dv}};
  for (const Given& x : given) {
    HeadRows rows;
    DType dtype;
    const DType wanted = x.arg == kDq && p.dtype != DType::f64 ? DType::f32 : p.dtype;
    if (!is_tensor(args[x.arg]) || !read_rows(args[x.arg], x.heads_first, &rows, &dtype) || dtype != wanted ||
        !rows.has_shape_of(x.like)) {
      PyErr_Clear();
      Py_RETURN_FALSE;
    }
    *x.view = rows.view();
  }
  p.lse = lse;
  p.lse_stride_head = p.seqlen_q;
  p.lse_stride_batch = p.nheads * p.seqlen_q;
  b.fwd = p;
  b.fast_bf16_dot = has_fast_bf16_dot();
  Py_BEGIN_ALLOW_THREADS;
  kernels().attention_backward(b);
  Py_END_ALLOW_THREADS;
  Py_RETURN_TRUE;
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
    {"plain_attention_backward", as_method(plain_attention_backward), METH_FASTCALL, nullptr},
    {"plain_kvcache", as_method(plain_kvcache), METH_FASTCALL, nullptr},
    {"plain_sample", as_method(plain_sample), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace fastattn
