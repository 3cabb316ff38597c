// Blocks of keys or values as attention reads them: packed into a tile where many rows share it, in place where few do.
#pragma once

#include <cstdint>

#include "cpu/attention_common.h"
#include "cpu/prefetch.h"

namespace fastattn {
namespace {

// One head of k or v, with the scales that int8 comes with.
struct KVHead {
  const TensorView& view;
  const TensorView& scale;
  const KVParams& kv;
  const KeySpan& span;
  int64_t head;
  int64_t dim;
};

// Keys [first_key, first_key + keys) of (keys, dim) rows, widened; rows up to a whole number of kBlockK are zero.
template <class Vec, class Real = typename Vec::Real>
inline void pack_block(const KVHead& x, int64_t first_key, int keys, Real* tile, int64_t ld) {
  visit_kv_storage<Real>(x.kv.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const KeyRows<const T> rows(x.view, x.kv, x.span, x.head);
    const KeyRows<const float> scales(x.scale, x.kv, x.span, x.head);
    for (int key = 0; key < keys; ++key) {
      const T* source = rows[first_key + key];
      const float* scale = sizeof(T) == 1 ? scales[first_key + key] : nullptr;
      Real* row = tile + key * ld;
      for (int64_t d = 0; d < x.dim; d += Vec::kLanes)
        load_scaled<Vec>(source + d, static_cast<int>(x.dim - d), scale).store(row + d);
    }
  });
  for (int64_t i = keys * ld; i < kBlockK * ld; i += Vec::kLanes) Vec::zero().store(tile + i);
}

// The same in words of two, as bf16 dot products take them.
template <class Vec>
inline void pack_words(const KVHead& x, int64_t first_key, int keys, float* tile, int64_t ld) {
  const KeyRows<const bf16_t> rows(x.view, x.kv, x.span, x.head);
  for (int key = 0; key < keys; ++key)
    for (int64_t d = 0; d < x.dim; d += 2 * Vec::kLanes)
      load_words<Vec>(rows[first_key + key] + d, x.dim - d).store(tile + key * ld + d / 2);
  for (int64_t i = keys * ld; i < kBlockK * ld; i += Vec::kLanes) Vec::zero().store(tile + i);
}

// Values transposed, (dim, kBlockK / 2) words of two keys: squares of kLanes pairs of keys by kLanes dimensions.
template <class Vec>
inline void pack_word_columns(const KVHead& x, int64_t first_key, int keys, float* tile, int64_t ld) {
  const KeyRows<const bf16_t> rows(x.view, x.kv, x.span, x.head);
  for (int pair = 0; pair < kBlockK / 2; pair += Vec::kLanes)
    for (int64_t d = 0; d < x.dim; d += Vec::kLanes) {
      const int dims = static_cast<int>(at_most(Vec::kLanes, x.dim - d));
      const auto values = [&](int key) {
        return key < keys ? load_scaled<Vec>(rows[first_key + key] + d, dims, nullptr) : Vec::zero();
      };
      Vec square[Vec::kLanes];
      for (int i = 0; i < Vec::kLanes; ++i) square[i] = pair_words(values(2 * (pair + i)), values(2 * (pair + i) + 1));
      Vec::transpose(square);
      for (int i = 0; i < Vec::kLanes; ++i) square[i].store(tile + (d + i) * ld + pair);
    }
}

// Where the rows of a block's keys are, in the first head; keys past the end repeat the last one.
template <class T, int kGranule>
struct KeyGranules {
  const T* row[kBlockK];
  int keys;
  KeyRows<const float> scales;

  KeyGranules(const TensorView& view, const KVParams& kv, const KeySpan& span, int64_t head, int64_t key, int n)
      : keys(n), scales(&view == &kv.k ? kv.k_scale : kv.v_scale, kv, span, head) {
    if (n == 0) return;
    const KeyRows<const T> rows(view, kv, span, head);
    if (rows.are_strided(key, key + n - 1)) {
      const T* first = rows[key];
      for (int i = 0; i < n; ++i) row[i] = first + i * rows.stride();
    } else {
      for (int i = 0; i < n; ++i) row[i] = rows[key + i];
    }
    for (int i = n; i < round_up(n, kGranule); ++i) row[i] = row[n - 1];
  }

  Prefetch prefetch(int from, int64_t bytes) const {
    return Prefetch(row + from, static_cast<int>(at_least(0, at_most(kGranule, keys - from))), bytes);
  }
};

}  // namespace
}  // namespace fastattn
