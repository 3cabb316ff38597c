// What every step of sampling shares: a row of logits that can be searched without reading it again, the order of its
// tokens, and the lists of the tokens that are still in the running.
#pragma once

#include <cstdint>
#include <cstring>

#include "params.h"

namespace fastattn {
namespace {

constexpr float kLowest = -__FLT_MAX__;  // every finite logit is >= this
constexpr float kMinusInfinity = -__builtin_inff();

// Ascending unsigned integers for ascending floats. Adding 0.0f beforehand makes the two zeros one.
inline uint32_t sort_key(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}

inline float from_sort_key(uint32_t key) {
  const uint32_t bits = key & 0x80000000u ? key ^ 0x80000000u : ~key;
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// The total order is: larger logit first, then lower id. Every filter keeps a prefix of it, and so do all together.
struct Cut {
  float value = kLowest;        // the last logit kept,
  int32_t last_id = INT32_MAX;  // and the last id kept among those equal to it

  bool keeps(float x, int32_t id) const { return x > value || (x == value && id <= last_id); }
};

// Some tokens of a row by ascending id, and room for a working copy. The arrays hold kLanes more than the row.
struct Candidates {
  float* values;
  int32_t* ids;
  float* work;
  int64_t n = 0;

  void keep(const Cut& cut) {
    int64_t kept = 0;
    for (int64_t i = 0; i < n; ++i) {
      const float x = values[i];
      const int32_t id = ids[i];
      values[kept] = x;
      ids[kept] = id;
      kept += cut.keeps(x, id);
    }
    n = kept;
  }
};

inline void store_minus_infinity(float* p) { *p = kMinusInfinity; }
inline void store_minus_infinity(bf16_t* p) { p->bits = 0xff80; }
inline void store_minus_infinity(f16_t* p) { p->bits = 0xfc00; }

// A row in chunks of kChunkVecs vectors, the last one padded with -inf. summarize() reads the row once and notes the
// maximum of each lane of each chunk: a sixteenth of the row, by which later passes find the chunks that matter.
template <class Vec, class T>
class Row {
 public:
  static constexpr int kChunkVecs = 16;
  static constexpr int kChunk = kChunkVecs * Vec::kLanes;

  static int64_t chunks_of(int64_t size) { return (size + kChunk - 1) / kChunk; }
  static int64_t maxima_of(int64_t size) { return chunks_of(size) * Vec::kLanes; }

  Row(const T* data, int64_t size, float* maxima) : data_(data), size_(size), whole_(size / kChunk), maxima_(maxima) {
    const int64_t left = size - whole_ * kChunk;
    memcpy(static_cast<void*>(tail_), data + whole_ * kChunk, static_cast<size_t>(left) * sizeof(T));
    for (int64_t i = left; i < kChunk; ++i) store_minus_infinity(tail_ + i);
  }

  int64_t size() const { return size_; }
  int64_t chunks() const { return chunks_of(size_); }
  const T* chunk(int64_t c) const { return c < whole_ ? data_ + c * kChunk : tail_; }
  const float* maxima() const { return maxima_; }

  // Fills the maxima; false if the row has a NaN.
  bool summarize() {
    auto nan = either_nan(Vec::zero(), Vec::zero());
    for (int64_t c = 0; c < chunks(); ++c) {
      const T* x = chunk(c);
      Vec even = Vec::load(x), odd = Vec::load(x + Vec::kLanes);
      nan = nan | either_nan(even, odd);
#pragma GCC unroll 8
      for (int i = 2; i < kChunkVecs; i += 2) {
        const Vec a = Vec::load(x + i * Vec::kLanes), b = Vec::load(x + (i + 1) * Vec::kLanes);
        nan = nan | either_nan(a, b);
        even = max(even, a);
        odd = max(odd, b);
      }
      (max(even, odd) + Vec::zero()).store(maxima_ + c * Vec::kLanes);  // -0 becomes +0
    }
    return !lane_bits(nan);
  }

  float maximum() const {
    Vec top = Vec::load(maxima_);
    for (int64_t c = 1; c < chunks(); ++c) top = max(top, Vec::load(maxima_ + c * Vec::kLanes));
    return reduce_max(top);
  }

  // visit(chunk pointer, first id) for the chunks that hold a logit >= bound(), in order; bound() may rise meanwhile.
  template <class Bound, class Visit>
  void visit_chunks(Bound&& bound, Visit&& visit) const {
    for (int64_t c = 0; c < chunks(); ++c)
      if (lane_bits(Vec::set1(bound()) <= Vec::load(maxima_ + c * Vec::kLanes)))
        visit(chunk(c), static_cast<int32_t>(c * kChunk));
  }

  // The lowest id whose logit is `value`, which must be the maximum.
  int32_t find_maximum(float value) const {
    int64_t c = 0;
    while (!lane_bits(Vec::set1(value) <= Vec::load(maxima_ + c * Vec::kLanes))) ++c;
    for (int i = 0;; ++i)
      if (const uint32_t hits = lane_bits(Vec::set1(value) <= Vec::load(chunk(c) + i * Vec::kLanes)))
        return static_cast<int32_t>(c * kChunk + i * Vec::kLanes + __builtin_ctz(hits));
  }

  // The tokens with logit >= bound, which is finite; or only the first of them, at least `enough`.
  void gather(float bound, Candidates* out, int64_t enough = INT64_MAX) const {
    const Vec least = Vec::set1(bound);
    int64_t n = 0;
    visit_chunks([&] { return bound; },
                 [&](const T* x, int32_t first_id) {
                   for (int i = 0; i < kChunk && n < enough; i += Vec::kLanes) {
                     const Vec v = Vec::load(x + i) + Vec::zero();  // -0 becomes +0: equal logits have equal bits
                     const auto chosen = least <= v;
                     if (lane_bits(chosen)) n += Vec::compress(chosen, v, first_id + i, out->values + n, out->ids + n);
                   }
                 });
    out->n = n;
  }

 private:
  const T* data_;
  int64_t size_, whole_;
  float* maxima_;
  T tail_[kChunk];
};

}  // namespace
}  // namespace fastattn
