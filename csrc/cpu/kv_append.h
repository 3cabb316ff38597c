// Rotary embedding (Su et al., arXiv 2104.09864) of q and of the new keys, and their append to the cache.
#pragma once

#include "cpu/parallel.h"
#include "cpu/sequence.h"
#include "dispatch.h"

namespace fastattn {
namespace {

// Converts on the way where the two types differ. 16-bit to 16-bit goes through fp32, which changes no bits.
template <class Vec, class From, class To>
void copy_row(const From* source, To* out, int64_t dim) {
  int64_t d = 0;
  for (; d + Vec::kLanes <= dim; d += Vec::kLanes) Vec::load(source + d).store(out + d);
  if (d < dim) Vec::load_n(source + d, static_cast<int>(dim - d)).store_n(out + d, static_cast<int>(dim - d));
}

// One row to the cache's type; int8 counts in steps of the row's largest element / 127.
template <class Vec, class Real, class To>
void store_row(const Real* source, To* out, float* scale, int64_t dim) {
  if constexpr (sizeof(To) == 1) {
    float top = 0, wrong = 0;  // NaN as soon as an element is not finite: so is the scale, and then what is attended
    for (int64_t d = 0; d < dim; ++d) {
      top = source[d] > top ? source[d] : -source[d] > top ? -source[d] : top;
      wrong += source[d] * 0;
    }
    const bool usable = wrong == 0 && top > 1e-36f;  // 127 / top must be finite
    *scale = usable ? top / 127 : wrong;
    const float steps = usable ? 127 / top : 0;
    for (int64_t d = 0; d < dim; ++d) out[d] = usable ? static_cast<int8_t>(__builtin_rintf(source[d] * steps)) : 0;
  } else {
    copy_row<Vec>(source, out, dim);
  }
}

// One head of one token, turned by the angles of `position`; dimensions past 2 * half_rotary pass unchanged.
template <class Real>
void rotate(const KVAppendParams& p, int64_t position, const Real* row, Real* turned) {
  const float* cos = p.rotary_cos + position * p.half_rotary;
  const float* sin = p.rotary_sin + position * p.half_rotary;
  const int64_t half = p.half_rotary, step = p.interleaved ? 2 : 1, partner = p.interleaved ? 1 : half;
  for (int64_t i = 0; i < half; ++i) {
    const Real a = row[i * step], b = row[i * step + partner];
    turned[i * step] = a * cos[i] - b * sin[i];
    turned[i * step + partner] = a * sin[i] + b * cos[i];
  }
  for (int64_t d = 2 * half; d < p.headdim; ++d) turned[d] = row[d];
}

// T is what q and the new rows are, Cache what the cache is.
template <class Vec, class T, class Cache>
class KVAppend {
 public:
  using Real = typename Vec::Real;

  explicit KVAppend(const KVAppendParams& p) : p_(p) {}

  // One item is one token: its queries if they turn, its keys and values if they are new.
  void run() const {
    const int64_t rows_q = p_.rotary_cos ? p_.seqlen_q : 0, rows = at_least(rows_q, p_.seqlen_new);
    const bool small = p_.batch * rows * (p_.nheads + 2 * p_.nheads_k) * p_.headdim < int64_t{1} << 17;
    parallel_for(p_.batch * rows, small ? 1 : p_.nthreads, [&](int64_t item) {
      const int64_t batch = item / rows, row = item % rows;
      const KeySpan span(p_.kv, batch);
      if (row < rows_q) turn_queries(batch, row, span.length + (p_.q_per_row ? row : 0));
      if (row < p_.seqlen_new) append(batch, row, span);
    });
  }

 private:
  void turn_queries(int64_t batch, int64_t row, int64_t position) const {
    for (int64_t head = 0; head < p_.nheads; ++head) {
      Real line[kMaxHeaddim], turned[kMaxHeaddim];
      copy_row<Vec>(row_pointer<const T>(p_.q, batch, row, head), line, p_.headdim);
      rotate(p_, position, line, turned);
      copy_row<Vec>(turned, row_pointer<T>(p_.q_out, batch, row, head), p_.headdim);
    }
  }

  void append(int64_t batch, int64_t row, const KeySpan& span) const {
    const int64_t key = span.length + row;
    for (int64_t head = 0; head < p_.nheads_k; ++head) {
      Real line[kMaxHeaddim], turned[kMaxHeaddim];
      copy_row<Vec>(row_pointer<const T>(p_.k, batch, row, head), line, p_.headdim);
      if (p_.rotary_cos) rotate(p_, key, line, turned);
      write(p_.kv.k, p_.kv.k_scale, span, key, head, p_.rotary_cos ? turned : line, p_.headdim);
      copy_row<Vec>(row_pointer<const T>(p_.v, batch, row, head), line, p_.headdim_v);
      write(p_.kv.v, p_.kv.v_scale, span, key, head, line, p_.headdim_v);
    }
  }

  void write(const TensorView& cache, const TensorView& scale, const KeySpan& span, int64_t key, int64_t head,
             const Real* row, int64_t dim) const {
    float* step = sizeof(Cache) == 1 ? KeyRows<float>(scale, p_.kv, span, head)[key] : nullptr;
    store_row<Vec>(row, KeyRows<Cache>(cache, p_.kv, span, head)[key], step, dim);
  }

  const KVAppendParams& p_;
};

template <class Vec, class VecDouble>
void append_kv(const KVAppendParams& p) {
  if (p.batch == 0) return;
  if (p.dtype == DType::f64) return KVAppend<VecDouble, double, double>(p).run();
  visit_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    visit_kv_storage<float>(p.kv.dtype, [&](auto cache) { KVAppend<Vec, T, typename decltype(cache)::type>(p).run(); });
  });
}

}  // namespace
}  // namespace fastattn
