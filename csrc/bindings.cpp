// The Python face of the CPU kernels: integers in (addresses, shapes, strides), no torch header, GIL released.
#include <cstring>
#include <stdexcept>
#include <string>

#include "binding_params.h"
#include "cpu/registry.h"
#include "plain_attention.h"
#include "token_counts.h"

namespace fastattn {
namespace {

void attention_forward(const py::tuple& call, const py::tuple& out, const py::tuple& lse) {
  AttentionParams p = attention_params(call);
  p.out = view(out);
  fill_lse(lse, &p);
  py::gil_scoped_release release;
  kernels().attention_forward(p);
}

// dlse and delta have lse's strides; dlse 0 = none.
void attention_backward(const py::tuple& call, const py::tuple& out, const py::tuple& lse, const py::tuple& dout,
                        uintptr_t dlse, uintptr_t delta, const py::tuple& dq, const py::tuple& dk, const py::tuple& dv,
                        const py::object& dbias) {
  AttentionBackwardParams p{};
  p.fwd = attention_params(call);
  p.fwd.out = view(out);
  fill_lse(lse, &p.fwd);
  p.dout = view(dout);
  p.dlse = pointer<const void>(dlse);
  p.delta = pointer<void>(delta);
  p.dq = view(dq);
  p.dk = view(dk);
  p.dv = view(dv);
  p.dbias = score_view(dbias);
  p.fast_bf16_dot = has_fast_bf16_dot();
  py::gil_scoped_release release;
  kernels().attention_backward(p);
}

void append_kv(const py::tuple& call) {
  const KVAppendParams p = append_params(call);
  py::gil_scoped_release release;
  kernels().append_kv(p);
}

// How many floats pack_linear writes.
int64_t packed_linear_floats(int64_t in_features, int64_t out_features, int dtype) {
  return kernels().packed_linear_floats(in_features, out_features, static_cast<DType>(dtype));
}

void pack_linear(uintptr_t weight, int64_t stride_weight, uintptr_t bias, uintptr_t packed, int64_t in_features,
                 int64_t out_features, int dtype, int nthreads) {
  PackLinearParams p{};
  p.weight = pointer<const void>(weight);
  p.bias = pointer<const float>(bias);
  p.packed = pointer<float>(packed);
  p.stride_weight = stride_weight;
  p.in_features = in_features;
  p.out_features = out_features;
  p.dtype = static_cast<DType>(dtype);
  p.nthreads = nthreads;
  py::gil_scoped_release release;
  kernels().pack_linear(p);
}

// `isa` is what the weights were packed for: another ISA would read them in another order.
void linear(uintptr_t x, int64_t stride_x, uintptr_t weights, const char* isa, uintptr_t out, int64_t stride_out,
            int64_t tokens, int64_t in_features, int64_t out_features, int dtype, int nthreads) {
  const KernelTable& table = kernels();
  if (std::strcmp(isa, table.name) != 0)
    throw std::runtime_error(std::string("PackedLinear: the weights were packed for ISA '") + isa + "', but '" +
                             table.name + "' is in use; pack them again after select_isa");
  LinearParams p{};
  p.x = pointer<const float>(x);
  p.weights = pointer<const float>(weights);
  p.out = pointer<float>(out);
  p.stride_x = stride_x;
  p.stride_out = stride_out;
  p.tokens = tokens;
  p.in_features = in_features;
  p.out_features = out_features;
  p.dtype = static_cast<DType>(dtype);
  p.nthreads = nthreads;
  py::gil_scoped_release release;
  table.linear(p);
}

void rms_norm(uintptr_t x, int64_t stride_x, uintptr_t weight, uintptr_t out, int64_t tokens, int64_t hidden, float eps,
              int nthreads) {
  RmsNormParams p{};
  p.x = pointer<const float>(x);
  p.weight = pointer<const float>(weight);
  p.out = pointer<float>(out);
  p.stride_x = stride_x;
  p.tokens = tokens;
  p.hidden = hidden;
  p.eps = eps;
  p.nthreads = nthreads;
  py::gil_scoped_release release;
  kernels().rms_norm(p);
}

void silu_mul(uintptr_t gate_up, int64_t stride_gate_up, uintptr_t out, int64_t tokens, int64_t ffn, int nthreads) {
  SiluMulParams p{};
  p.gate_up = pointer<const float>(gate_up);
  p.out = pointer<float>(out);
  p.stride_gate_up = stride_gate_up;
  p.tokens = tokens;
  p.ffn = ffn;
  p.nthreads = nthreads;
  py::gil_scoped_release release;
  kernels().silu_mul(p);
}

// The first row whose token is a -SamplingError, or -1. logprobs: None, or (how many best, logprobs, best_ids,
// best_logprobs).
int64_t sample(uintptr_t logits, int64_t stride_batch, int64_t batch, int64_t vocab, int dtype,
               const py::object& temperature, const py::object& top_k, const py::object& top_p, const py::object& min_p,
               const py::object& seeds, const py::object& positions, const py::object& edits, uintptr_t tokens,
               uintptr_t kept, const py::object& logprobs, int nthreads) {
  SamplingNumbers numbers;
  SamplingParams p = sampling_params(logits, stride_batch, batch, vocab, dtype, temperature, top_k, top_p, min_p, seeds,
                                     positions, edits, &numbers);
  p.tokens = pointer<int64_t>(tokens);
  p.kept = pointer<bool>(kept);
  if (!logprobs.is_none()) {
    const py::tuple t = logprobs;
    p.best = item<int64_t>(t, 0);
    p.logprobs = pointer<float>(item<uintptr_t>(t, 1));
    p.best_ids = pointer<int64_t>(item<uintptr_t>(t, 2));
    p.best_logprobs = pointer<float>(item<uintptr_t>(t, 3));
  }
  p.nthreads = nthreads;
  py::gil_scoped_release release;
  kernels().sample(p);
  for (int64_t row = 0; row < batch; ++row)
    if (p.tokens[row] < 0) return row;
  return -1;
}

void count_one_token_per_row(uintptr_t ids, uintptr_t counts, uintptr_t lengths, uintptr_t tokens, int64_t batch,
                             int64_t capacity) {
  count_tokens({pointer<int32_t>(ids), pointer<int32_t>(counts), pointer<int32_t>(lengths),
                pointer<const int64_t>(tokens), batch, capacity});
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
  PyModule_AddFunctions(m.ptr(), plain_attention_methods);
  m.def("attention_backward", &attention_backward);
  m.def("append_kv", &append_kv);
  m.def("packed_linear_floats", &packed_linear_floats);
  m.def("pack_linear", &pack_linear);
  m.def("linear", &linear);
  m.def("sample", &sample);
  m.def("count_tokens", &count_one_token_per_row);
  m.def("fma_loop", [](int64_t iterations, int nthreads) {
    py::gil_scoped_release release;
    return kernels().fma_loop(iterations, nthreads);
  });
  m.def("read_loop", [](uintptr_t data, int64_t floats, int nthreads) {
    py::gil_scoped_release release;
    return kernels().read_loop(pointer<const float>(data), floats, nthreads);
  });
  m.def("max_loop", [](uintptr_t data, int64_t floats) {
    py::gil_scoped_release release;
    return kernels().max_loop(pointer<const float>(data), floats);
  });
  m.def("rms_norm", &rms_norm);
  m.def("silu_mul", &silu_mul);
}
