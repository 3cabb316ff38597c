// The Python face of the CPU kernels: integers in (addresses, shapes, strides), no torch header, GIL released.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/registry.h"
#include "params.h"
#include "plain_attention.h"
#include "token_counts.h"

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

// Address and strides of a score modifier and its dtype: (address, batch, head, query, key, dtype); None = absent.
ScoreView score_view(const py::object& value) {
  if (value.is_none()) return {};
  const py::tuple t = value;
  return {pointer<void>(t[0].cast<uintptr_t>()),
          t[1].cast<int64_t>(),
          t[2].cast<int64_t>(),
          t[3].cast<int64_t>(),
          t[4].cast<int64_t>(),
          static_cast<DType>(t[5].cast<int>())};
}

template <class T>
T item(const py::tuple& t, int i) {
  return t[static_cast<size_t>(i)].cast<T>();
}

const int32_t* indices(const py::tuple& t, int i) { return pointer<const int32_t>(item<uintptr_t>(t, i)); }

// (cu_seqlens, seqlens, leftpad, batch_idx, block_table, stride_block_table, page_size, k_scale, v_scale)
void fill_kv(const py::tuple& t, KVParams* kv) {
  kv->cu_seqlens = indices(t, 0);
  kv->seqlens = indices(t, 1);
  kv->leftpad = indices(t, 2);
  kv->batch_idx = indices(t, 3);
  kv->block_table = indices(t, 4);
  kv->stride_block_table = item<int64_t>(t, 5);
  kv->page_size = item<int64_t>(t, 6);
  if (!t[7].is_none()) {
    kv->k_scale = view(t[7]);
    kv->v_scale = view(t[8]);
  }
}

// (softcap, alibi_slopes, alibi_stride_batch, bias, mask, sinks, dropout_p, seed, offset)
void fill_modifiers(const py::tuple& t, AttentionParams* p) {
  p->softcap = item<double>(t, 0);
  p->alibi_slopes = pointer<const void>(item<uintptr_t>(t, 1));
  p->alibi_stride_batch = item<int64_t>(t, 2);
  p->bias = score_view(t[3]);
  p->mask = score_view(t[4]);
  p->sinks = pointer<const void>(item<uintptr_t>(t, 5));
  p->dropout_p = item<double>(t, 6);
  p->dropout_seed = static_cast<uint64_t>(item<int64_t>(t, 7));
  p->dropout_offset = static_cast<uint64_t>(item<int64_t>(t, 8));
}

// What forward and backward share:
// (q, k, v, sizes, softmax_scale, window_left, window_right, dtype, kv_dtype, nthreads, cu_seqlens_q, kv, modifiers)
AttentionParams attention_params(const py::tuple& call) {
  AttentionParams p{};
  p.q = view(call[0]);
  p.kv.k = view(call[1]);
  p.kv.v = view(call[2]);
  const py::tuple sizes = call[3];
  int i = 0;
  for (int64_t* size : {&p.batch, &p.seqlen_q, &p.kv.seqlen, &p.nheads, &p.nheads_k, &p.headdim, &p.headdim_v})
    *size = item<int64_t>(sizes, i++);
  p.softmax_scale = item<double>(call, 4);
  p.window_left = item<int64_t>(call, 5);
  p.window_right = item<int64_t>(call, 6);
  p.dtype = static_cast<DType>(item<int>(call, 7));
  p.kv.dtype = static_cast<DType>(item<int>(call, 8));
  p.nthreads = item<int>(call, 9);
  p.cu_seqlens_q = indices(call, 10);
  if (!call[11].is_none()) fill_kv(call[11], &p.kv);
  if (!call[12].is_none()) fill_modifiers(call[12], &p);
  return p;
}

// lse: (address, batch stride, head stride), address 0 = not wanted.
void fill_lse(const py::tuple& lse, AttentionParams* p) {
  p->lse = pointer<void>(item<uintptr_t>(lse, 0));
  p->lse_stride_batch = item<int64_t>(lse, 1);
  p->lse_stride_head = item<int64_t>(lse, 2);
}

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

void append_kv(const py::tuple& q, const py::tuple& q_out, const py::tuple& k, const py::tuple& v,
               const py::tuple& k_cache, const py::tuple& v_cache, const py::tuple& kv, uintptr_t rotary_cos,
               uintptr_t rotary_sin, const py::tuple& sizes, bool interleaved, bool q_per_row, int dtype, int kv_dtype,
               int nthreads) {
  KVAppendParams p{};
  p.q = view(q);
  p.q_out = view(q_out);
  p.k = view(k);
  p.v = view(v);
  p.kv.k = view(k_cache);
  p.kv.v = view(v_cache);
  p.kv.dtype = static_cast<DType>(kv_dtype);
  fill_kv(kv, &p.kv);
  p.rotary_cos = pointer<const float>(rotary_cos);
  p.rotary_sin = pointer<const float>(rotary_sin);
  int i = 0;
  for (int64_t* size :
       {&p.batch, &p.seqlen_q, &p.seqlen_new, &p.nheads, &p.nheads_k, &p.headdim, &p.headdim_v, &p.half_rotary})
    *size = item<int64_t>(sizes, i++);
  p.interleaved = interleaved;
  p.q_per_row = q_per_row;
  p.dtype = static_cast<DType>(dtype);
  p.nthreads = nthreads;
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

// A parameter of sample: a number for all rows, or (address,) of one per row. `number` must outlive the call.
template <class T>
PerRow<T> per_row(const py::object& value, T* number) {
  if (py::isinstance<py::tuple>(value)) return {pointer<const T>(value.cast<py::tuple>()[0].cast<uintptr_t>()), 1};
  *number = value.cast<T>();
  return {number, 0};
}

// (address, row stride); None = none.
template <class T>
Rows<T> rows(const py::object& value) {
  if (value.is_none()) return {};
  const py::tuple t = value;
  return {pointer<const T>(item<uintptr_t>(t, 0)), item<int64_t>(t, 1)};
}

// (repetition, presence, frequency, counts, prompt, seen_ids, seen_counts, seen_n, bias, bias_ids, bias_values, bias_n,
// allowed, allowed_bits)
void fill_edits(const py::tuple& t, double (&numbers)[3], LogitEdits* edits) {
  edits->repetition = per_row(t[0], &numbers[0]);
  edits->presence = per_row(t[1], &numbers[1]);
  edits->frequency = per_row(t[2], &numbers[2]);
  edits->counts = rows<int32_t>(t[3]);
  edits->prompt = rows<uint8_t>(t[4]);
  edits->seen_ids = rows<int32_t>(t[5]);
  edits->seen_counts = rows<int32_t>(t[6]);
  edits->seen_n = indices(t, 7);
  edits->bias = rows<float>(t[8]);
  edits->bias_ids = rows<int64_t>(t[9]);
  edits->bias_values = rows<float>(t[10]);
  edits->bias_n = item<int64_t>(t, 11);
  edits->allowed = rows<uint8_t>(t[12]);
  edits->allowed_bits = rows<uint8_t>(t[13]);
}

// The first row whose token is a -SamplingError, or -1. logprobs: None, or (how many best, logprobs, best_ids,
// best_logprobs).
int64_t sample(uintptr_t logits, int64_t stride_batch, int64_t batch, int64_t vocab, int dtype,
               const py::object& temperature, const py::object& top_k, const py::object& top_p, const py::object& min_p,
               const py::object& seeds, const py::object& positions, const py::object& edits, uintptr_t tokens,
               uintptr_t kept, const py::object& logprobs, int nthreads) {
  double reals[3], edit_reals[3];
  int64_t integers[3];
  SamplingParams p{};
  LogitEdits all_edits{};
  p.logits = pointer<const void>(logits);
  p.stride_batch = stride_batch;
  p.temperature = per_row(temperature, &reals[0]);
  p.top_p = per_row(top_p, &reals[1]);
  p.min_p = per_row(min_p, &reals[2]);
  p.top_k = per_row(top_k, &integers[0]);
  p.seeds = per_row(seeds, &integers[1]);
  p.positions = per_row(positions, &integers[2]);
  if (!edits.is_none()) {
    fill_edits(edits, edit_reals, &all_edits);
    p.edits = &all_edits;
  }
  p.tokens = pointer<int64_t>(tokens);
  p.kept = pointer<bool>(kept);
  if (!logprobs.is_none()) {
    const py::tuple t = logprobs;
    p.best = item<int64_t>(t, 0);
    p.logprobs = pointer<float>(item<uintptr_t>(t, 1));
    p.best_ids = pointer<int64_t>(item<uintptr_t>(t, 2));
    p.best_logprobs = pointer<float>(item<uintptr_t>(t, 3));
  }
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
