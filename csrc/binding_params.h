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

// dlse and delta have lse's strides; dlse 0 = none.
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

}  // namespace
}  // namespace fastattn
