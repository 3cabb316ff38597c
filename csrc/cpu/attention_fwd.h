// Fused attention for many rows at a time (FlashAttention-2's schedule, arXiv 2307.08691, on vector registers).
//
// A work item is up to kMaxRows rows of one KV head. Its queries are packed once, transposed, so that rows fill the
// lanes; K and V pass by in blocks of kBlockK keys, widened to fp32 in a tile that stays in L2; scores of one strip of
// rows by one block live in L1 and are never written anywhere else.
#pragma once

#include "cpu/attention_common.h"
#include "cpu/key_blocks.h"
#include "cpu/tile_gemm.h"

namespace fastattn {
namespace {

template <class Vec, class Dot>
class ForwardTile {
 public:
  using Real = typename Vec::Real;
  static constexpr int kStripVecs = Vec::kTileVecs;
  static constexpr int kStrip = kStripVecs * Vec::kLanes;  // rows whose scores are alive at a time

  // Rows per work item: enough to amortise packing K and V, few enough to leave Q, O and a K/V tile in L2.
  static int64_t max_rows(const AttentionParams& p) {
    const int64_t dim = at_least(p.headdim, p.headdim_v);
    const int64_t target = dim <= 64 ? 384 : dim <= 128 ? 192 : dim <= 256 ? 96 : 48;
    return round_up(target, kStrip);
  }

  static int64_t reals(const AttentionParams& p, int64_t rows, int64_t) { return Layout(p, rows).total; }

  // Of one head.
  ForwardTile(const AttentionParams& p, const Sequence& sequence, const WorkItem& item, Real* memory)
      : p_(p),
        sequence_(sequence),
        block_(item.block(0)),
        visibility_(p, sequence),
        dots_(scores_by_dot<Vec, Dot>(p)),
        layout_(p, item.rows),
        memory_(memory),
        modifiers_(p, sequence, block_, memory + layout_.modifiers),
        dropout_(p, sequence, block_, memory + layout_.dropout),
        k_head_{p.kv.k, p.kv.k_scale, p.kv, sequence.keys, item.head_k, p.headdim},
        v_head_{p.kv.v, p.kv.v_scale, p.kv, sequence.keys, item.head_k, p.headdim_v} {
    if constexpr (kHasDot)
      if (dots_) pack_query_words();
    if (!dots_) visit_storage<Real>(p.dtype, [&](auto tag) { pack_queries<typename decltype(tag)::type>(); });
  }

  // What this thread will probably do next: fetched while the last block of keys is at work.
  struct Next {
    const Sequence& sequence;
    const WorkItem& item;
    int64_t first_key;
  };
  static constexpr bool kLooksAhead = true;

  // Attend keys [begin, end), of which begin starts a block: the state is overwritten, row-major.
  void attend(int64_t begin, int64_t end, const SoftmaxState<Real>& state, const Next* next = nullptr) {
    reset();
    end = at_most(end, visibility_.end(last_row()));
    begin = at_least(begin, visibility_.begin(block_.first_row) / kBlockK * kBlockK);
    for (int64_t key = begin; key < end; key += kBlockK) {
      const int keys = static_cast<int>(at_most(kBlockK, end - key));
      bool packed = false;
      const int64_t vecs = layout_.ldr / Vec::kLanes, strips = ceil_div(vecs, kStripVecs);
      ahead_.clear();
      if (key + kBlockK < end) {
        fetch_keys(sequence_, block_.head_k, key + kBlockK);
      } else if (next) {
        fetch_queries(*next);
        fetch_keys(next->sequence, next->item.head_k, next->first_key);
      }
      ahead_.spread(strips * ((kBlockK + layout_.ldv) / Vec::kTileCols));
      for (int64_t strip = 0; strip < strips; ++strip) {  // of equal size, give or take a vector
        const int64_t first = strip * vecs / strips, last = (strip + 1) * vecs / strips;
        strip_of(static_cast<int>(last - first), first * Vec::kLanes, key, keys, &packed);
      }
    }
    export_state(state);
  }

 private:
  static constexpr bool kHasDot = sizeof(Real) == 4 && Dot::kPhases == 1;

  // Where each array starts in the item's memory; every row is a whole number of vectors.
  struct Layout {
    int64_t ldr, ldk, ldv;  // rows, headdim and headdim_v rounded up
    int64_t q, o, max, sum, begin, end, modifiers, dropout, k, v, s, total;
    Layout(const AttentionParams& p, int64_t rows)
        : ldr(round_up(rows, Vec::kLanes)),
          ldk(round_up(p.headdim, Vec::kLanes)),
          ldv(round_up(p.headdim_v, Vec::kLanes)) {
      q = 0;
      o = q + p.headdim * ldr;
      max = o + ldv * ldr;
      sum = max + ldr;
      begin = sum + ldr;
      end = begin + ldr;
      modifiers = end + ldr;
      dropout = modifiers + ScoreModifiers<Vec>::reals(p, rows);
      k = dropout + Dropout<Vec>::reals(p, rows);
      v = k + kBlockK * ldk;
      s = v + kBlockK * ldv;
      total = s + kBlockK * kStrip;
    }
  };

  Real* q() const { return memory_ + layout_.q; }           // (headdim, ldr), times softmax_scale * log2(e); or words
  Real* o() const { return memory_ + layout_.o; }           // (ldv, ldr)
  Real* max_() const { return memory_ + layout_.max; }      // (ldr,)
  Real* sum_() const { return memory_ + layout_.sum; }      // (ldr,)
  Real* begin_() const { return memory_ + layout_.begin; }  // (ldr,), visible keys from the block's first key on
  Real* end_() const { return memory_ + layout_.end; }      // (ldr,)
  Real* k() const { return memory_ + layout_.k; }           // (kBlockK, ldk)
  Real* v() const { return memory_ + layout_.v; }           // (kBlockK, ldv)
  Real* s() const { return memory_ + layout_.s; }           // (kBlockK, kStrip)

  int64_t last_row() const { return block_.first_row + block_.rows - 1; }

  // A block of keys and values lies in rows that are far apart, pages apart where there are many heads: hardware does
  // not foresee them.
  void fetch_keys(const Sequence& sequence, int64_t head, int64_t first_key) {
    visit_kv_storage<Real>(p_.kv.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      const KeyRows<const T> k(p_.kv.k, p_.kv, sequence.keys, head), v(p_.kv.v, p_.kv, sequence.keys, head);
      for (int64_t key = first_key; key < at_most(sequence.seqlen_k, first_key + kBlockK); ++key) {
        ahead_.add(k[key], p_.headdim * static_cast<int64_t>(sizeof(T)));
        ahead_.add(v[key], p_.headdim_v * static_cast<int64_t>(sizeof(T)));
      }
    });
  }

  void fetch_queries(const Next& next) {
    const Visibility visibility(p_, next.sequence);
    const RowBlock block = next.item.block(0);
    visit_storage<Real>(p_.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      for (int64_t row = block.first_row; row < block.first_row + block.rows; ++row)
        ahead_.add(next.sequence.template query<const T>(p_.q, visibility.query(row), visibility.head(block, row)),
                   p_.headdim * static_cast<int64_t>(sizeof(T)));
    });
  }

  // Q^T in squares of kLanes rows by kLanes dimensions; rows past the end repeat the last one and are never stored.
  template <class T>
  void pack_queries() {
    const Vec scale = Vec::set1(static_cast<Real>(p_.softmax_scale * kLog2e));
    for (int64_t r = 0; r < layout_.ldr; r += Vec::kLanes) {
      const T* rows[Vec::kLanes];
      for (int i = 0; i < Vec::kLanes; ++i) {
        const int64_t row = at_most(last_row(), block_.first_row + r + i);
        rows[i] = sequence_.query<const T>(p_.q, visibility_.query(row), visibility_.head(block_, row));
      }
      for (int64_t d = 0; d < p_.headdim; d += Vec::kLanes) {
        const int dims = static_cast<int>(at_most(Vec::kLanes, p_.headdim - d));
        Vec square[Vec::kLanes];
        for (int i = 0; i < Vec::kLanes; ++i) square[i] = load_scaled<Vec>(rows[i] + d, dims, nullptr) * scale;
        Vec::transpose(square);
        for (int i = 0; i < dims; ++i) square[i].store(q() + (d + i) * layout_.ldr + r);
      }
    }
  }

  // The same in words of two dimensions, as they are: (ceil(headdim / 2), ldr).
  void pack_query_words() {
    for (int64_t r = 0; r < layout_.ldr; r += Vec::kLanes)
      for (int64_t d = 0; d < p_.headdim; d += 2 * Vec::kLanes) {
        Vec square[Vec::kLanes];
        for (int i = 0; i < Vec::kLanes; ++i) {
          const int64_t row = at_most(last_row(), block_.first_row + r + i);
          const auto* source =
              sequence_.query<const bf16_t>(p_.q, visibility_.query(row), visibility_.head(block_, row));
          square[i] = load_words<Vec>(source + d, p_.headdim - d);
        }
        Vec::transpose(square);
        const int64_t words = at_most(Vec::kLanes, ceil_div(p_.headdim - d, 2));
        for (int64_t i = 0; i < words; ++i) square[i].store(q() + (d / 2 + i) * layout_.ldr + r);
      }
  }

  void reset() {
    for (int64_t r = 0; r < layout_.ldr; r += Vec::kLanes) {
      Vec::set1(-kInfinity).store(max_() + r);
      Vec::zero().store(sum_() + r);
    }
    for (int64_t i = 0; i < layout_.ldv * layout_.ldr; i += Vec::kLanes) Vec::zero().store(o() + i);
  }

  // What a strip has to do about a block of keys.
  enum class Kind { open, edge, modified };

  void strip_of(int vecs, int64_t row, int64_t key, int keys, bool* packed) {
    const int64_t first = block_.first_row + row;
    const int64_t last = at_most(last_row(), first + vecs * Vec::kLanes - 1);
    if (visibility_.end(last) <= key || visibility_.begin(first) >= key + keys) return;
    const Cover cover = modifiers_.cover(row, vecs * Vec::kLanes, key, keys);
    if (cover == Cover::none) return;
    if (!*packed) {
      if constexpr (kHasDot)
        if (dots_) pack_words<Vec>(k_head_, key, keys, k(), layout_.ldk);
      if (!dots_) pack_block<Vec>(k_head_, key, keys, k(), layout_.ldk);
      pack_block<Vec>(v_head_, key, keys, v(), layout_.ldv);
      *packed = true;
    }
    const bool edge = visibility_.end(first) < key + kBlockK || visibility_.begin(last) > key;
    const Kind kind = modifiers_.any(cover) ? Kind::modified : edge ? Kind::edge : Kind::open;
    if (kind != Kind::open)
      for (int64_t r = row; r < row + vecs * Vec::kLanes; ++r) {
        const int64_t own = at_most(last_row(), block_.first_row + r);
        begin_()[r] = static_cast<Real>(at_least(0, visibility_.begin(own) - key));
        end_()[r] = static_cast<Real>(at_least(0, at_most(kBlockK, visibility_.end(own) - key)));
      }
    visit_vecs<kStripVecs>(vecs, [&](auto count) {
      constexpr int kVecs = decltype(count)::value;
      switch (kind) {
        case Kind::open: return strip<kVecs, Kind::open>(row, key, keys, cover, edge);
        case Kind::edge: return strip<kVecs, Kind::edge>(row, key, keys, cover, edge);
        case Kind::modified: return strip<kVecs, Kind::modified>(row, key, keys, cover, edge);
      }
    });
  }

  template <int kVecs>
  struct Count {
    static constexpr int value = kVecs;
  };
  template <bool kValue>
  struct Bool {
    static constexpr bool value = kValue;
  };
  template <int kVecs, class Fn>
  static void visit_vecs(int vecs, Fn&& fn) {
    if constexpr (kVecs > 1)
      if (vecs < kVecs) return visit_vecs<kVecs - 1>(vecs, fn);
    fn(Count<kVecs>{});
  }

  // One strip of rows against one block of keys: scores, softmax step, values.
  template <int kVecs, Kind kKind>
  void strip(int64_t row, int64_t key, int keys, Cover cover, [[maybe_unused]] bool edge) {
    constexpr int kLanes = Vec::kLanes;
    Vec top[kVecs];
    for (int i = 0; i < kVecs; ++i) top[i] = Vec::load(max_() + row + i * kLanes);
    Real* scores = s();
    if constexpr (kHasDot) {
      const Vec scale = Vec::set1(static_cast<Real>(p_.softmax_scale * kLog2e));
      if (dots_) score_tile<kVecs, kKind, Dot>(row, ceil_div(p_.headdim, 2), [&](Vec x) { return x * scale; }, top);
    }
    if (!dots_) score_tile<kVecs, kKind, FmaProduct<Vec>>(row, p_.headdim, [](Vec x) { return x; }, top);
    if constexpr (kKind == Kind::modified) {
      modifiers_.apply_tile(scores, kStrip, row, kVecs, key, keys, cover);
      edge ? hide_and_find_top<kVecs>(row, top) : find_top<kVecs>(top);
    }

    Vec shift[kVecs], scale[kVecs], sum[kVecs];
    for (int i = 0; i < kVecs; ++i) {
      Real* running = max_() + row + i * kLanes;
      // A row that has seen no key yet subtracts 0: exp2(-inf) is 0, where -inf - -inf were NaN.
      shift[i] = select(Vec::set1(-kInfinity) < top[i], top[i], Vec::zero());
      scale[i] = exp2(Vec::load(running) - shift[i]);
      sum[i] = Vec::load(sum_() + row + i * kLanes) * scale[i];
      top[i].store(running);
    }
    for (int j = 0; j < kBlockK; ++j)
      for (int i = 0; i < kVecs; ++i) {
        Real* at = scores + j * kStrip + i * kLanes;
        const Vec prob = exp2(Vec::load(at) - shift[i]);
        sum[i] = sum[i] + prob;
        prob.store(at);
      }
    for (int i = 0; i < kVecs; ++i) sum[i].store(sum_() + row + i * kLanes);
    if (dropout_.on()) dropout_.apply_tile(scores, kStrip, row, kVecs, key, keys);
    value_tile<kVecs>(row, scale);
  }

  // s = K Q^T in `steps` steps; without modifiers the visible range is cut and the maximum taken on the way.
  template <int kVecs, Kind kKind, class Product, class Scale>
  inline __attribute__((always_inline)) void score_tile(int64_t row, int64_t steps, Scale&& scaled, Vec (&top)[kVecs]) {
    constexpr int kLanes = Vec::kLanes, kCols = Vec::kTileCols;
    static_assert(kBlockK % kCols == 0, "a block is a whole number of tiles");
    Vec begins[kVecs], ends[kVecs];
    if constexpr (kKind == Kind::edge)
      for (int i = 0; i < kVecs; ++i) {
        begins[i] = Vec::load(begin_() + row + i * kLanes);
        ends[i] = Vec::load(end_() + row + i * kLanes);
      }
    // One chain over steps [d, d + depth); kFirst and kLast say whether it begins and ends the score.
    const auto chain = [&](auto first, auto last, int key, int64_t d, int64_t depth) {
      constexpr bool kFirst = decltype(first)::value, kLast = decltype(last)::value;
      tile_gemm<Vec, kVecs, kCols, Product>(
          q() + d * layout_.ldr + row, layout_.ldr, k() + key * layout_.ldk + d, layout_.ldk, 1, depth,
          [](int, int) { return Vec::zero(); },
          [&](int col, int vec, Vec score) {
            Real* at = s() + (key + col) * kStrip + vec * kLanes;
            if constexpr (!kFirst) score = Vec::load(at) + score;
            if constexpr (kLast) score = scaled(score);
            if constexpr (kLast && kKind == Kind::edge) score = visible(score, key + col, begins[vec], ends[vec]);
            if constexpr (kLast && kKind != Kind::modified) top[vec] = max(top[vec], score);
            score.store(at);
          });
    };
    for (int key = 0; key < kBlockK; key += kCols) {
      ahead_.step();
      if (steps <= kScoreChain) {
        chain(Bool<true>{}, Bool<true>{}, key, 0, steps);
        continue;
      }
      chain(Bool<true>{}, Bool<false>{}, key, 0, kScoreChain);
      int64_t d = kScoreChain;
      for (; d + kScoreChain < steps; d += kScoreChain) chain(Bool<false>{}, Bool<false>{}, key, d, kScoreChain);
      chain(Bool<false>{}, Bool<true>{}, key, d, steps - d);
    }
  }

  static Vec visible(Vec score, int key, Vec begin, Vec end) {
    const Vec at = Vec::set1(static_cast<Real>(key));
    return select((begin <= at) & (at < end), score, Vec::set1(-kInfinity));
  }

  template <int kVecs>
  void find_top(Vec (&top)[kVecs]) {
    for (int j = 0; j < kBlockK; ++j)
      for (int i = 0; i < kVecs; ++i) top[i] = max(top[i], Vec::load(s() + j * kStrip + i * Vec::kLanes));
  }

  template <int kVecs>
  void hide_and_find_top(int64_t row, Vec (&top)[kVecs]) {
    for (int i = 0; i < kVecs; ++i) {
      const Vec begin = Vec::load(begin_() + row + i * Vec::kLanes), end = Vec::load(end_() + row + i * Vec::kLanes);
      for (int j = 0; j < kBlockK; ++j) {
        Real* at = s() + j * kStrip + i * Vec::kLanes;
        const Vec score = visible(Vec::load(at), j, begin, end);
        top[i] = max(top[i], score);
        score.store(at);
      }
    }
  }

  // o = o * scale + P V
  template <int kVecs>
  inline __attribute__((always_inline)) void value_tile(int64_t row, const Vec (&scale)[kVecs]) {
    constexpr int kLanes = Vec::kLanes, kCols = Vec::kTileCols;
    Real* out = o() + row;
    const int64_t ldr = layout_.ldr;
    for (int64_t d = 0; d < p_.headdim_v; d += kCols) {  // ldv is a multiple of kCols: the tail's columns are zero
      ahead_.step();
      tile_gemm<Vec, kVecs, kCols>(
          s(), kStrip, v() + d, 1, layout_.ldv, kBlockK,
          [&](int col, int vec) { return Vec::load(out + (d + col) * ldr + vec * kLanes) * scale[vec]; },
          [&](int col, int vec, Vec value) { value.store(out + (d + col) * ldr + vec * kLanes); });
    }
  }

  // The strips' O^T to row-major rows.
  void export_state(const SoftmaxState<Real>& state) {
    for (int64_t r = 0; r < block_.rows; r += Vec::kLanes) {
      const int rows = static_cast<int>(at_most(Vec::kLanes, block_.rows - r));
      for (int64_t d = 0; d < layout_.ldv; d += Vec::kLanes) {
        Vec square[Vec::kLanes];
        for (int i = 0; i < Vec::kLanes; ++i) square[i] = Vec::load(o() + (d + i) * layout_.ldr + r);
        Vec::transpose(square);
        for (int i = 0; i < rows; ++i) square[i].store(state.o + (r + i) * state.ldo + d);
      }
      Vec::load(max_() + r).store_n(state.max + r, rows);
      Vec::load(sum_() + r).store_n(state.sum + r, rows);
    }
  }

  const AttentionParams& p_;
  const Sequence& sequence_;
  const RowBlock block_;
  const Visibility visibility_;
  const bool dots_;
  const Layout layout_;
  Real* const memory_;
  const ScoreModifiers<Vec> modifiers_;
  const Dropout<Vec> dropout_;
  const KVHead k_head_, v_head_;
  FetchAhead ahead_;
};

}  // namespace
}  // namespace fastattn
