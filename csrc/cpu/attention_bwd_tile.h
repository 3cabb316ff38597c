// The gradients of one block of keys (FlashAttention-2's backward, arXiv 2307.08691, on vector registers).
//
// K, V, dK and dV of the block stay in L2 while the rows that see it pass by in strips. Of each strip and kBlockK keys,
// in tiles that live in L1:
//
//   P  = exp2(K Q^T - lse)           rows in the lanes; scores are summed in the forward's order, to the same bits
//                                    (except bf16 where dot products exist but are slow)
//   dS = P * (V dO^T - delta)
//   dV += P^T dO,  dK += dS^T Q      dimensions in the lanes
//   dQ^T += K^T dS                   rows in the lanes; kept for the strip, then added to dQ
//
// A bias is added where dS is taken, so dS, added up over what the bias broadcasts, is its gradient.
#pragma once

#include "cpu/attention_bwd_words.h"

namespace fastattn {
namespace {

template <class Vec, class Words>
class BackwardTile {
 public:
  using Real = typename Vec::Real;
  static constexpr int kStripVecs = Words::kStripVecs;
  static constexpr int kStrip = Words::kStrip;  // rows whose scores are alive at a time

  static int64_t block_keys(const AttentionParams& p) { return Layout(p).keys; }
  static int64_t reals(const AttentionParams& p) { return Layout(p).total; }

  // Keys [first_key, first_key + keys) of one KV head.
  BackwardTile(const AttentionBackwardParams& b, const Sequence& sequence, int64_t head_k, int64_t first_key,
               int64_t keys, Real* memory)
      : b_(b),
        p_(b.fwd),
        sequence_(sequence),
        head_k_(head_k),
        first_key_(first_key),
        keys_(keys),
        visibility_(p_, sequence),
        layout_(p_),
        memory_(memory) {
    const KVHead k_head{p_.kv.k, p_.kv.k_scale, p_.kv, sequence.keys, head_k, p_.headdim};
    const KVHead v_head{p_.kv.v, p_.kv.v_scale, p_.kv, sequence.keys, head_k, p_.headdim_v};
    Words::pack_keys(k_head, first_key, keys, layout_.ldk, k(), k_pairs(), layout_.keys);
    Words::pack_keys(v_head, first_key, keys, layout_.ldv, v(), nullptr, layout_.keys);
    clear(dk(), round_up(keys, kBlockK) * layout_.ldk);
    clear(dv(), round_up(keys, kBlockK) * layout_.ldv);
  }

  // What a strip of at most kStrip rows contributes: dK and dV are added to, dQ waits for store_rows().
  void add_rows(const RowBlock& rows) {
    // Tile registers multiply whole tiles of rows: those past the end weigh nothing.
    const int vecs = Words::kTiles ? kStripVecs : static_cast<int>(ceil_div(rows.rows, Vec::kLanes));
    const Strip strip{rows, vecs, rows.first_row + rows.rows - 1,
                      ScoreModifiers<Vec>(p_, sequence_, rows, vecs * Vec::kLanes, memory_ + layout_.modifiers),
                      Dropout<Vec>(p_, sequence_, rows, vecs * Vec::kLanes, memory_ + layout_.dropout)};
    Words::visit_rows(p_.dtype, [&](auto tag) { pack_rows<typename decltype(tag)::type>(strip); });
    clear(dq(), layout_.ldk * kStrip);
    clear(sums(), kStrip);
    const int64_t begin = at_least(first_key_, visibility_.begin(rows.first_row) / kKeyStep * kKeyStep);
    const int64_t end = at_most(first_key_ + keys_, visibility_.end(strip.last_row));
    for (int64_t key = begin; key < end; key += kBlockK) tile(strip, key, at_most(kBlockK, end - key));
  }

  // What of add_rows(rows) waits, into its place; the first block of keys overwrites what is there.
  void store_rows(const RowBlock& rows, bool overwrite) {
    const Vec scale = Vec::set1(static_cast<Real>(p_.softmax_scale));
    for (int64_t r = 0; r < rows.rows; r += Vec::kLanes)
      for (int64_t d = 0; d < p_.headdim; d += Vec::kLanes) {
        Vec square[Vec::kLanes];
        for (int i = 0; i < Vec::kLanes; ++i) square[i] = Vec::load(dq() + (d + i) * kStrip + r);
        Vec::transpose(square);
        for (int i = 0; i < at_most(Vec::kLanes, rows.rows - r); ++i) {
          const int64_t row = rows.first_row + r + i;
          Real* to = sequence_.query<Real>(b_.dq, visibility_.query(row), visibility_.head(rows, row)) + d;
          const Vec before = overwrite ? Vec::zero() : load_scaled<Vec>(to, static_cast<int>(p_.headdim - d), nullptr);
          store_first(fma(square[i], scale, before), to, p_.headdim - d);
        }
      }
    if (has_bias_per_row())
      for (int64_t r = 0; r < rows.rows; ++r) *bias_element(rows, r, 0) += sums()[r];
  }

  // dK and dV, once all rows are in.
  void store_dkv() {
    Words::visit_rows(p_.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      store_keys<T>(b_.dk, dk(), layout_.ldk, p_.headdim, static_cast<Real>(p_.softmax_scale));
      store_keys<T>(b_.dv, dv(), layout_.ldv, p_.headdim_v, Dropout<Vec>::scale(p_));
    });
  }

 private:
  static constexpr int kPer = Words::kPerWord;
  static constexpr int kTileWords = kBlockK * kStrip / kPer;
  static constexpr int kKeyStep = Words::kKeyStep;
  static_assert(kKeyStep % Vec::kLanes == 0, "whole squares");
  static_assert(kBlockK % kBiasSlotKeys == 0 && kBiasSlotKeys % kKeyStep == 0, "items and squares within slots");
  static_assert(kKeyStep % Vec::kTileCols == 0 && kKeyStep % OuterTile<Vec>::cols(1) == 0, "whole register tiles");

  struct Strip {
    RowBlock rows;
    int vecs;
    int64_t last_row;
    ScoreModifiers<Vec> modifiers;
    Dropout<Vec> dropout;
  };

  // Where each array starts in the item's memory; every row is a whole number of vectors, also of words.
  struct Layout {
    int64_t total = 0;
    const int64_t ldk, ldv, keys;  // headdim and headdim_v rounded up; keys per block
    const int64_t k, k_pairs, v, dk, dv, q, q_t, dout, dout_t, dq, weights, dscores, extra, words, lse, lse_low, delta,
        begin, end, sums;
    const int64_t modifiers, dropout;

    explicit Layout(const AttentionParams& p)
        : ldk(round_up(p.headdim, kPer * Vec::kLanes)),
          ldv(round_up(p.headdim_v, kPer * Vec::kLanes)),
          keys(at_most(kMaxKeys, at_least(kBlockK, kBlockReals / (2 * (ldk + ldv)) / kBlockK * kBlockK))),
          k(take(keys * ldk / kPer)),
          k_pairs(kPer > 1 ? take(keys * ldk / kPer) : k),
          v(take(keys * ldv / kPer)),
          dk(take(keys * ldk)),
          dv(take(keys * ldv)),
          q(take(kStrip * ldk / kPer)),
          q_t(take(kStrip * ldk / kPer)),
          dout(take(kStrip * ldv / kPer)),
          dout_t(take(kStrip * ldv / kPer)),
          dq(take(kStrip * ldk)),
          weights(take(kBlockK * kStrip)),
          dscores(take(kBlockK * kStrip)),
          extra(take(kBlockK * kStrip)),
          words(take(kPer > 1 ? 3 * kTileWords : 0)),
          lse(take(kStrip)),
          lse_low(take(kStrip)),
          delta(take(kStrip)),
          begin(take(kStrip)),
          end(take(kStrip)),
          sums(take(kStrip)),
          modifiers(take(ScoreModifiers<Vec>::reals(p, kStrip))),
          dropout(take(Dropout<Vec>::reals(p, kStrip))) {}

    int64_t take(int64_t reals) {
      const int64_t start = total;
      total += reals;
      return start;
    }
  };
  // K, V, dK and dV fill at most half of an L2 of 1 MiB.
  static constexpr int64_t kBlockReals = (int64_t{1} << 19) / static_cast<int64_t>(sizeof(Real));
  static constexpr int64_t kMaxKeys = 256;

  Real* k() const { return memory_ + layout_.k; }              // (keys, ldk), words along the dimensions
  Real* k_pairs() const { return memory_ + layout_.k_pairs; }  // (keys, ldk), words along the keys, or its transpose
  Real* v() const { return memory_ + layout_.v; }              // (keys, ldv), words along the dimensions
  Real* dk() const { return memory_ + layout_.dk; }            // (keys, ldk)
  Real* dv() const { return memory_ + layout_.dv; }            // (keys, ldv)
  Real* q() const { return memory_ + layout_.q; }              // (kStrip, ldk), words along the rows
  Real* q_t() const { return memory_ + layout_.q_t; }          // (ldk, kStrip), words along the dimensions
  Real* dout() const { return memory_ + layout_.dout; }        // (kStrip, ldv), words along the rows
  Real* dout_t() const { return memory_ + layout_.dout_t; }    // (ldv, kStrip), words along the dimensions
  Real* dq() const { return memory_ + layout_.dq; }            // (ldk, kStrip)
  Real* weights() const { return memory_ + layout_.weights; }  // (kBlockK, kStrip), scores, then P
  Real* dscores() const { return memory_ + layout_.dscores; }  // (kBlockK, kStrip), dP, then dS
  Real* extra() const { return memory_ + layout_.extra; }      // (kBlockK, kStrip), the softcap's slope or dropped P
  Real* lse() const { return memory_ + layout_.lse; }          // (kStrip,), in log2; +inf where nothing is weighed
  Real* lse_low() const { return memory_ + layout_.lse_low; }  // (kStrip,), what rounding took off it
  Real* delta() const { return memory_ + layout_.delta; }      // (kStrip,)
  Real* begin() const { return memory_ + layout_.begin; }      // (kStrip,), visible keys from the tile's first key on
  Real* end() const { return memory_ + layout_.end; }          // (kStrip,)
  Real* sums() const { return memory_ + layout_.sums; }        // (kStrip,), dS over the block's keys

  Real* words(int i) const { return memory_ + layout_.words + i * kTileWords; }  // of a tile

  // To scores in log2.
  Real score_scale() const { return static_cast<Real>(p_.softmax_scale * kLog2e); }

  static void clear(Real* x, int64_t reals) {
    for (int64_t i = 0; i < reals; i += Vec::kLanes) Vec::zero().store(x + i);
  }

  // Q and dO as they are and transposed, and what the forward knows about each row.
  template <class T>
  void pack_rows(const Strip& strip) {
    const T *q_rows[kStrip], *dout_rows[kStrip];
    for (int64_t r = 0; r < strip.vecs * Vec::kLanes; ++r) {
      const int64_t row = at_most(strip.last_row, strip.rows.first_row + r);
      const int64_t query = visibility_.query(row), head = visibility_.head(strip.rows, row);
      q_rows[r] = sequence_.query<const T>(p_.q, query, head);
      dout_rows[r] = sequence_.query<const T>(b_.dout, query, head);
      const int64_t at = statistic(p_, sequence_, query, head);
      const double row_lse = static_cast<const Real*>(p_.lse)[at] * kLog2e;
      const bool empty = r >= strip.rows.rows || row_lse == -kInfinity;
      lse()[r] = empty ? kInfinity : static_cast<Real>(row_lse);
      lse_low()[r] = empty ? 0 : static_cast<Real>(row_lse - static_cast<double>(lse()[r]));
      delta()[r] = static_cast<const Real*>(b_.delta)[at];
    }
    Words::pack_panel(q_rows, strip.vecs, p_.headdim, layout_.ldk, score_scale(), q(), q_t());
    Words::pack_panel(dout_rows, strip.vecs, p_.headdim_v, layout_.ldv, 1, dout(), dout_t());
  }

  // One strip of rows against keys [key, key + keys), at most kBlockK of them; key is a multiple of kKeyStep.
  void tile(const Strip& strip, int64_t key, int64_t keys) {
    const Cover cover = strip.modifiers.cover(0, strip.vecs * Vec::kLanes, key, keys);
    if (cover == Cover::none) return;
    const int64_t columns = round_up(keys, kKeyStep), local = key - first_key_;
    const Real* dropped = strip.dropout.on() ? extra() : weights();
    const auto meet = [&](auto number) {
      constexpr int kVecs = decltype(number)::value;
      weigh<kVecs>(strip, k() + local * layout_.ldk / kPer, key, keys, columns, cover);
      differentiate<kVecs>(strip, v() + local * layout_.ldv / kPer, key, keys, columns);
      if (b_.dbias.data) add_dbias<kVecs>(strip, key, keys);
      if (p_.softcap > 0) uncap<kVecs>(keys);
      const Real* prob = Words::template along_rows<kVecs>(dropped, columns, words(0));
      const Real* dscore = Words::template along_rows<kVecs>(dscores(), columns, words(1));
      add_inner<Words, kVecs>(Words::template along_keys<kVecs>(dscores(), dscore, columns, words(2)),
                              k_pairs() + Words::pairs_at(local, layout_.ldk, layout_.keys),
                              Words::pairs_ld(layout_.ldk, layout_.keys), p_.headdim, columns, dq());
      add_dkv(strip, key, columns, prob, dscore);
    };
    if constexpr (Words::kTiles)
      meet(Number<kStripVecs>{});
    else
      visit_number<kStripVecs>(strip.vecs, meet);
  }

  // dV += P^T dO, dK += dS^T Q
  void add_dkv(const Strip& strip, int64_t key, int64_t columns, const Real* prob, const Real* dscore) {
    const auto rows_of = [&](int64_t j, int64_t n) {
      const int64_t first = visibility_.first_row(key + j) - strip.rows.first_row;
      const int64_t last = at_most(strip.last_row, visibility_.last_row(key + j + n - 1)) - strip.rows.first_row;
      return RowRange{at_least(0, first), last + 1};
    };
    Real *own_dk = dk() + (key - first_key_) * layout_.ldk, *own_dv = dv() + (key - first_key_) * layout_.ldv;
    add_outer<Words>(prob, dout(), layout_.ldv, p_.headdim_v, columns, own_dv, rows_of);
    add_outer<Words>(dscore, q(), layout_.ldk, p_.headdim, columns, own_dk, rows_of);
  }

  // weights = P
  template <int kVecs>
  void weigh(const Strip& strip, const Real* block_k, int64_t key, int64_t keys, int64_t columns, Cover cover) {
    Vec high[kVecs], low[kVecs];
    for (int i = 0; i < kVecs; ++i) {
      high[i] = Vec::load(lse() + i * Vec::kLanes);
      low[i] = Vec::load(lse_low() + i * Vec::kLanes);
    }
    const Vec scale = Vec::set1(Words::kScalesRows ? 1 : score_scale());
    const auto scaled = [&](Vec product) { return Words::kScalesRows ? product : product * scale; };
    // At most 1, also where lse comes from elsewhere: exp2 ends at 2^126.
    const auto weight = [&](Vec score, int vec) { return exp2(min(Vec::zero(), score - high[vec] - low[vec])); };
    const auto multiply = [&](auto finish) __attribute__((always_inline)) {
      score_products<Words, kVecs>(q_t(), block_k, layout_.ldk / kPer, p_.headdim, columns, weights(), finish);
    };
    const bool modified = strip.modifiers.any(cover);
    const bool edge = visibility_.end(strip.rows.first_row) < key + columns || visibility_.begin(strip.last_row) > key;
    if (!modified && !edge)
      return multiply([&](int64_t, int vec, Vec product) { return weight(scaled(product), vec); });
    Vec begins[kVecs], ends[kVecs];
    find_range<kVecs>(strip, key, begins, ends);
    const auto visible_weight = [&](int64_t j, int vec, Vec score) {
      const Vec at = Vec::set1(static_cast<Real>(j));
      return select((begins[vec] <= at) & (at < ends[vec]), weight(score, vec), Vec::zero());
    };
    if (!modified)
      return multiply([&](int64_t j, int vec, Vec product) { return visible_weight(j, vec, scaled(product)); });
    multiply([&](int64_t, int, Vec product) { return scaled(product); });
    strip.modifiers.apply_tile(weights(), kStrip, 0, kVecs, key, keys, cover, p_.softcap > 0 ? extra() : nullptr);
    for_tile<Words, kVecs>(columns, [&](int64_t j, int vec, int64_t at) {
      visible_weight(j, vec, Vec::load(weights() + at)).store(weights() + at);
    });
  }

  // Which keys each row sees, counted from `key`.
  template <int kVecs>
  void find_range(const Strip& strip, int64_t key, Vec (&begins)[kVecs], Vec (&ends)[kVecs]) {
    for (int64_t r = 0; r < kVecs * Vec::kLanes; ++r) {
      const int64_t row = at_most(strip.last_row, strip.rows.first_row + r);
      begin()[r] = static_cast<Real>(at_least(0, visibility_.begin(row) - key));
      end()[r] = static_cast<Real>(at_least(0, at_most(kBlockK, visibility_.end(row) - key)));
    }
    for (int i = 0; i < kVecs; ++i) {
      begins[i] = Vec::load(begin() + i * Vec::kLanes);
      ends[i] = Vec::load(end() + i * Vec::kLanes);
    }
  }

  // dscores = P * (dP - delta); with dropout also the P that dV sees.
  template <int kVecs>
  void differentiate(const Strip& strip, const Real* block_v, int64_t key, int64_t keys, int64_t columns) {
    Vec delta_of[kVecs];
    for (int i = 0; i < kVecs; ++i) delta_of[i] = Vec::load(delta() + i * Vec::kLanes);
    const auto multiply = [&](auto finish) __attribute__((always_inline)) {
      score_products<Words, kVecs>(dout_t(), block_v, layout_.ldv / kPer, p_.headdim_v, columns, dscores(), finish);
    };
    if (!strip.dropout.on())
      return multiply([&](int64_t j, int vec, Vec dprob) {
        return Vec::load(weights() + j * kStrip + vec * Vec::kLanes) * (dprob - delta_of[vec]);
      });
    multiply([](int64_t, int, Vec dprob) { return dprob; });
    for_tile<Words, kVecs>(columns, [&](int64_t, int, int64_t at) { Vec::load(weights() + at).store(extra() + at); });
    strip.dropout.apply_tile(dscores(), kStrip, 0, kVecs, key, keys, extra());
    const Vec scale = Vec::set1(Dropout<Vec>::scale(p_));
    for_tile<Words, kVecs>(columns, [&](int64_t, int vec, int64_t at) {
      const Vec dprob = Vec::load(dscores() + at) * scale;
      (Vec::load(weights() + at) * (dprob - delta_of[vec])).store(dscores() + at);
    });
  }

  // From the gradient of the capped score to that of K Q^T.
  template <int kVecs>
  void uncap(int64_t keys) {
    for_tile<Words, kVecs>(keys, [&](int64_t, int, int64_t at) {
      (Vec::load(dscores() + at) * Vec::load(extra() + at)).store(dscores() + at);
    });
  }

  // A bias with one value for all keys of a row: blocks of keys share its gradient, which so waits as dQ does.
  bool has_bias_per_row() const { return b_.dbias.data && b_.dbias.stride_k == 0; }

  Real* bias_element(const RowBlock& rows, int64_t r, int64_t key) const {
    const int64_t row = rows.first_row + r;
    return static_cast<Real*>(b_.dbias.data) + sequence_.batch * b_.dbias.stride_batch +
           visibility_.head(rows, row) * b_.dbias.stride_head + visibility_.query(row) * b_.dbias.stride_q +
           key * b_.dbias.stride_k + key / kBiasSlotKeys * b_.dbias_stride_slot;
  }

  template <int kVecs>
  void add_dbias(const Strip& strip, int64_t key, int64_t keys) {
    if (has_bias_per_row())
      return for_tile<Words, kVecs>(keys, [&](int64_t, int vec, int64_t at) {
        Real* sum = sums() + vec * Vec::kLanes;
        (Vec::load(sum) + Vec::load(dscores() + at)).store(sum);
      });
    if (b_.dbias.stride_q == 1 && visibility_.group == 1) return add_dbias_columns(strip, key, keys);
    for (int64_t r = 0; r < strip.rows.rows; r += Vec::kLanes)
      for (int64_t j = 0; j < keys; j += Vec::kLanes) {  // squares of keys by rows, transposed in registers
        Vec square[Vec::kLanes];
        for (int i = 0; i < Vec::kLanes; ++i) square[i] = Vec::load(dscores() + (j + i) * kStrip + r);
        Vec::transpose(square);
        const int n = static_cast<int>(at_most(Vec::kLanes, keys - j));
        for (int i = 0; i < at_most(Vec::kLanes, strip.rows.rows - r); ++i) {
          Real* sum = bias_element(strip.rows, r + i, key + j);
          if (b_.dbias.stride_k == 1)
            (load_scaled<Vec>(sum, n, nullptr) + square[i]).store_n(sum, n);
          else
            add_strided(square[i], n, sum);
        }
      }
  }

  // Neighbouring rows are neighbours in memory. Those of a diagonal's next key begin one element before: keys are taken
  // a vector apart, so that no load waits for half of what the last store wrote.
  void add_dbias_columns(const Strip& strip, int64_t key, int64_t keys) {
    for (int64_t first = 0; first < at_most(Vec::kLanes, keys); ++first)
      for (int64_t j = first; j < keys; j += Vec::kLanes) {
        Real* column = bias_element(strip.rows, 0, key + j);
        for (int64_t r = 0; r < strip.rows.rows; r += Vec::kLanes) {
          const int n = static_cast<int>(at_most(Vec::kLanes, strip.rows.rows - r));
          Real* sum = column + r;
          store_first(load_scaled<Vec>(sum, n, nullptr) + Vec::load(dscores() + j * kStrip + r), sum, n);
        }
      }
  }

  void add_strided(Vec x, int n, Real* sum) const {
    Real lanes[Vec::kLanes];
    x.store(lanes);
    for (int i = 0; i < n; ++i) sum[i * b_.dbias.stride_k] += lanes[i];
  }

  template <class T>
  void store_keys(const TensorView& view, const Real* rows, int64_t ld, int64_t dim, Real scale) {
    const KeyRows<T> to(view, p_.kv, sequence_.keys, head_k_);
    const Vec factor = Vec::set1(scale);
    for (int64_t j = 0; j < keys_; ++j)
      for (int64_t d = 0; d < dim; d += Vec::kLanes)
        store_first(Vec::load(rows + j * ld + d) * factor, to[first_key_ + j] + d, dim - d);
  }

  const AttentionBackwardParams& b_;
  const AttentionParams& p_;
  const Sequence& sequence_;
  const int64_t head_k_, first_key_, keys_;
  const Visibility visibility_;
  const Layout layout_;
  Real* const memory_;
};

}  // namespace
}  // namespace fastattn
