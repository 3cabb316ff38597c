// Fused attention for many rows at a time (FlashAttention-2's schedule, arXiv 2307.08691, on vector registers).
//
// A work item is up to kMaxRows rows of one KV head. Its queries are packed once, transposed, so that rows fill the
// lanes; K and V pass by in blocks of kBlockK keys, packed in a tile that stays in L2; scores of one strip of rows by
// one block live in L1 and are never written anywhere else. Products says what is multiplied by what.
#pragma once

#include "cpu/attention_common.h"
#include "cpu/attention_fwd_products.h"
#include "cpu/key_blocks.h"

namespace fastattn {
namespace {

template <class Products>
class ForwardTile {
 public:
  using Vec = typename Products::Vec;
  using Real = typename Vec::Real;
  static constexpr int kStripVecs = Products::kStripVecs;
  static constexpr int kStrip = kStripVecs * Vec::kLanes;  // rows whose scores are alive at a time

  // Rows per work item: enough to amortise packing K and V, few enough to leave Q, O and a K/V tile in L2.
  static int64_t max_rows(const AttentionParams& p) {
    const int64_t dim = at_least(p.headdim, p.headdim_v);
    const int64_t target = dim <= 64 ? 384 : dim <= 128 ? 192 : dim <= 256 ? 96 : 48;
    return round_up(Products::kRowsFactor * target, kStrip);
  }

  static int64_t reals(const AttentionParams& p, int64_t rows, int64_t) { return Layout(p, rows).total; }

  // Of one head.
  ForwardTile(const AttentionParams& p, const Sequence& sequence, const WorkItem& item, Real* memory)
      : p_(p),
        sequence_(sequence),
        block_(item.block(0)),
        visibility_(p, sequence),
        layout_(p, item.rows),
        memory_(memory),
        modifiers_(p, sequence, block_, layout_.vecs * Vec::kLanes, memory + layout_.modifiers),
        dropout_(p, sequence, block_, layout_.vecs * Vec::kLanes, memory + layout_.dropout),
        k_head_{p.kv.k, p.kv.k_scale, p.kv, sequence.keys, item.head_k, p.headdim},
        v_head_{p.kv.v, p.kv.v_scale, p.kv, sequence.keys, item.head_k, p.headdim_v} {
    Products::visit_queries(p.dtype, [&](auto tag) { pack_queries<typename decltype(tag)::type>(); });
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
    [[maybe_unused]] const typename Products::Registers registers;
    reset();
    end = at_most(end, visibility_.end(last_row()));
    begin = at_least(begin, visibility_.begin(block_.first_row) / kBlockK * kBlockK);
    for (int64_t key = begin; key < end; key += kBlockK) {
      const int keys = static_cast<int>(at_most(kBlockK, end - key));
      bool packed = false;
      ahead_.clear();
      if (key + kBlockK < end) {
        fetch_keys(sequence_, block_.head_k, key + kBlockK);
      } else if (next) {
        fetch_queries(*next);
        fetch_keys(next->sequence, next->item.head_k, next->first_key);
      }
      ahead_.spread(layout_.strips * ((kBlockK + layout_.ld_out) / Vec::kTileCols));
      for (int64_t i = 0; i < layout_.strips; ++i) meet(strip_at(i), key, keys, &packed);
    }
    export_state(state);
  }

 private:
  // Where each array starts in the item's memory; every row is a whole number of vectors.
  struct Layout {
    int64_t vecs, strips;      // of rows
    int64_t ldk, ldv, ld_out;  // what a query or key, a value and an output row hold, rounded up
    int64_t q, o, max, sum, begin, end, modifiers, dropout, k, v, s, total;
    Layout(const AttentionParams& p, int64_t rows)
        : vecs(ceil_div(rows, Vec::kLanes)),
          strips(ceil_div(vecs, kStripVecs)),
          ldk(round_up(Products::steps(p.headdim), Vec::kLanes)),
          ldv(Products::value_columns(p.headdim_v)),
          ld_out(round_up(p.headdim_v, Vec::kLanes)) {
      q = 0;
      o = q + strips * ldk * kStrip;
      max = o + strips * ld_out * kStrip;
      sum = max + vecs * Vec::kLanes;
      begin = sum + vecs * Vec::kLanes;
      end = begin + vecs * Vec::kLanes;
      modifiers = end + vecs * Vec::kLanes;
      dropout = modifiers + ScoreModifiers<Vec>::reals(p, rows);
      k = dropout + Dropout<Vec>::reals(p, rows);
      v = k + kBlockK * ldk;
      s = v + Products::value_rows(p.headdim_v) * ldv;
      total = s + Products::kScoreReals;
    }
  };

  Real* q(int64_t strip) const { return memory_ + layout_.q + strip * layout_.ldk * kStrip; }     // (steps, kStrip)
  Real* o(int64_t strip) const { return memory_ + layout_.o + strip * layout_.ld_out * kStrip; }  // (ld_out, kStrip)
  Real* max_() const { return memory_ + layout_.max; }                                            // (rows,)
  Real* sum_() const { return memory_ + layout_.sum; }                                            // (rows,)
  Real* begin_() const { return memory_ + layout_.begin; }  // (rows,), visible keys from the block's first key on
  Real* end_() const { return memory_ + layout_.end; }      // (rows,)
  Real* k() const { return memory_ + layout_.k; }           // (kBlockK, ldk)
  Real* v() const { return memory_ + layout_.v; }           // (kBlockK, ldv), or its transpose
  Real* s() const { return memory_ + layout_.s; }           // (kBlockK, kStrip), and what Products add

  // Rows [row, row + vecs * kLanes) of the item, in whole vectors.
  struct Strip {
    int64_t index, row;
    int vecs;
  };

  Strip strip_at(int64_t i) const {  // of equal size, give or take a vector
    const int64_t first = i * layout_.vecs / layout_.strips, last = (i + 1) * layout_.vecs / layout_.strips;
    return {i, first * Vec::kLanes, static_cast<int>(last - first)};
  }

  // fn(strip, column) for every vector of rows.
  template <class Fn>
  void for_columns(Fn&& fn) const {
    for (int64_t i = 0; i < layout_.strips; ++i) {
      const Strip strip = strip_at(i);
      for (int64_t column = 0; column < strip.vecs * Vec::kLanes; column += Vec::kLanes) fn(strip, column);
    }
  }

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

  // Q^T in squares of kLanes rows by kLanes steps; rows past the end repeat the last one and are never stored.
  template <class T>
  void pack_queries() {
    const Vec scale = Products::kScalesQueries ? score_scale() : Vec::set1(1);
    for_columns([&](const Strip& strip, int64_t column) {
      const T* rows[Vec::kLanes];
      for (int i = 0; i < Vec::kLanes; ++i) {
        const int64_t row = at_most(last_row(), block_.first_row + strip.row + column + i);
        rows[i] = sequence_.query<const T>(p_.q, visibility_.query(row), visibility_.head(block_, row));
      }
      for (int64_t step = 0; step < layout_.ldk; step += Vec::kLanes) {
        const int64_t d = step * Products::kDimsPerStep;
        Vec square[Vec::kLanes];
        for (int i = 0; i < Vec::kLanes; ++i) {
          square[i] = Products::load_query(rows[i] + d, p_.headdim - d);
          if constexpr (Products::kScalesQueries) square[i] = square[i] * scale;
        }
        Vec::transpose(square);
        for (int i = 0; i < Vec::kLanes; ++i) square[i].store(q(strip.index) + (step + i) * kStrip + column);
      }
    });
  }

  Vec score_scale() const { return Vec::set1(static_cast<Real>(p_.softmax_scale * kLog2e)); }

  void reset() {
    for (int64_t r = 0; r < layout_.vecs * Vec::kLanes; r += Vec::kLanes) {
      Vec::set1(-kInfinity).store(max_() + r);
      Vec::zero().store(sum_() + r);
    }
    for (int64_t i = 0; i < layout_.strips * layout_.ld_out * kStrip; i += Vec::kLanes) Vec::zero().store(o(0) + i);
  }

  // What a strip has to do about a block of keys.
  enum class Kind { open, edge, modified };

  void meet(const Strip& strip, int64_t key, int keys, bool* packed) {
    const int64_t row = strip.row, first = block_.first_row + row;
    const int vecs = strip.vecs;
    const int64_t last = at_most(last_row(), first + vecs * Vec::kLanes - 1);
    if (visibility_.end(last) <= key || visibility_.begin(first) >= key + keys) return;
    const Cover cover = modifiers_.cover(row, vecs * Vec::kLanes, key, keys);
    if (cover == Cover::none) return;
    if (!*packed) {
      Products::pack_keys(k_head_, key, keys, k(), layout_.ldk);
      Products::pack_values(v_head_, key, keys, v(), layout_.ldv);
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
    visit_number<kStripVecs>(vecs, [&](auto count) {
      constexpr int kVecs = decltype(count)::value;
      switch (kind) {
        case Kind::open: return attend_block<kVecs, Kind::open>(strip, key, keys, cover, edge);
        case Kind::edge: return attend_block<kVecs, Kind::edge>(strip, key, keys, cover, edge);
        case Kind::modified: return attend_block<kVecs, Kind::modified>(strip, key, keys, cover, edge);
      }
    });
  }

  // One strip of rows against one block of keys: scores, softmax step, values.
  template <int kVecs, Kind kKind>
  void attend_block(const Strip& strip, int64_t key, int keys, Cover cover, [[maybe_unused]] bool edge) {
    constexpr int kLanes = Vec::kLanes;
    const int64_t row = strip.row;
    Vec top[kVecs];
    for (int i = 0; i < kVecs; ++i) top[i] = Vec::load(max_() + row + i * kLanes);
    Real* scores = s();
    score_tile<kVecs, kKind>(strip, top);
    if constexpr (kKind == Kind::modified) {
      modifiers_.apply_tile(scores, kStrip, row, kVecs, key, keys, cover);
      edge ? hide_and_find_top<kVecs>(row, top) : find_top<kVecs>(top);
    }

    Vec shift[kVecs], scale[kVecs];
    for (int i = 0; i < kVecs; ++i) {
      Real* running = max_() + row + i * kLanes;
      const Vec before = Vec::load(running);
      // A row that has seen no key yet subtracts 0: exp2(-inf) is 0, where -inf - -inf were NaN.
      shift[i] = select(Vec::set1(-kInfinity) < top[i], top[i], Vec::zero());
      scale[i] = exp2(before - shift[i]);
      top[i].store(running);
    }
    if (dropout_.on()) {
      weigh<kVecs>(row, shift, scale, [](const Vec* prob, Real* at) {
        for (int key = 0; key < Products::kKeysPerWord; ++key) prob[key].store(at + key * kStrip);
      });
      dropout_.apply_tile(scores, kStrip, row, kVecs, key, keys);
      Products::template put_tile<kVecs, kStrip>(scores);
    } else {
      weigh<kVecs>(row, shift, scale, [scores](const Vec* prob, Real* at) { Products::put(prob, scores, at); });
    }
    Products::template values<kVecs, kStrip>(scores, v(), layout_.ldv, p_.headdim_v, scale, o(strip.index),
                                             [&] { ahead_.step(); });
  }

  // Scores to probabilities, and their sums; put(those of a word, where the first one's score was).
  template <int kVecs, class Put>
  inline __attribute__((always_inline)) void weigh(int64_t row, const Vec (&shift)[kVecs], const Vec (&scale)[kVecs],
                                                   Put&& put) {
    constexpr int kKeys = Products::kKeysPerWord;
    Vec sum[kVecs];
    for (int i = 0; i < kVecs; ++i) sum[i] = Vec::load(sum_() + row + i * Vec::kLanes) * scale[i];
    for (int j = 0; j < kBlockK; j += kKeys)
      for (int i = 0; i < kVecs; ++i) {
        Real* at = s() + j * kStrip + i * Vec::kLanes;
        Vec prob[kKeys];
        for (int key = 0; key < kKeys; ++key) {
          prob[key] = exp2(Vec::load(at + key * kStrip) - shift[i]);
          sum[i] = sum[i] + prob[key];
        }
        put(prob, at);
      }
    for (int i = 0; i < kVecs; ++i) sum[i].store(sum_() + row + i * Vec::kLanes);
  }

  // s = K Q^T; without modifiers the visible range is cut and the maximum taken on the way.
  template <int kVecs, Kind kKind>
  inline __attribute__((always_inline)) void score_tile(const Strip& strip, Vec (&top)[kVecs]) {
    Vec begins[kVecs], ends[kVecs];
    if constexpr (kKind == Kind::edge)
      for (int i = 0; i < kVecs; ++i) {
        begins[i] = Vec::load(begin_() + strip.row + i * Vec::kLanes);
        ends[i] = Vec::load(end_() + strip.row + i * Vec::kLanes);
      }
    const Vec scale = score_scale();
    Products::template scores<kVecs, kStrip>(
        q(strip.index), k(), layout_.ldk, Products::steps(p_.headdim), s(),
        [&](int key, int vec, Vec score) __attribute__((always_inline)) {
          if constexpr (!Products::kScalesQueries) score = score * scale;
          if constexpr (kKind == Kind::edge) score = visible(score, key, begins[vec], ends[vec]);
          if constexpr (kKind != Kind::modified) top[vec] = max(top[vec], score);
          return score;
        },
        [&] { ahead_.step(); });
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

  // The strips' O^T to row-major rows.
  void export_state(const SoftmaxState<Real>& state) {
    for_columns([&](const Strip& strip, int64_t column) {
      const int64_t r = strip.row + column;
      const int rows = static_cast<int>(at_most(Vec::kLanes, block_.rows - r));
      for (int64_t d = 0; d < layout_.ld_out; d += Vec::kLanes) {
        Vec square[Vec::kLanes];
        for (int i = 0; i < Vec::kLanes; ++i) square[i] = Vec::load(o(strip.index) + (d + i) * kStrip + column);
        Vec::transpose(square);
        for (int i = 0; i < rows; ++i) square[i].store(state.o + (r + i) * state.ldo + d);
      }
      Vec::load(max_() + r).store_n(state.max + r, rows);
      Vec::load(sum_() + r).store_n(state.sum + r, rows);
    });
  }

  const AttentionParams& p_;
  const Sequence& sequence_;
  const RowBlock block_;
  const Visibility visibility_;
  const Layout layout_;
  Real* const memory_;
  const ScoreModifiers<Vec> modifiers_;
  const Dropout<Vec> dropout_;
  const KVHead k_head_, v_head_;
  FetchAhead ahead_;
};

}  // namespace
}  // namespace fastattn
