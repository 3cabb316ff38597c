// What both modules' functions read their arguments with: tuples of integers to the structs of params.h.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

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

// dlse and delta have lse's strides; dlse 0 = none. dbias may have a stride of slots after its dtype.
AttentionBackwardParams backward_params(const py::tuple& call, const py::tuple& out, const py::tuple& lse,
                                        const py::tuple& dout, uintptr_t dlse, uintptr_t delta, const py::tuple& dq,
                                        const py::tuple& dk, const py::tuple& dv, const py::object& dbias) {
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
  if (p.dbias.data && py::len(dbias) > 6) p.dbias_stride_slot = item<int64_t>(dbias, 6);
  return p;
}

// (q, q_out, k, v, k_cache, v_cache, kv, rotary_cos, rotary_sin, sizes, interleaved, q_per_row, dtype, kv_dtype,
// nthreads)
KVAppendParams append_params(const py::tuple& call) {
  KVAppendParams p{};
  int i = 0;
  for (TensorView* tensor : {&p.q, &p.q_out, &p.k, &p.v, &p.kv.k, &p.kv.v})
    *tensor = view(call[static_cast<size_t>(i++)]);
  fill_kv(call[6], &p.kv);
  p.rotary_cos = pointer<const float>(item<uintptr_t>(call, 7));
  p.rotary_sin = pointer<const float>(item<uintptr_t>(call, 8));
  const py::tuple sizes = call[9];
  i = 0;
  for (int64_t* size :
       {&p.batch, &p.seqlen_q, &p.seqlen_new, &p.nheads, &p.nheads_k, &p.headdim, &p.headdim_v, &p.half_rotary})
    *size = item<int64_t>(sizes, i++);
  p.interleaved = item<bool>(call, 10);
  p.q_per_row = item<bool>(call, 11);
  p.dtype = static_cast<DType>(item<int>(call, 12));
  p.kv.dtype = static_cast<DType>(item<int>(call, 13));
  p.nthreads = item<int>(call, 14);
  return p;
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

// (repetition, presence, frequency, counts, prompt, seen_ids, seen_counts, seen_n, unseen, bias, bias_ids, bias_values,
// bias_n, allowed, allowed_bits)
void fill_edits(const py::tuple& t, double (&numbers)[3], LogitEdits* edits) {
  edits->repetition = per_row(t[0], &numbers[0]);
  edits->presence = per_row(t[1], &numbers[1]);
  edits->frequency = per_row(t[2], &numbers[2]);
  edits->counts = rows<int32_t>(t[3]);
  edits->prompt = rows<uint8_t>(t[4]);
  edits->seen_ids = rows<int32_t>(t[5]);
  edits->seen_counts = rows<int32_t>(t[6]);
  edits->seen_n = indices(t, 7);
  edits->unseen = rows<uint8_t>(t[8]);
  edits->bias = rows<float>(t[9]);
  edits->bias_ids = rows<int64_t>(t[10]);
  edits->bias_values = rows<float>(t[11]);
  edits->bias_n = item<int64_t>(t, 12);
  edits->allowed = rows<uint8_t>(t[13]);
  edits->allowed_bits = rows<uint8_t>(t[14]);
}

// What a call of sample points to where a parameter is a number; it must outlive the call.
struct SamplingNumbers {
  double reals[3], edit_reals[3];
  int64_t integers[3];
  LogitEdits edits{};
};

// What comes in of a call of sample.
SamplingParams sampling_params(uintptr_t logits, int64_t stride_batch, int64_t batch, int64_t vocab, int dtype,
                               const py::object& temperature, const py::object& top_k, const py::object& top_p,
                               const py::object& min_p, const py::object& seeds, const py::object& positions,
                               const py::object& edits, SamplingNumbers* numbers) {
  SamplingParams p{};
  p.logits = pointer<const void>(logits);
  p.stride_batch = stride_batch;
  p.batch = batch;
  p.vocab = vocab;
  p.dtype = static_cast<DType>(dtype);
  p.temperature = per_row(temperature, &numbers->reals[0]);
  p.top_p = per_row(top_p, &numbers->reals[1]);
  p.min_p = per_row(min_p, &numbers->reals[2]);
  p.top_k = per_row(top_k, &numbers->integers[0]);
  p.seeds = per_row(seeds, &numbers->integers[1]);
  p.positions = per_row(positions, &numbers->integers[2]);
  if (!edits.is_none()) {
    fill_edits(edits, numbers->edit_reals, &numbers->edits);
    p.edits = &numbers->edits;
  }
  return p;
}

}  // namespace
}  // namespace fastattn
