// Rotary embedding (Su et al., arXiv 2104.09864) of q and of the new keys, and their append to the cache.
#pragma once

#include "cpu/attention_common.h"
#include "cpu/parallel.h"
#include "dispatch.h"

namespace fastattn {
namespace {

constexpr int64_t kMaxHeaddim = 512;

// Converts on the way where the two types differ. 16-bit to 16-bit goes through fp32, which changes no bits.
template <class Vec, class From, class To>
void copy_row(const From* source, To* out, int64_t dim) {
  int64_t d = 0;
  for (; d + Vec::kLanes <= dim; d += Vec::kLanes) Vec::load(source + d).store(out + d);
  if (d < dim) Vec::load_n(source + d, static_cast<int>(dim - d)).store_n(out + d, static_cast<int>(dim - d));
}

// One head of one token, turned by the angles of `position`; dimensions past 2 * half_rotary pass unchanged.
template <class Vec, class T>
void rotate_row(const KVAppendParams& p, int64_t position, const T* source, T* out) {
  float row[kMaxHeaddim], turned[kMaxHeaddim];
  copy_row<Vec>(source, row, p.headdim);
  const float* cos = p.rotary_cos + position * p.half_rotary;
  const float* sin = p.rotary_sin + position * p.half_rotary;
  const int64_t half = p.half_rotary, step = p.interleaved ? 2 : 1, partner = p.interleaved ? 1 : half;
  for (int64_t i = 0; i < half; ++i) {
    const float a = row[i * step], b = row[i * step + partner];
    turned[i * step] = a * cos[i] - b * sin[i];
    turned[i * step + partner] = a * sin[i] + b * cos[i];
  }
  for (int64_t d = 2 * half; d < p.headdim; ++d) turned[d] = row[d];
  copy_row<Vec>(turned, out, p.headdim);
}

template <class Vec, class T>
void append_kv_rows(const KVAppendParams& p) {
  const bool rotary = p.rotary_cos != nullptr;
  // One item is one token: its queries if they turn, its keys and values if they are new.
  const int64_t rows_q = rotary ? p.seqlen_q : 0;
  const int64_t rows = rows_q > p.seqlen_new ? rows_q : p.seqlen_new;
  const bool small = p.batch * rows * (p.nheads + 2 * p.nheads_k) * p.headdim < int64_t{1} << 17;
  parallel_for(p.batch * rows, small ? 1 : p.nthreads, [&](int64_t item) {
    const int64_t batch = item / rows, row = item % rows, start = p.cache_seqlens[batch];
    if (row < rows_q)
      for (int64_t head = 0; head < p.nheads; ++head)
        rotate_row<Vec, T>(p, start + (p.q_per_row ? row : 0), row_pointer<T>(p.q, batch, row, head),
                           const_cast<T*>(row_pointer<T>(p.q_out, batch, row, head)));
    if (row < p.seqlen_new)
      for (int64_t head = 0; head < p.nheads_k; ++head) {
        const T* k = row_pointer<T>(p.k, batch, row, head);
        T* k_out = const_cast<T*>(row_pointer<T>(p.k_cache, batch, start + row, head));
        rotary ? rotate_row<Vec, T>(p, start + row, k, k_out) : copy_row<Vec>(k, k_out, p.headdim);
        copy_row<Vec>(row_pointer<T>(p.v, batch, row, head),
                      const_cast<T*>(row_pointer<T>(p.v_cache, batch, start + row, head)), p.headdim_v);
      }
  });
}

template <class Vec>
void append_kv(const KVAppendParams& p) {
  if (p.batch == 0) return;
  visit_dtype(p.dtype, [&](auto tag) { append_kv_rows<Vec, typename decltype(tag)::type>(p); });
}

}  // namespace
}  // namespace fastattn
