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
constexpr uint8_t kDLInt = 0, kDLFloat = 2, kDLBfloat = 4;
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
Binding& binding();

// Any tensor on the CPU that wants no gradient; false, perhaps with an exception set, for anything else.
bool read_tensor(PyObject* object, DLTensor* out);

// A plain (batch, seqlen, heads, dim) float tensor with unit stride along dim.
bool view_of(PyObject* object, DLTensor* out, DType* dtype);

bool is_contiguous(const DLTensor& t);  // of four dimensions

inline void* data_of(const DLTensor& t) { return static_cast<char*>(t.data) + t.byte_offset; }
inline TensorView tensor_view(const DLTensor& t) { return {data_of(t), t.strides[0], t.strides[1], t.strides[2]}; }

// A fresh contiguous (batch, seqlen_q, nheads, headdim_v); null with an exception set where memory is exhausted.
PyObject* make_out(PyObject* q, const DLTensor& view, int64_t headdim_v);

// Whether q, k, v and the scale make a valid call; then p's views of them, its sizes and its scale are filled.
bool fill_attention(const DLTensor& q, const DLTensor& k, const DLTensor& v, PyObject* scale, AttentionParams* p);

}  // namespace fastattn
