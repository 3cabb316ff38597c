// Rotary embedding (Su et al., arXiv 2104.09864) of q and of the new keys, and their append to the cache, in place.
#pragma once

#include "cuda/sequence.cuh"
#include "rng.h"  // FASTATTN_HOST_DEVICE

namespace fastattn {
namespace {

template <class T>
FASTATTN_DEVICE T narrow_to(float x) {
  if constexpr (sizeof(T) == sizeof x)
    return x;
  else
    return T{static_cast<uint16_t>(pack2<T>(x, 0.0f))};
}

// Dimension d of a row, turned by the angles of `position`; dimensions past 2 * half_rotary pass unchanged.
template <class T>
FASTATTN_DEVICE T turned(const KVAppendParams& p, const T* row, int d, int64_t position) {
  const int half = static_cast<int>(p.half_rotary);
  const T own = load_global(row + d);
  if (!p.rotary_cos || d >= 2 * half) return own;
  const int pair = p.interleaved ? d / 2 : d % half;
  const bool second = p.interleaved ? d % 2 : d >= half;
  const int step = p.interleaved ? 1 : half;
  const float cos = load_global(p.rotary_cos + position * half + pair);
  const float sin = load_global(p.rotary_sin + position * half + pair);
  const float partner = to_float(load_global(row + (second ? d - step : d + step)));
  return narrow_to<T>(second ? partner * sin + to_float(own) * cos : to_float(own) * cos - partner * sin);
}

// Where token `token` of the sequence's cache lies, its first head.
template <class T>
FASTATTN_DEVICE T* cache_row(const TensorView& view, const KVParams& kv, int batch, int row, int token, int head) {
  if (!kv.block_table) return row_pointer<T>(view, row, token, head);
  const int page_size = static_cast<int>(kv.page_size), page = token / page_size;
  return row_pointer<T>(view, load_global(kv.block_table + batch * kv.stride_block_table + page),
                        token - page * page_size, head);
}

// The rows of a call: (batch, seqlen_q, nheads) of q where it turns, then (batch, seqlen_new, nheads_k) of k and of v.
FASTATTN_HOST_DEVICE inline int64_t append_query_rows(const KVAppendParams& p) {
  return p.rotary_cos ? p.batch * p.seqlen_q * p.nheads : 0;
}
FASTATTN_HOST_DEVICE inline int64_t append_key_rows(const KVAppendParams& p) {
  return p.batch * p.seqlen_new * p.nheads_k;
}

// A warp for one head of one token.
template <class T>
FASTATTN_KERNEL(kThreads, 8)
append_rows(FASTATTN_GRID_CONSTANT KVAppendParams p) {
  const int lane = thread_index() % 32;
  int64_t place = static_cast<int64_t>(block_index_x()) * kWarps + thread_index() / 32;
  const bool is_query = place < append_query_rows(p);
  if (!is_query) place -= append_query_rows(p);
  const bool is_value = !is_query && place >= append_key_rows(p);
  if (is_value) place -= append_key_rows(p);
  if (is_value && place >= append_key_rows(p)) return;

  const int heads = static_cast<int>(is_query ? p.nheads : p.nheads_k);
  const int tokens = static_cast<int>(is_query ? p.seqlen_q : p.seqlen_new);
  const int head = static_cast<int>(place % heads), row = static_cast<int>(place / heads % tokens);
  const int batch = static_cast<int>(place / heads / tokens);
  const KVParams& kv = p.kv;
  const int end = load_global(kv.seqlens + batch), first = kv.leftpad ? load_global(kv.leftpad + batch) : 0;
  const int cache = kv.batch_idx ? load_global(kv.batch_idx + batch) : batch;
  const int64_t position = end - first + (is_query && !p.q_per_row ? 0 : row);
  const TensorView& source = is_query ? p.q : is_value ? p.v : p.k;
  const T* from = row_pointer<const T>(source, batch, row, head);
  T* to = is_query ? row_pointer<T>(p.q_out, batch, row, head)
                   : cache_row<T>(is_value ? kv.v : kv.k, kv, batch, cache, end + row, head);
  const int dims = static_cast<int>(is_value ? p.headdim_v : p.headdim);
  for (int d = lane; d < dims; d += 32)
    store_global(to + d, is_value ? load_global(from + d) : turned(p, from, d, position));
}

}  // namespace
}  // namespace fastattn
