// Fused attention for a few rows (one query and its GQA group): bound by reading K and V once.
//
// Keys fill the lanes for the scores: squares of kLanes keys by kLanes dimensions are transposed in registers, once for
// all rows. Dimensions fill the lanes for the values. Nothing is packed, and the arithmetic's order is that of
// attention_common.h, or where tile registers serve many rows (kLikeTiles) that of Dot::multiply. Heads that lie next
// to each other in the cache are served together, a granule of tokens at a time, so that memory is read in the order in
// which it lies.
#pragma once

#include <cstring>

#include "cpu/attention_common.h"
#include "cpu/key_blocks.h"

namespace fastattn {
namespace {

template <class T>
struct IsBf16 {
  static constexpr bool value = false;
};
template <>
struct IsBf16<bf16_t> {
  static constexpr bool value = true;
};

template <class Vec, class T, class Dot>
class DecodeRows {
 public:
  using Real = typename Vec::Real;
  static constexpr bool kLooksAhead = false;
  static constexpr int kMaxRows = 8;       // of one head
  static constexpr int kPassRows = 4;      // whose sums stay in registers
  static constexpr int kMaxAllRows = 128;  // of all heads of an item: their scores stay in L1

  static int64_t reals(const AttentionParams& p, int64_t rows, int64_t heads) {
    return rows * heads * (round_up(p.headdim, Vec::kLanes) + kBlockK) + ScoreModifiers<Vec>::reals(p, rows);
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
        modifiers_(s_ + rows_ * heads_ * kBlockK) {
    visit_storage<Real>(p.dtype, [&](auto tag) {
      using Q = typename decltype(tag)::type;
      const Vec scale = kHasDot ? Vec::set1(1) : score_scale();
      if constexpr (kHasDot && !kLikeTiles && IsBf16<Q>::value)
        load_queries<Q>(2, [](const Q* row, int64_t n) { return load_words<Vec>(row, n); });
      else
        load_queries<Q>(1, [scale](const Q* row, int64_t n) {
          return load_scaled<Vec>(row, static_cast<int>(at_most(kLanes, n)), nullptr) * scale;
        });
    });
  }

  // Attend keys [begin, end), of which begin starts a block: the state is overwritten, row-major, head after head.
  void attend(int64_t begin, int64_t end, const SoftmaxState<Real>& state) {
    [[maybe_unused]] const typename Dot::Rounding rounding;
    state.clear(heads_ * rows_);
    end = at_most(end, visibility_.end(rows_ - 1));
    begin = at_least(begin, visibility_.begin(0) / kBlockK * kBlockK);
    for (int64_t key = begin; key < end; key += kBlockK) {
      const int keys = static_cast<int>(at_most(kBlockK, end - key));
      const Granules k(p_.kv.k, p_.kv, sequence_.keys, item_.head_k, key, keys),
          v(p_.kv.v, p_.kv, sequence_.keys, item_.head_k, key, keys);
      const int next_keys = static_cast<int>(at_least(0, at_most(kBlockK, end - key - kBlockK)));
      const Granules next(p_.kv.k, p_.kv, sequence_.keys, item_.head_k, key + kBlockK, next_keys);
      // A granule fetches the one that comes a block later: those in between are on their way.
      const int64_t k_bytes = ((heads_ - 1) * p_.kv.k.stride_head + p_.headdim) * static_cast<int64_t>(sizeof(T));
      const int64_t v_bytes = ((heads_ - 1) * p_.kv.v.stride_head + p_.headdim_v) * static_cast<int64_t>(sizeof(T));
      for (int from = 0; from < keys; from += kGranule) {
        Prefetch ahead = v.prefetch(from, v_bytes);
        for (int64_t h = 0; h < heads_; ++h) scores(h, key, k, from, &ahead);
      }
      Real scale[kMaxAllRows];
      for (int64_t h = 0; h < heads_; ++h) {
        if (modified_) modify(h, key, keys);
        visit_rows(
            [&](auto count, int64_t r) { softmax_step<decltype(count)::value>(h, r, key, state, scale + h * rows_); });
      }
      for (int from = 0; from < keys; from += kGranule) {
        Prefetch ahead = next.prefetch(from, k_bytes);
        for (int64_t h = 0; h < heads_; ++h)
          values(h, key, v, from, from == 0 ? scale + h * rows_ : nullptr, state, &ahead);
      }
    }
    sort_dims(state);
  }

 private:
  static constexpr int kLanes = Vec::kLanes;
  static constexpr int kGroups = kBlockK >= 2 * kLanes ? 2 : 1;  // key vectors in flight: one alone is one long chain
  static constexpr int kGranule = kGroups * kLanes;              // keys
  // bf16 is read two dimensions to a 32-bit word: half the loads, half the transposing, a shift or a mask to widen.
  static constexpr bool kPairs = IsBf16<T>::value && Vec::kTileCols % 4 == 0;
  static constexpr bool kHasDot = kPairs && Dot::kPhases == 1;
  static constexpr bool kLikeTiles = kHasDot && Dot::kTiles;
  static constexpr int kChain = kLikeTiles ? kMaxHeaddim : kScoreChain;  // tile registers hold a score to its end
  // By 4 rows of accumulators, of which there are two, for even and for odd keys, where it is done as tiles do it.
  static constexpr int kTileValueVecs = Vec::kTileCols / (kLikeTiles ? 4 : 2);
  static constexpr int kValueVecs = kTileValueVecs > 1 ? kTileValueVecs : 1;
  static constexpr int kSquareDims = kPairs ? 2 * kLanes : kLanes;
  // So that a granule at work fetches a granule.
  static constexpr int kVecBytes = kLanes * static_cast<int>(sizeof(T));
  static constexpr int kPrefetchKeys = 4;
  static constexpr int kLinesPerSquare = kSquareDims * kVecBytes > 64 ? kSquareDims * kVecBytes / 64 : 1;

  using Granules = KeyGranules<T, kGranule>;

  template <int kCount>
  struct Rows {
    static constexpr int value = kCount;
  };

  // The rows of a pass lie side by side, step by step, so that one register addresses them all. load(row, n) gives the
  // next kLanes steps, of `dims` dimensions each, where n dimensions are left.
  template <class Q, class Load>
  void load_queries(int64_t dims, Load&& load) {
    for (int64_t h = 0; h < heads_; ++h)
      for (int64_t r = 0; r < rows_; ++r) {
        const Q* row = sequence_.query<const Q>(p_.q, visibility_.query(r), visibility_.head(item_.block(h), r));
        const int64_t pass = r / kPassRows * kPassRows, together = at_most(kPassRows, rows_ - pass);
        Real* q = q_ + (h * rows_ + pass) * ldq_ + (r - pass);
        for (int64_t d = 0; d < p_.headdim; d += dims * kLanes) {
          Real lanes[kLanes];
          load(row + d, p_.headdim - d).store(lanes);
          for (int i = 0; i < kLanes; ++i) q[(d / dims + i) * together] = lanes[i];
        }
      }
  }

  // The scale of int8 for key `i` of a block.
  static const float* scale_of(const Granules& x, const TensorView& scale, int64_t h, int64_t key, int i) {
    if constexpr (sizeof(T) == 1) return x.scales[key + (i < x.keys ? i : x.keys - 1)] + h * scale.stride_head;
    return nullptr;
  }

  // s[r][key] = q[r] . k[key] for a granule of keys of head h.
  void scores(int64_t h, int64_t key, const Granules& k, int from, Prefetch* ahead) {
    visit_rows([&](auto count, int64_t r) {
      score_rows<decltype(count)::value>(h, r, key, k, from, r == 0 ? ahead : nullptr);
    });
  }

  // The rows of a head, kPassRows at a time.
  template <class Fn>
  void visit_rows(Fn&& fn) {
    int64_t r = 0;
    for (; r + kPassRows <= rows_; r += kPassRows) fn(Rows<kPassRows>{}, r);
    switch (rows_ - r) {
      case 3: return fn(Rows<3>{}, r);
      case 2: return fn(Rows<2>{}, r);
      case 1: return fn(Rows<1>{}, r);
    }
  }

  template <int kRows>
  void score_rows(int64_t h, int64_t r, int64_t key, const Granules& k, int from, Prefetch* ahead) {
    const Real* q = q_ + (h * rows_ + r) * ldq_;
    const Vec scale = score_scale();
    const int64_t steps = kHasDot && !kLikeTiles ? ceil_div(p_.headdim, 2) : p_.headdim;
    score_chains<kRows>(
        h, r, from, steps,
        [&](int64_t begin, int64_t end, Vec(&sum)[kGroups][kRows]) {
          if constexpr (kLikeTiles)
            tile_chain<kRows>(h, k, from, q, sum, ahead);
          else if constexpr (kHasDot)
            dot_chain<kRows>(h, k, from, begin, end, q, sum, ahead);
          else
            fma_chain<kRows>(h, key, k, from, begin, end, q, sum, ahead);
        },
        [scale](Vec x) { return kHasDot ? x * scale : x; });
  }

  Vec score_scale() const { return Vec::set1(static_cast<Real>(p_.softmax_scale * kLog2e)); }

  // Scores of a granule in chains of kChain steps; chain(begin, end, sum) adds its part.
  template <int kRows, class Chain, class Scale>
  inline __attribute__((always_inline)) void score_chains(int64_t h, int64_t r, int from, int64_t steps, Chain&& chain,
                                                          Scale&& scaled) {
    Real* s = s_ + (h * rows_ + r) * kBlockK + from;
    for (int64_t begin = 0; begin < steps; begin += kChain) {
      const bool last = begin + kChain >= steps;
      Vec sum[kGroups][kRows];
#pragma GCC unroll 2
      for (int g = 0; g < kGroups; ++g)
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) sum[g][i] = Vec::zero();
      chain(begin, last ? steps : begin + kChain, sum);
#pragma GCC unroll 2
      for (int g = 0; g < kGroups; ++g)
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) {
          Real* at = s + i * kBlockK + g * kLanes;
          const Vec total = begin == 0 ? sum[g][i] : Vec::load(at) + sum[g][i];
          (last ? scaled(total) : total).store(at);
        }
    }
  }

  // sum[group][row][key] += the part of the scores from dimensions [d, end).
  template <int kRows>
  inline __attribute__((always_inline)) void fma_chain(int64_t h, int64_t key, const Granules& k, int from, int64_t d,
                                                       int64_t end, const Real* q, Vec (&sum)[kGroups][kRows],
                                                       Prefetch* ahead) {
    const int64_t head = h * p_.kv.k.stride_head;
    for (; d + kSquareDims <= end; d += kSquareDims)
#pragma GCC unroll 2
      for (int g = 0; g < kGroups; ++g) {
        const T* const* rows = k.row + from + g * kLanes;
        Vec square[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          if constexpr (kPairs)
            square[i] = Vec::load(reinterpret_cast<const float*>(rows[i] + head + d));
          else
            square[i] =
                load_scaled<Vec>(rows[i] + head + d, kLanes, scale_of(k, p_.kv.k_scale, h, key, from + g * kLanes + i));
        }
        Vec::transpose(square);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          if constexpr (kPairs) {
            add_products(Vec::even_bf16(square[i]), q + (d + 2 * i) * kRows, sum[g]);
            add_products(Vec::odd_bf16(square[i]), q + (d + 2 * i + 1) * kRows, sum[g]);
          } else {
            add_products(square[i], q + (d + i) * kRows, sum[g]);
          }
        }
        if (ahead) ahead->lines(kLinesPerSquare);
        keep_nothing();
      }
    for (; d < end; d += kLanes)
      for (int g = 0; g < kGroups; ++g) {
        const int dims = static_cast<int>(at_most(kLanes, end - d));
        Vec square[kLanes];
        for (int i = 0; i < kLanes; ++i)
          square[i] = load_scaled<Vec>(k.row[from + g * kLanes + i] + head + d, dims,
                                       scale_of(k, p_.kv.k_scale, h, key, from + g * kLanes + i));
        Vec::transpose(square);
        for (int i = 0; i < dims; ++i) add_products(square[i], q + (d + i) * kRows, sum[g]);
      }
  }

  // Transposed words [w, w + kLanes) of a group's keys: a vector of keys for each two dimensions.
  inline __attribute__((always_inline)) void load_square(int64_t head, const T* const* rows, int64_t w,
                                                         Vec (&square)[kLanes]) const {
    if (2 * (w + kLanes) <= p_.headdim) {
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) square[i] = Vec::load(reinterpret_cast<const float*>(rows[i] + head + 2 * w));
    } else {
      for (int i = 0; i < kLanes; ++i)
        square[i] = load_words<Vec>(reinterpret_cast<const bf16_t*>(rows[i] + head + 2 * w), p_.headdim - 2 * w);
    }
    Vec::transpose(square);
  }

  // The same as tile registers do it, from the first to the last dimension.
  template <int kRows>
  inline __attribute__((always_inline)) void tile_chain(int64_t h, const Granules& k, int from, const Real* q,
                                                        Vec (&sum)[kGroups][kRows], Prefetch* ahead) {
    const int64_t head = h * p_.kv.k.stride_head;
    for (int64_t d = 0; d < p_.headdim; d += kSquareDims)
#pragma GCC unroll 2
      for (int g = 0; g < kGroups; ++g) {
        Vec square[kLanes];
        load_square(head, k.row + from + g * kLanes, d / 2, square);
        Vec part[2][kRows];
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) part[0][r] = part[1][r] = Vec::zero();
        const auto add_word = [&](int i) __attribute__((always_inline)) {
          add_products(Vec::even_bf16(square[i]), q + (d + 2 * i) * kRows, part[0]);
          add_products(Vec::odd_bf16(square[i]), q + (d + 2 * i + 1) * kRows, part[1]);
        };
        if (d + kSquareDims <= p_.headdim) {
#pragma GCC unroll 16
          for (int i = 0; i < kLanes; ++i) add_word(i);
        } else {
          for (int i = 0; d + 2 * i < p_.headdim; ++i) add_word(i);
        }
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) sum[g][r] = sum[g][r] + (part[0][r] + part[1][r]);
        if (ahead) ahead->lines(kLinesPerSquare);
        keep_nothing();
      }
  }

  // The same by dot products, for words [w, end) of two dimensions.
  template <int kRows>
  inline __attribute__((always_inline)) void dot_chain(int64_t h, const Granules& k, int from, int64_t w, int64_t end,
                                                       const Real* q, Vec (&sum)[kGroups][kRows], Prefetch* ahead) {
    const int64_t head = h * p_.kv.k.stride_head;
    for (; w < end; w += kLanes)
#pragma GCC unroll 2
      for (int g = 0; g < kGroups; ++g) {
        Vec square[kLanes];
        load_square(head, k.row + from + g * kLanes, w, square);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          const auto word = (typename Dot::Factor)square[i].r;
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r)
            sum[g][r] = Dot::multiply_add(word, Dot::col(q + (w + i) * kRows + r, 0), sum[g][r]);
        }
        if (ahead) ahead->lines(kLinesPerSquare);
        keep_nothing();
      }
  }

  // Without this the compiler keeps the broadcasts of q for the next group, on the stack.
  static inline __attribute__((always_inline)) void keep_nothing() { asm volatile("" ::: "memory"); }

  template <int kRows>
  static inline __attribute__((always_inline)) void add_products(Vec k, const Real* q, Vec (&sum)[kRows]) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) sum[r] = fma(k, Vec::set1(q[r]), sum[r]);
  }

  void modify(int64_t h, int64_t key, int keys) {
    const ScoreModifiers<Vec> modifiers(p_, sequence_, item_.block(h), round_up(rows_, kLanes), modifiers_);
    for (int64_t r = 0; r < rows_; ++r) modifiers.apply_row(s_ + (h * rows_ + r) * kBlockK, r, key, keys);
  }

  // Scores to probabilities, in place; scale[r] is what the row's o must be multiplied by. The sums are chains of
  // kBlockK additions: those of several rows run side by side.
  template <int kRows>
  void softmax_step(int64_t h, int64_t first, int64_t key, const SoftmaxState<Real>& state, Real* scale) {
    Real sum[kRows];
    Real* all = s_ + (h * rows_ + first) * kBlockK;
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = h * rows_ + first + r;
      Real* s = all + r * kBlockK;
      const int64_t end = at_most(kBlockK, at_least(0, visibility_.end(first + r) - key));
      for (int64_t i = 0; i < at_most(kBlockK, visibility_.begin(first + r) - key); ++i) s[i] = -kInfinity;
      for (int64_t i = end; i < kBlockK; ++i) s[i] = -kInfinity;
      Vec top = Vec::load(s);
      for (int i = kLanes; i < kBlockK; i += kLanes) top = max(top, Vec::load(s + i));
      const Real block_max = reduce_max(top), running = state.max[row];
      const Real next = running > block_max ? running : block_max;
      const Vec shift = Vec::set1(next == -kInfinity ? 0 : next);
      for (int i = 0; i < kBlockK; i += kLanes) exp2(Vec::load(s + i) - shift).store(s + i);
      scale[first + r] = next == running ? 1 : exp2_of_difference<Vec>(running, next);
      sum[r] = state.sum[row] * scale[first + r];
      state.max[row] = next;
    }
    for (int i = 0; i < kBlockK; ++i)
      for (int r = 0; r < kRows; ++r) sum[r] += all[r * kBlockK + i];
    for (int r = 0; r < kRows; ++r) state.sum[h * rows_ + first + r] = sum[r];
    if constexpr (kLikeTiles)
      for (int i = 0; i < kRows * kBlockK; i += kLanes) {
        bf16_t rounded[kLanes];
        Dot::put(Vec::load(all + i), reinterpret_cast<float*>(rounded), 0);
        Vec::load(rounded).store(all + i);
      }
  }

  // o = o * scale + p v for a granule of keys of head h; without scale o = o + p v.
  void values(int64_t h, int64_t key, const Granules& v, int from, const Real* scale, const SoftmaxState<Real>& state,
              Prefetch* ahead) {
    visit_rows([&](auto count, int64_t r) {
      constexpr int kRows = decltype(count)::value;
      Tile tile{h,
                key,
                &v,
                from,
                scale ? scale + r : nullptr,
                s_ + (h * rows_ + r) * kBlockK,
                state.o + (h * rows_ + r) * state.ldo,
                state.ldo,
                r == 0 ? ahead : nullptr};
      int64_t d = 0;
      for (; d + kValueVecs * kLanes <= p_.headdim_v; d += kValueVecs * kLanes)
        value_tile<kRows, kValueVecs, kPairs>(tile, d, kLanes);
      for (; d < p_.headdim_v; d += kLanes)
        value_tile<kRows, 1, false>(tile, d, static_cast<int>(at_most(kLanes, p_.headdim_v - d)));
    });
  }

  struct Tile {
    int64_t h, key;
    const Granules* v;
    int from;
    const Real* scale;  // (rows,)
    const Real* p;      // (rows, kBlockK)
    Real* o;            // (rows, ldo)
    int64_t ldo;
    Prefetch* ahead;
  };

  // With pairs, o holds the even dimensions of two vectors, then the odd ones: sort_dims() puts them right.
  template <int kRows, int kVecs, bool kInPairs>
  inline __attribute__((always_inline)) void value_tile(const Tile& t, int64_t d, int dims) {
    const int64_t at = t.h * p_.kv.v.stride_head + d;
    const int end = static_cast<int>(at_most(t.v->keys, t.from + kGranule));
    const auto before = [&](int i, int j) {
      const Vec o = Vec::load(t.o + i * t.ldo + d + j * kLanes);
      return t.scale ? o * Vec::set1(t.scale[i]) : o;
    };
    constexpr int kParts = kLikeTiles ? 2 : 1;
    Vec sum[kParts][kRows][kVecs];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) {
        sum[0][i][j] = kLikeTiles ? Vec::zero() : before(i, j);
        if constexpr (kLikeTiles) sum[1][i][j] = Vec::zero();
      }
    const auto add_key = [&](int key, Vec(&part)[kRows][kVecs]) __attribute__((always_inline)) {
      const T* line = t.v->row[key] + at;
      Vec row[kVecs];
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) {
        if constexpr (kInPairs) {
          const Vec words = Vec::load(reinterpret_cast<const float*>(line + j / 2 * 2 * kLanes));
          row[j] = j % 2 ? Vec::odd_bf16(words) : Vec::even_bf16(words);
        } else {
          row[j] = load_scaled<Vec>(line + j * kLanes, dims, scale_of(*t.v, p_.kv.v_scale, t.h, t.key, key));
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < kVecs; ++j) part[i][j] = fma(Vec::set1(t.p[i * kBlockK + key]), row[j], part[i][j]);
      if (t.ahead && key % kPrefetchKeys == 0) t.ahead->lines(kPrefetchKeys * kVecs * kVecBytes / 64);
    };
    for (int key = t.from; key < end; key += kParts) {
      add_key(key, sum[0]);
      if constexpr (kLikeTiles)
        if (key + 1 < end) add_key(key + 1, sum[1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) {
        if constexpr (kLikeTiles) sum[0][i][j] = before(i, j) + (sum[0][i][j] + sum[1][i][j]);
        sum[0][i][j].store(t.o + i * t.ldo + d + j * kLanes);
      }
  }

  void sort_dims(const SoftmaxState<Real>& state) const {
    if (!kPairs) return;
    for (int64_t row = 0; row < heads_ * rows_; ++row)
      for (int64_t d = 0; d + kValueVecs * kLanes <= p_.headdim_v; d += kValueVecs * kLanes)
        for (int64_t j = 0; j < kValueVecs * kLanes; j += 2 * kLanes) {
          Real* o = state.o + row * state.ldo + d + j;
          Real sorted[2 * kLanes];
          for (int i = 0; i < kLanes; ++i) {
            sorted[2 * i] = o[i];
            sorted[2 * i + 1] = o[kLanes + i];
          }
          memcpy(o, sorted, sizeof sorted);
        }
  }

  const AttentionParams& p_;
  const Sequence& sequence_;
  const Visibility visibility_;
  const WorkItem item_;
  const int64_t heads_, rows_, ldq_;
  const bool modified_;
  Real* const q_;          // (heads, passes, ldq, rows of the pass), times softmax_scale * log2(e); or words
  Real* const s_;          // (heads, rows, kBlockK)
  Real* const modifiers_;  // ScoreModifiers' own
};

}  // namespace
}  // namespace fastattn
