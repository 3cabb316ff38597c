// Fused attention for a few rows (one query and its GQA group): bound by reading K and V once.
//
// Keys fill the lanes for the scores: squares of kLanes keys by kLanes dimensions are transposed in registers, once for
// all rows. Dimensions fill the lanes for the values. Nothing is packed, and the arithmetic's order is that of
// attention_common.h. Heads that lie next to each other in the cache are served together, a granule of tokens at a
// time, so that memory is read in the order in which it lies.
#pragma once

#include "cpu/attention_common.h"

namespace fastattn {
namespace {

// Fetches a granule of rows line by line, in the order in which they lie, while another granule is at work.
class Prefetch {
 public:
  // `rows` starts of rows of `bytes` bytes.
  template <class T>
  Prefetch(const T* const* rows, int n, int64_t bytes)
      : rows_(reinterpret_cast<const char* const*>(rows)), end_(rows_ + n), bytes_(bytes) {}

  void lines(int n) {
    for (; n > 0 && rows_ != end_; --n) {
      __builtin_prefetch(*rows_ + at_, 0, kIntoL2);
      at_ += kLine;
      if (at_ >= bytes_) {
        at_ = 0;
        ++rows_;
      }
    }
  }

 private:
  static constexpr int kIntoL2 = 2;
  static constexpr int64_t kLine = 64;
  const char* const* rows_;
  const char* const* end_;
  int64_t bytes_, at_ = 0;
};

template <class Vec, class T>
class DecodeRows {
 public:
  using Real = typename Vec::Real;
  static constexpr int kMaxRows = 8;       // of one head
  static constexpr int kMaxAllRows = 128;  // of all heads of an item: their scores stay in L1

  static int64_t reals(const AttentionParams& p, int64_t rows, int64_t heads) {
    return rows * heads * (round_up(p.headdim, Vec::kLanes) + kBlockK) + rows * kGranule +
           ScoreModifiers<Vec>::reals(p, rows);
  }

  // All rows of some heads.
  DecodeRows(const AttentionParams& p, const Sequence& sequence, const WorkItem& item, Real* memory)
      : p_(p),
        sequence_(sequence),
        visibility_(p, sequence),
        item_(item),
        heads_(item.heads),
        rows_(item.rows),
        ldq_(round_up(p.headdim, Vec::kLanes)),
        modified_(p.softcap > 0 || p.bias.data || p.alibi_slopes || p.mask.data),
        q_(memory),
        s_(q_ + rows_ * heads_ * ldq_),
        chain_(s_ + rows_ * heads_ * kBlockK),
        modifiers_(chain_ + rows_ * kGranule) {
    visit_storage<Real>(p.dtype, [&](auto tag) { load_queries<typename decltype(tag)::type>(); });
  }

  // Attend keys [begin, end), of which begin starts a block: the state is overwritten, row-major, head after head.
  void attend(int64_t begin, int64_t end, const SoftmaxState<Real>& state) {
    state.clear(heads_ * rows_);
    end = at_most(end, visibility_.end(rows_ - 1));
    begin = at_least(begin, visibility_.begin(0) / kBlockK * kBlockK);
    for (int64_t key = begin; key < end; key += kBlockK) {
      const int keys = static_cast<int>(at_most(kBlockK, end - key));
      const Granules k(p_.kv.k, p_.kv, sequence_.keys, item_.head_k, key, keys),
          v(p_.kv.v, p_.kv, sequence_.keys, item_.head_k, key, keys);
      const int next_keys = static_cast<int>(at_least(0, at_most(kGranule, end - key - kBlockK)));
      const Granules next(p_.kv.k, p_.kv, sequence_.keys, item_.head_k, key + kBlockK, next_keys);
      const int64_t k_bytes = ((heads_ - 1) * p_.kv.k.stride_head + p_.headdim) * static_cast<int64_t>(sizeof(T));
      const int64_t v_bytes = ((heads_ - 1) * p_.kv.v.stride_head + p_.headdim_v) * static_cast<int64_t>(sizeof(T));
      for (int from = 0; from < keys; from += kGranule) {
        const bool last = from + kGranule >= keys;
        Prefetch ahead = last ? v.prefetch(0, v_bytes) : k.prefetch(from + kGranule, k_bytes);
        for (int64_t h = 0; h < heads_; ++h) scores(h, key, k, from, &ahead);
      }
      Real scale[kMaxAllRows];
      for (int64_t h = 0; h < heads_; ++h) {
        if (modified_) modify(h, key, keys);
        for (int64_t r = 0; r < rows_; ++r) scale[h * rows_ + r] = softmax_step(h, r, key, state);
      }
      for (int from = 0; from < keys; from += kGranule) {
        const bool last = from + kGranule >= keys;
        Prefetch ahead = last ? next.prefetch(0, k_bytes) : v.prefetch(from + kGranule, v_bytes);
        for (int64_t h = 0; h < heads_; ++h)
          values(h, key, v, from, from == 0 ? scale + h * rows_ : nullptr, state, &ahead);
      }
    }
  }

 private:
  static constexpr int kLanes = Vec::kLanes;
  static constexpr int kGroups = kBlockK >= 2 * kLanes ? 2 : 1;  // key vectors in flight: one alone is one long chain
  static constexpr int kGranule = kGroups * kLanes;              // keys
  static constexpr int kVecBytes = kLanes * static_cast<int>(sizeof(T));
  static constexpr int kLinesPerVec = kVecBytes > 64 ? kVecBytes / 64 : 1;  // so that a granule fetches a granule
  static constexpr int kLinesPerSquare = kLanes * kVecBytes > 64 ? kLanes * kVecBytes / 64 : 1;
  static constexpr int kValueVecs = Vec::kTileCols / 2 > 0 ? Vec::kTileCols / 2 : 1;  // by 4 rows of accumulators

  // Where the rows of a block's keys are, in the first head; keys past the end repeat the last one.
  struct Granules {
    const T* row[kBlockK];
    int keys;
    KeyRows<const float> scales;

    Granules(const TensorView& view, const KVParams& kv, const KeySpan& span, int64_t head, int64_t key, int n)
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

  template <class Q>
  void load_queries() {
    const Vec scale = Vec::set1(static_cast<Real>(p_.softmax_scale * kLog2e));
    for (int64_t h = 0; h < heads_; ++h)
      for (int64_t r = 0; r < rows_; ++r) {
        const Q* row = sequence_.query<const Q>(p_.q, visibility_.query(r), visibility_.head(item_.block(h), r));
        for (int64_t d = 0; d < ldq_; d += kLanes)
          (load_scaled<Vec>(row + d, static_cast<int>(p_.headdim - d), nullptr) * scale)
              .store(q_ + (h * rows_ + r) * ldq_ + d);
      }
  }

  // The scale of int8 for key `i` of a block.
  static const float* scale_of(const Granules& x, const TensorView& scale, int64_t h, int64_t key, int i) {
    if constexpr (sizeof(T) == 1) return x.scales[key + (i < x.keys ? i : x.keys - 1)] + h * scale.stride_head;
    return nullptr;
  }

  // s[r][key] = q[r] . k[key] for a granule of keys of head h.
  void scores(int64_t h, int64_t key, const Granules& k, int from, Prefetch* ahead) {
    for (int64_t d = 0; d < p_.headdim; d += kScoreChain) {
      Real* sums = d == 0 ? s_ + h * rows_ * kBlockK + from : chain_;
      const int64_t ld = d == 0 ? kBlockK : kGranule;
      for (int64_t r = 0; r < rows_; ++r)
        for (int i = 0; i < kGranule; i += kLanes) Vec::zero().store(sums + r * ld + i);
      score_chain(h, key, k, from, d, at_most(p_.headdim, d + kScoreChain), sums, ld, ahead);
      if (d == 0) continue;
      for (int64_t r = 0; r < rows_; ++r)
        for (int i = 0; i < kGranule; i += kLanes) {
          Real* at = s_ + (h * rows_ + r) * kBlockK + from + i;
          (Vec::load(at) + Vec::load(chain_ + r * kGranule + i)).store(at);
        }
    }
  }

  // sums[r][key] += the part of the score from dimensions [begin, end).
  void score_chain(int64_t h, int64_t first_key, const Granules& k, int from, int64_t begin, int64_t end, Real* sums,
                   int64_t ld, Prefetch* ahead) {
    const int64_t head = h * p_.kv.k.stride_head;
    for (int64_t d = begin; d < end; d += kLanes)
      for (int key = 0; key < kGranule; key += kLanes) {
        if (from + key >= k.keys) break;
        const T* const* rows = k.row + from + key;
        const int dims = static_cast<int>(at_most(kLanes, end - d));
        Vec square[kLanes];
        if (dims == kLanes) {
#pragma GCC unroll 16
          for (int i = 0; i < kLanes; ++i)
            square[i] =
                load_scaled<Vec>(rows[i] + head + d, kLanes, scale_of(k, p_.kv.k_scale, h, first_key, from + key + i));
          ahead->lines(kLinesPerSquare);
        } else {
          for (int i = 0; i < kLanes; ++i)
            square[i] =
                load_scaled<Vec>(rows[i] + head + d, dims, scale_of(k, p_.kv.k_scale, h, first_key, from + key + i));
        }
        Vec::transpose(square);
        const Real* q = q_ + h * rows_ * ldq_ + d;
        for (int64_t r = 0; r < rows_; ++r, q += ldq_) {
          Real* at = sums + r * ld + key;
          Vec sum = Vec::load(at);
#pragma GCC unroll 16
          for (int i = 0; i < kLanes; ++i) sum = fma(square[i], Vec::set1(q[i]), sum);
          sum.store(at);
        }
      }
  }

  void modify(int64_t h, int64_t key, int keys) {
    const ScoreModifiers<Vec> modifiers(p_, sequence_, item_.block(h), modifiers_);
    for (int64_t r = 0; r < rows_; ++r) modifiers.apply_row(s_ + (h * rows_ + r) * kBlockK, r, key, keys);
  }

  // Scores to probabilities, in place; returns what the row's o must be multiplied by.
  Real softmax_step(int64_t h, int64_t r, int64_t key, const SoftmaxState<Real>& state) {
    const int64_t row = h * rows_ + r;
    Real* s = s_ + row * kBlockK;
    const int64_t end = at_most(kBlockK, at_least(0, visibility_.end(r) - key));
    for (int64_t i = 0; i < at_most(kBlockK, visibility_.begin(r) - key); ++i) s[i] = -kInfinity;
    for (int64_t i = end; i < kBlockK; ++i) s[i] = -kInfinity;
    Vec top = Vec::load(s);
    for (int i = kLanes; i < kBlockK; i += kLanes) top = max(top, Vec::load(s + i));
    const Real block_max = reduce_max(top), running = state.max[row];
    const Real next = running > block_max ? running : block_max;
    const Real scale = exp2_of_difference<Vec>(running, next);
    const Vec shift = Vec::set1(next == -kInfinity ? 0 : next);
    for (int i = 0; i < kBlockK; i += kLanes) exp2(Vec::load(s + i) - shift).store(s + i);
    Real sum = state.sum[row] * scale;
    for (int i = 0; i < kBlockK; ++i) sum += s[i];
    state.max[row] = next;
    state.sum[row] = sum;
    return scale;
  }

  // o = o * scale + p v for a granule of keys of head h; without scale o = o + p v.
  void values(int64_t h, int64_t key, const Granules& v, int from, const Real* scale, const SoftmaxState<Real>& state,
              Prefetch* ahead) {
    int64_t r = 0;
    for (; r + 4 <= rows_; r += 4) value_rows<4>(h, r, key, v, from, scale, state, ahead);
    switch (rows_ - r) {
      case 3: return value_rows<3>(h, r, key, v, from, scale, state, ahead);
      case 2: return value_rows<2>(h, r, key, v, from, scale, state, ahead);
      case 1: return value_rows<1>(h, r, key, v, from, scale, state, ahead);
    }
  }

  template <int kRows>
  void value_rows(int64_t h, int64_t r, int64_t key, const Granules& v, int from, const Real* scale,
                  const SoftmaxState<Real>& state, Prefetch* ahead) {
    Real* o = state.o + (h * rows_ + r) * state.ldo;
    const Real* p = s_ + (h * rows_ + r) * kBlockK;
    int64_t d = 0;
    for (; d + kValueVecs * kLanes <= p_.headdim_v; d += kValueVecs * kLanes)
      value_tile<kRows, kValueVecs>(h, key, v, from, d, kLanes, scale ? scale + r : nullptr, p, o + d, state.ldo,
                                    ahead);
    for (; d < p_.headdim_v; d += kLanes)
      value_tile<kRows, 1>(h, key, v, from, d, static_cast<int>(at_most(kLanes, p_.headdim_v - d)),
                           scale ? scale + r : nullptr, p, o + d, state.ldo, ahead);
  }

  template <int kRows, int kVecs>
  inline __attribute__((always_inline)) void value_tile(int64_t h, int64_t first_key, const Granules& v, int from,
                                                        int64_t d, int dims, const Real* scale, const Real* p, Real* o,
                                                        int64_t ldo, Prefetch* ahead) {
    const int64_t at = h * p_.kv.v.stride_head + d;
    const int end = static_cast<int>(at_most(v.keys, from + kGranule));
    Vec sum[kRows][kVecs];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) {
        sum[i][j] = Vec::load(o + i * ldo + j * kLanes);
        if (scale) sum[i][j] = sum[i][j] * Vec::set1(scale[i]);
      }
    for (int key = from; key < end; ++key) {
      const float* int8_scale = scale_of(v, p_.kv.v_scale, h, first_key, key);
      Vec row[kVecs];
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) row[j] = load_scaled<Vec>(v.row[key] + at + j * kLanes, dims, int8_scale);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < kVecs; ++j) sum[i][j] = fma(Vec::set1(p[i * kBlockK + key]), row[j], sum[i][j]);
      ahead->lines(kLinesPerVec * kVecs);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) sum[i][j].store(o + i * ldo + j * kLanes);
  }

  const AttentionParams& p_;
  const Sequence& sequence_;
  const Visibility visibility_;
  const WorkItem item_;
  const int64_t heads_, rows_, ldq_;
  const bool modified_;
  Real* const q_;          // (heads, rows, ldq), times softmax_scale * log2(e)
  Real* const s_;          // (heads, rows, kBlockK)
  Real* const chain_;      // (rows, kGranule), for the chain at work
  Real* const modifiers_;  // ScoreModifiers' own
};

}  // namespace
}  // namespace fastattn
