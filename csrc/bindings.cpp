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

void attention_backward(const py::tuple& call, const py::tuple& out, const py::tuple& lse, const py::tuple& dout,
                        uintptr_t dlse, uintptr_t delta, const py::tuple& dq, const py::tuple& dk, const py::tuple& dv,
                        const py::object& dbias) {
  AttentionBackwardParams p = backward_params(call, out, lse, dout, dlse, delta, dq, dk, dv, dbias);
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

void activate(uintptr_t x, int64_t stride_x, uintptr_t out, int64_t tokens, int64_t ffn, int kind, bool gated,
              int nthreads) {
  ActivateParams p{};
  p.x = pointer<const float>(x);
  p.out = pointer<float>(out);
  p.stride_x = stride_x;
  p.tokens = tokens;
  p.ffn = ffn;
  p.kind = static_cast<Activation>(kind);
  p.gated = gated;
  p.nthreads = nthreads;
  py::gil_scoped_release release;
  kernels().activate(p);
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

// draft, target: (address, batch stride, token stride); false where something is wrong with a row or a token.
bool speculate(const py::tuple& draft, const py::tuple& target, uintptr_t drafted, const py::object& seeds,
               const py::object& positions, uintptr_t totals, uintptr_t tokens, uintptr_t accepted, int64_t batch,
               int64_t n, int64_t vocab, int dtype, int nthreads) {
  int64_t integers[2];
  SpeculativeParams p{};
  p.draft = pointer<const void>(item<uintptr_t>(draft, 0));
  p.draft_stride_batch = item<int64_t>(draft, 1);
  p.draft_stride_token = item<int64_t>(draft, 2);
  p.target = pointer<const void>(item<uintptr_t>(target, 0));
  p.target_stride_batch = item<int64_t>(target, 1);
  p.target_stride_token = item<int64_t>(target, 2);
  p.drafted = pointer<const int64_t>(drafted);
  p.seeds = per_row(seeds, &integers[0]);
  p.positions = per_row(positions, &integers[1]);
  p.totals = pointer<double>(totals);
  p.tokens = pointer<int64_t>(tokens);
  p.accepted = pointer<int64_t>(accepted);
  p.batch = batch;
  p.n = n;
  p.vocab = vocab;
  p.dtype = static_cast<DType>(dtype);
  p.nthreads = nthreads;
  py::gil_scoped_release release;
  kernels().speculate(p);
  for (int64_t row = 0; row < batch; ++row)
    if (p.accepted[row] < 0) return false;
  return true;
}

void count_one_token_per_row(uintptr_t ids, uintptr_t counts, uintptr_t lengths, uintptr_t unseen, uintptr_t tokens,
                             int64_t batch, int64_t capacity, int64_t unseen_bytes) {
  count_tokens({pointer<int32_t>(ids), pointer<int32_t>(counts), pointer<int32_t>(lengths), pointer<uint8_t>(unseen),
                pointer<const int64_t>(tokens), batch, capacity, unseen_bytes});
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
  m.attr("MAX_HEADDIM") = kMaxHeaddim;
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
  m.def("speculate", &speculate);
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
  m.def("activate", &activate);
}
