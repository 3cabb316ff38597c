// The Python face of the CUDA kernels: integers in (addresses, shapes, strides, a stream), no torch header.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "binding_params.h"
#include "cuda/launch.h"

namespace fastattn {
namespace {

void check(const char* what, int error) {
  if (error != 0) throw std::runtime_error(std::string(what) + ": " + cuda_error_text(error));
}

py::tuple plan(const py::tuple& call) {
  const SplitPlan plan = plan_splits(attention_params(call));
  return py::make_tuple(plan.splits, plan.padded_rows);
}

const char* kernel(const py::tuple& call) {
  return forward_kernel(attention_params(call)) == ForwardKernel::wgmma ? "wgmma" : "mma";
}

void attention_forward(const py::tuple& call, const py::tuple& out, const py::tuple& lse, uintptr_t partial_out,
                       uintptr_t partial_lse, uintptr_t stream) {
  AttentionParams p = attention_params(call);
  p.out = view(out);
  fill_lse(lse, &p);
  int error;
  {
    py::gil_scoped_release release;
    error = cuda_attention_forward(p, pointer<float>(partial_out), pointer<float>(partial_lse), pointer<void>(stream));
  }
  check("attention_forward", error);
}

void attention_backward(const py::tuple& call, const py::tuple& out, const py::tuple& lse, const py::tuple& dout,
                        uintptr_t dlse, uintptr_t delta, const py::tuple& dq, const py::tuple& dk, const py::tuple& dv,
                        const py::object& dbias, uintptr_t stream) {
  const AttentionBackwardParams p = backward_params(call, out, lse, dout, dlse, delta, dq, dk, dv, dbias);
  int error;
  {
    py::gil_scoped_release release;
    error = cuda_attention_backward(p, pointer<void>(stream));
  }
  check("attention_backward", error);
}

void append_kv(const py::tuple& call, uintptr_t stream) {
  const KVAppendParams p = append_params(call);
  int error;
  {
    py::gil_scoped_release release;
    error = cuda_append_kv(p, pointer<void>(stream));
  }
  check("append_kv", error);
}

py::tuple sampling_plan(int64_t batch, int64_t vocab) {
  const SamplingPlan plan = plan_sampling(batch, vocab);
  return py::make_tuple(plan.blocks, plan.board_words);
}

// tokens or kept is 0: not wanted. logprobs: (n, logprobs, best_ids, best_logprobs, ranks) or None.
void sample(uintptr_t logits, int64_t stride_batch, int64_t batch, int64_t vocab, int dtype,
            const py::object& temperature, const py::object& top_k, const py::object& top_p, const py::object& min_p,
            const py::object& seeds, const py::object& positions, const py::object& edits, uintptr_t tokens,
            uintptr_t kept, const py::object& logprobs, uintptr_t edited, uintptr_t board, uintptr_t stream) {
  SamplingNumbers numbers;
  SamplingParams p = sampling_params(logits, stride_batch, batch, vocab, dtype, temperature, top_k, top_p, min_p, seeds,
                                     positions, edits, &numbers);
  p.tokens = pointer<int64_t>(tokens);
  p.kept = pointer<bool>(kept);
  SamplingMemory memory{pointer<uint64_t>(board), pointer<float>(edited), nullptr};
  if (!logprobs.is_none()) {
    const py::tuple t = logprobs;
    p.best = item<int64_t>(t, 0);
    p.logprobs = pointer<float>(item<uintptr_t>(t, 1));
    p.best_ids = pointer<int64_t>(item<uintptr_t>(t, 2));
    p.best_logprobs = pointer<float>(item<uintptr_t>(t, 3));
    memory.ranks = pointer<uint64_t>(item<uintptr_t>(t, 4));
  }
  int error;
  {
    py::gil_scoped_release release;
    error = cuda_sample(p, plan_sampling(batch, vocab), memory, pointer<void>(stream));
  }
  check("sample", error);
}

}  // namespace
}  // namespace fastattn

PYBIND11_MODULE(_cuda, m) {
  using namespace fastattn;
  m.doc() = "fastattn's CUDA kernels. Arguments are trusted: call fastattn.attention instead.";
  m.def("architectures", &cuda_architectures, "What the kernels were compiled for, as nvcc names it.");
  m.def("plan_splits", &plan, "(splits, padded_rows) of a call: the partial results that it needs room for.");
  m.def("forward_kernel", &kernel, "The forward kernel of a call on the current device: 'wgmma' (Hopper) or 'mma'.");
  m.def("attention_forward", &attention_forward);
  m.def("attention_backward", &attention_backward);
  m.def("append_kv", &append_kv);
  m.def("plan_sampling", &sampling_plan, "(blocks a row, board words) of batch rows of vocab logits.");
  m.def("sample", &sample);
}
