// A decode step as plain_attention answers it: append k and v (rotated if asked), attend.
#include <cstdlib>
#include <memory>
#include <new>

#include "cpu/registry.h"
#include "plain_attention.h"
#include "plain_tensor.h"

namespace fastattn {
namespace {

// The arguments, in order; see fastattn/kvcache.py.
enum Arg { kQ, kKCache, kVCache, kK, kV, kSeqlens, kCos, kSin, kInterleaved, kCausal, kScale, kNthreads, kArgs };

bool is_bool(PyObject* x) { return PyBool_Check(x); }

// The length of each row before the append, (batch,) int32.
struct Lengths {
  static constexpr int64_t kFew = 64;
  int32_t few[kFew];
  std::unique_ptr<int32_t[]> many;
  int32_t* data = nullptr;
  int64_t longest = 0;

  // None: `all` of the cache; an int; or a contiguous (batch,) tensor of int32 or int64. Each in [0, capacity].
  bool read(PyObject* given, int64_t batch, int64_t all, int64_t capacity) {
    if (batch > kFew) many.reset(new (std::nothrow) int32_t[static_cast<size_t>(batch)]);
    data = batch > kFew ? many.get() : few;
    if (!data) return false;
    if (given == Py_None || PyLong_CheckExact(given)) {
      const int64_t length = given == Py_None ? all : PyLong_AsLongLong(given);
      for (int64_t i = 0; i < batch; ++i)
        if (!put(i, length, capacity)) return false;
      return true;
    }
    DLTensor t;
    if (!read_tensor(given, &t) || t.ndim != 1 || t.shape[0] != batch || t.dtype.code != kDLInt || t.dtype.lanes != 1 ||
        (batch > 1 && t.strides[0] != 1) || (t.dtype.bits != 32 && t.dtype.bits != 64))
      return false;
    for (int64_t i = 0; i < batch; ++i)
      if (!put(i,
               t.dtype.bits == 32 ? static_cast<const int32_t*>(data_of(t))[i]
                                  : static_cast<const int64_t*>(data_of(t))[i],
               capacity))
        return false;
    return true;
  }

  void grow(int64_t batch, int64_t by) {
    for (int64_t i = 0; i < batch; ++i) data[i] += static_cast<int32_t>(by);
  }

 private:
  bool put(int64_t i, int64_t length, int64_t capacity) {
    if (length < 0 || length > capacity || length > INT32_MAX) return false;
    data[i] = static_cast<int32_t>(length);
    longest = length > longest ? length : longest;
    return true;
  }
};

// A contiguous (rows, half) float32 table.
bool read_table(PyObject* object, DLTensor* out) {
  return read_tensor(object, out) && out->ndim == 2 && out->dtype.code == kDLFloat && out->dtype.bits == 32 &&
         out->dtype.lanes == 1 && out->strides[1] == 1 && out->strides[0] == out->shape[1];
}

bool same_shape(const HeadRows& x, int64_t batch, int64_t seqlen, int64_t heads, int64_t dim) {
  return x.batch == batch && x.seqlen == seqlen && x.heads == heads && x.dim == dim;
}

// The new rows and the rotary tables into `a`; false where they are not plain.
bool fill_append(PyObject* const* args, const AttentionParams& p, int64_t longest, int64_t capacity,
                 KVAppendParams* a) {
  a->batch = p.batch;
  a->seqlen_q = p.seqlen_q;
  a->nheads = p.nheads;
  a->nheads_k = p.nheads_k;
  a->headdim = p.headdim;
  a->headdim_v = p.headdim_v;
  a->dtype = p.dtype;
  a->nthreads = p.nthreads;
  a->q_per_row = args[kCausal] == Py_True;
  a->interleaved = args[kInterleaved] == Py_True;
  a->q = p.q;
  a->kv = p.kv;
  if ((args[kK] == Py_None) != (args[kV] == Py_None) || (args[kCos] == Py_None) != (args[kSin] == Py_None))
    return false;
  if (args[kK] != Py_None) {
    HeadRows k, v;
    DType k_dtype, v_dtype;
    if (!rows_of(args[kK], false, &k, &k_dtype) || !rows_of(args[kV], false, &v, &v_dtype) || k_dtype != p.dtype ||
        v_dtype != p.dtype || !same_shape(k, p.batch, k.seqlen, p.nheads_k, p.headdim) ||
        !same_shape(v, p.batch, k.seqlen, p.nheads_k, p.headdim_v) || longest + k.seqlen > capacity)
      return false;
    a->k = k.view();
    a->v = v.view();
    a->seqlen_new = k.seqlen;
  }
  if (args[kCos] != Py_None) {
    DLTensor cos, sin;
    if (!read_table(args[kCos], &cos) || !read_table(args[kSin], &sin) || cos.shape[0] != sin.shape[0] ||
        cos.shape[1] != sin.shape[1] || cos.shape[1] < 1 || 2 * cos.shape[1] > p.headdim)
      return false;
    const int64_t rows_q = a->q_per_row ? p.seqlen_q : 1, rows = a->seqlen_new > rows_q ? a->seqlen_new : rows_q;
    if (longest + rows > cos.shape[0]) return false;
    a->rotary_cos = static_cast<const float*>(data_of(cos));
    a->rotary_sin = static_cast<const float*>(data_of(sin));
    a->half_rotary = cos.shape[1];
  }
  return true;
}

// One step; null where the call is not plain or Python has an exception set. Nothing is written before it is certain.
PyObject* step(PyObject* const* args) {
  AttentionParams p{};
  KVAppendParams a{};
  HeadRows q, k_cache, v_cache;
  DType v_dtype;
  Lengths lengths;
  if (!rows_of(args[kQ], false, &q, &p.dtype) || !rows_of(args[kKCache], false, &k_cache, &p.kv.dtype) ||
      !rows_of(args[kVCache], false, &v_cache, &v_dtype) || p.dtype != p.kv.dtype || p.dtype != v_dtype ||
      k_cache.stride_dim != 1 || v_cache.stride_dim != 1 || !fill_attention(q, k_cache, v_cache, args[kScale], &p))
    return nullptr;
  const int64_t capacity = p.kv.seqlen;
  p.nthreads = static_cast<int>(PyLong_AsLong(args[kNthreads]));
  p.window_left = -1;
  p.window_right = args[kCausal] == Py_True ? 0 : -1;
  if (!lengths.read(args[kSeqlens], p.batch, args[kK] == Py_None ? capacity : 0, capacity) ||
      !fill_append(args, p, lengths.longest, capacity, &a))
    return nullptr;
  p.kv.seqlens = a.kv.seqlens = lengths.data;
  PyObject* out = make_out(args[kQ], q, p.headdim_v, false, false);
  PyObject* turned = out && a.rotary_cos ? make_out(args[kQ], q, p.headdim, false, false) : nullptr;
  HeadRows rows;
  bool fits = out && read_rows(out, false, &rows, &v_dtype);
  if (fits) p.out = rows.view();
  if (fits && a.rotary_cos) fits = turned && read_rows(turned, false, &rows, &v_dtype);
  if (fits) {
    if (a.rotary_cos) p.q = a.q_out = rows.view();
    Py_BEGIN_ALLOW_THREADS;
    if (a.rotary_cos || a.seqlen_new > 0) kernels().append_kv(a);
    lengths.grow(p.batch, a.seqlen_new);
    kernels().attention_forward(p);
    Py_END_ALLOW_THREADS;
  } else {
    Py_CLEAR(out);
  }
  Py_XDECREF(turned);
  return out;
}

}  // namespace

PyObject* plain_kvcache(PyObject*, PyObject* const* args, Py_ssize_t n) {
  if (n != kArgs) return PyErr_Format(PyExc_TypeError, "plain_kvcache: expected %d arguments, got %zd", kArgs, n);
  const char* forced = std::getenv("FASTATTN_BACKEND");
  if (binding().exchange && !(forced && *forced) && is_bool(args[kCausal]) && is_bool(args[kInterleaved]))
    if (PyObject* out = step(args)) return out;
  PyErr_Clear();
  Py_RETURN_NONE;
}

}  // namespace fastattn
