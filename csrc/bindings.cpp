// The Python face of the CPU kernels: integers in (addresses, shapes, strides), no torch header, GIL released.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "cpu/registry.h"
#include "params.h"

namespace py = pybind11;

namespace fastattn {
namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// (address, batch stride, seqlen stride, head stride)
TensorView view(const py::tuple& t) {
  return {pointer<void>(t[0].cast<uintptr_t>()), t[1].cast<int64_t>(), t[2].cast<int64_t>(), t[3].cast<int64_t>()};
}

void attention_forward(const py::tuple& q, const py::tuple& k, const py::tuple& v, const py::tuple& out,
                       uintptr_t lse, uintptr_t seqlens_k, const py::tuple& sizes, float softmax_scale, bool causal,
                       int dtype, int nthreads) {
  AttentionParams p{};
  p.q = view(q);
  p.k = view(k);
  p.v = view(v);
  p.out = view(out);
  p.lse = pointer<float>(lse);
  p.seqlens_k = pointer<const int32_t>(seqlens_k);
  int i = 0;
  for (int64_t* size : {&p.batch, &p.seqlen_q, &p.seqlen_k, &p.nheads, &p.nheads_k, &p.headdim, &p.headdim_v})
    *size = sizes[i++].cast<int64_t>();
  p.softmax_scale = softmax_scale;
  p.causal = causal;
  p.dtype = static_cast<DType>(dtype);
  p.nthreads = nthreads;
  py::gil_scoped_release release;
  kernels().attention_forward(p);
}

void append_kv(const py::tuple& q, const py::tuple& q_out, const py::tuple& k, const py::tuple& v,
               const py::tuple& k_cache, const py::tuple& v_cache, uintptr_t cache_seqlens, uintptr_t rotary_cos,
               uintptr_t rotary_sin, const py::tuple& sizes, bool interleaved, bool q_per_row, int dtype,
               int nthreads) {
  KVAppendParams p{};
  p.q = view(q);
  p.q_out = view(q_out);
  p.k = view(k);
  p.v = view(v);
  p.k_cache = view(k_cache);
  p.v_cache = view(v_cache);
  p.cache_seqlens = pointer<const int32_t>(cache_seqlens);
  p.rotary_cos = pointer<const float>(rotary_cos);
  p.rotary_sin = pointer<const float>(rotary_sin);
  int i = 0;
  for (int64_t* size :
       {&p.batch, &p.seqlen_q, &p.seqlen_new, &p.nheads, &p.nheads_k, &p.headdim, &p.headdim_v, &p.half_rotary})
    *size = sizes[i++].cast<int64_t>();
  p.interleaved = interleaved;
  p.q_per_row = q_per_row;
  p.dtype = static_cast<DType>(dtype);
  p.nthreads = nthreads;
  py::gil_scoped_release release;
  kernels().append_kv(p);
}

// A parameter of sample: a number for all rows, or (address,) of one per row. `number` must outlive the call.
template <class T>
PerRow<T> per_row(const py::object& value, T* number) {
  if (py::isinstance<py::tuple>(value)) return {pointer<const T>(value.cast<py::tuple>()[0].cast<uintptr_t>()), 1};
  *number = value.cast<T>();
  return {number, 0};
}

// The first row whose token is a -SamplingError, or -1.
int64_t sample(uintptr_t logits, int64_t stride_batch, int64_t batch, int64_t vocab, int dtype,
               const py::object& temperature, const py::object& top_k, const py::object& top_p, const py::object& min_p,
               const py::object& seeds, const py::object& positions, uintptr_t tokens, uintptr_t kept, int nthreads) {
  double reals[3];
  int64_t integers[3];
  SamplingParams p{};
  p.logits = pointer<const void>(logits);
  p.stride_batch = stride_batch;
  p.temperature = per_row(temperature, &reals[0]);
  p.top_p = per_row(top_p, &reals[1]);
  p.min_p = per_row(min_p, &reals[2]);
  p.top_k = per_row(top_k, &integers[0]);
  p.seeds = per_row(seeds, &integers[1]);
  p.positions = per_row(positions, &integers[2]);
  p.tokens = pointer<int64_t>(tokens);
  p.kept = pointer<bool>(kept);
  p.batch = batch;
  p.vocab = vocab;
  p.dtype = static_cast<DType>(dtype);
  p.nthreads = nthreads;
  py::gil_scoped_release release;
  kernels().sample(p);
  for (int64_t row = 0; row < batch; ++row)
    if (p.tokens[row] < 0) return row;
  return -1;
}

py::list isas() {
  py::list names;
  for (const KernelTable* table : supported_kernels()) names.append(table->name);
  return names;
}

}  // namespace
}  // namespace fastattn

PYBIND11_MODULE(_C, m) {
  using namespace fastattn;
  m.doc() = "fastattn's CPU kernels. Arguments are trusted: call fastattn.attention and fastattn.sample instead.";
  m.def("isas", &isas, "Instruction sets that can run here, best first.");
  m.def("isa", [] { return kernels().name; }, "The instruction set in use.");
  m.def("select_isa", &select_kernels, "Use this instruction set from now on; '' = the best.");
  m.def("attention_forward", &attention_forward);
  m.def("append_kv", &append_kv);
  m.def("sample", &sample);
}
