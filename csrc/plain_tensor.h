// Reading CPU tensors without torch's headers or ABI: through DLPack's exchange API (https://dmlc.github.io/dlpack,
// version 1.2 and later), a table of C functions that the Tensor class publishes.
#pragma once

#include <Python.h>

#include <cstdint>

#include "params.h"

namespace fastattn {

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
struct DLManagedTensor {
  DLVersion version;
  void* manager;
  void (*deleter)(DLManagedTensor* self);
  uint64_t flags;
  DLTensor tensor;
};
struct DLExchangeHeader {
  DLVersion version;
  DLExchangeHeader* previous;
};
struct DLExchange {
  DLExchangeHeader header;
  void* allocate;
  void* from_object;
  int (*to_object)(DLManagedTensor* tensor, void** object);  // takes the tensor over
  int (*view)(void* object, DLTensor* out);                  // borrows: valid while the object lives; may be null
  void* current_stream;
};
constexpr int32_t kDLCpu = 1;
constexpr uint8_t kDLInt = 0, kDLUInt = 1, kDLFloat = 2, kDLBfloat = 4, kDLBool = 6;

// What the module learns once, in bind_tensor.
struct Binding {
  const DLExchange* exchange = nullptr;
  PyTypeObject* tensor = nullptr;
  PyTypeObject* parameter = nullptr;
  PyObject* empty_like = nullptr;
  PyObject* empty_tokens = nullptr;  // of sizes: an int64 tensor
  PyObject* empty_floats = nullptr;  // the same, float32
  PyObject* requires_grad = PyUnicode_InternFromString("requires_grad");
  PyObject* is_neg = PyUnicode_InternFromString("is_neg");
  PyObject* new_empty = PyUnicode_InternFromString("new_empty");
  PyObject* random = PyUnicode_InternFromString("random_");
};
Binding& binding();

// Whether it is a tensor, and of no subclass.
bool is_tensor(PyObject* object);

// Of a tensor; true, with an exception set, where it cannot say.
bool wants_gradient(PyObject* tensor);
bool is_negated(PyObject* tensor);  // whether its values are the negatives of what memory holds

// A tensor on the CPU; false, perhaps with an exception set, for one that is elsewhere or not dense.
bool view_of(PyObject* tensor, DLTensor* out);

bool is_float(DLDataType dtype, DType* out);
bool is_contiguous(const DLTensor& t);

// Any tensor on the CPU that wants no gradient, and has dimensions; false, perhaps with an exception set, for anything
// else.
bool read_tensor(PyObject* object, DLTensor* out);

inline void* data_of(const DLTensor& t) { return static_cast<char*>(t.data) + t.byte_offset; }

// A tensor by the meaning of its dimensions, whichever way they lie.
struct HeadRows {
  char* data;
  int64_t batch, seqlen, heads, dim;
  int64_t stride_batch, stride_seqlen, stride_heads, stride_dim;

  bool has_unit_stride() const { return stride_dim == 1 || dim == 1; }
  bool is_contiguous() const {  // as (batch, seqlen, heads, dim)
    return stride_dim == 1 && stride_heads == dim && stride_seqlen == heads * stride_heads &&
           stride_batch == seqlen * stride_seqlen;
  }
  bool has_shape_of(const HeadRows& other) const {
    return batch == other.batch && seqlen == other.seqlen && heads == other.heads && dim == other.dim;
  }
  TensorView view() const { return {data, stride_batch, stride_seqlen, stride_heads}; }
};

// Reads a float tensor (batch, seqlen, heads, dim), or torch SDPA's (batch, heads, seqlen, dim), with unit stride along
// dim; false, perhaps with an exception set, for anything else.
bool read_rows(PyObject* object, bool heads_first, HeadRows* out, DType* dtype);

// The same of one that wants no gradient and is no subclass.
bool rows_of(PyObject* object, bool heads_first, HeadRows* out, DType* dtype);

// A fresh (batch, seqlen_q, nheads, headdim_v), contiguous; with heads first in q and out it lies in memory as q does,
// as torch's. Null with an exception set where memory is exhausted.
PyObject* make_out(PyObject* object, const HeadRows& q, int64_t headdim_v, bool heads_first, bool out_heads_first);

// A fresh (n,) int64 on the CPU, in memory of our own: half the time of torch's allocator, and no other difference than
// that its storage cannot grow. Null where memory is exhausted, perhaps with an exception set.
PyObject* make_integers(int64_t n, int64_t** data);

// A fresh (batch, nheads, seqlen_q) of what the kernel computes in; `object` is q.
PyObject* make_statistics(PyObject* object, const AttentionParams& p);

// Whether q, k, v and the scale make a valid call; then p's views of them, its sizes and its scale are filled.
bool fill_attention(const HeadRows& q, const HeadRows& k, const HeadRows& v, PyObject* scale, AttentionParams* p);

}  // namespace fastattn
