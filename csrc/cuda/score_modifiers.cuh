// What happens to a score between QK^T and the softmax, and to a probability after it. Scores are in units of log2.
#pragma once

#include "cuda/sequence.cuh"
#include "rng.h"

namespace fastattn {
namespace {

// The scores and probabilities of a warp, as the tensor core leaves them: tile[m][n][e] of lane l is line
// 16 m + 8 (e / 2) + l / 4, column 8 n + 2 (l % 4) + e % 2.
template <class Traits>
using ScoreTile = float[Traits::kRowTiles][Traits::kKeys / 8][4];

// Which of a lane's elements share a row (a query of a head) and which a key. Rows are the tile's lines and keys its
// columns, or the other way round: the gradients of K and V want S^T.
template <class Traits, bool kTransposed>
struct ScoreLayout {
  static constexpr int kLines = 2 * Traits::kRowTiles, kColumns = Traits::kKeys / 4;
  static constexpr int kRows = kTransposed ? kColumns : kLines, kKeys = kTransposed ? kLines : kColumns;
  static constexpr bool kIsTransposed = kTransposed;

  int first_row, first_key;  // of this lane

  FASTATTN_DEVICE ScoreLayout(int warp_line, int tile_column) {
    const int line = warp_line + thread_index() % 32 / 4, column = tile_column + thread_index() % 4 * 2;
    first_row = kTransposed ? column : line;
    first_key = kTransposed ? line : column;
  }

  FASTATTN_DEVICE int row(int r) const { return first_row + (kTransposed ? column(r) : line(r)); }
  FASTATTN_DEVICE int key(int k) const { return first_key + key_step(k); }
  FASTATTN_DEVICE static constexpr int key_step(int k) { return kTransposed ? line(k) : column(k); }
  FASTATTN_DEVICE static float& at(ScoreTile<Traits>& tile, int r, int k) {
    const int l = kTransposed ? k : r, c = kTransposed ? r : k;
    return tile[l / 2][c / 2][l % 2 * 2 + c % 2];
  }

 private:
  FASTATTN_DEVICE static constexpr int line(int i) { return 16 * (i / 2) + 8 * (i % 2); }
  FASTATTN_DEVICE static constexpr int column(int i) { return 8 * (i / 2) + i % 2; }
};

// Hides what the causal mask, the window and the sequence's end hide.
template <class Layout, class Tile>
FASTATTN_DEVICE void hide_invisible(Tile& scores, const Sequence& sequence, Layout at, int split_begin, int split_end) {
#pragma unroll
  for (int r = 0; r < Layout::kRows; ++r) {
    const int query = sequence.query(at.row(r));
    const int begin = at_least(split_begin, sequence.begin(query)) - at.first_key;
    const int end = at_most(split_end, sequence.end(query)) - at.first_key;
#pragma unroll
    for (int k = 0; k < Layout::kKeys; ++k) {
      if (Layout::key_step(k) < begin || Layout::key_step(k) >= end) Layout::at(scores, r, k) = -kInfinity;
    }
  }
}

// One line (batch, head, query) of a score modifier.
template <class Element>
FASTATTN_DEVICE const Element* score_line(const ScoreView& view, int batch, int head, int query) {
  return static_cast<const Element*>(view.data) + batch * view.stride_batch + head * view.stride_head +
         query * view.stride_q;
}

FASTATTN_DEVICE float bias_at(const ScoreView& view, int batch, int head, int query, int key) {
  const int64_t k = key * view.stride_k;
  if (view.dtype == DType::f32) return load_global(score_line<float>(view, batch, head, query) + k);
  if (view.dtype == DType::bf16) return to_float(load_global(score_line<bf16_t>(view, batch, head, query) + k));
  return to_float(load_global(score_line<f16_t>(view, batch, head, query) + k));
}

// The scale and the softcap of a call.
class Softcap {
 public:
  FASTATTN_HOST_DEVICE explicit Softcap(const AttentionParams& p)
      : scale_(static_cast<float>(p.softmax_scale * kLog2e)),
        cap_(static_cast<float>(p.softcap * kLog2e)),
        to_exponent_(cap_ > 0 ? 2.0f * static_cast<float>(p.softmax_scale / p.softcap * kLog2e) : 0.0f) {}

  // tanh(x) = 1 - 2 / (1 + e^2x), in powers of two
  FASTATTN_DEVICE float operator()(float s) const {
    return cap_ > 0 ? cap_ - 2 * cap_ * reciprocal_approx(1 + exp2_approx(s * to_exponent_)) : s * scale_;
  }
  FASTATTN_DEVICE float scale() const { return scale_; }
  // How much of a change of the scaled score comes through, where `capped` came out: 1 - tanh^2.
  FASTATTN_DEVICE float slope(float capped) const {
    return cap_ > 0 ? 1 - capped * capped * reciprocal_approx(cap_ * cap_) : 1.0f;
  }

 private:
  const float scale_, cap_, to_exponent_;
};

// What one row adds to its scores. Rows and keys that do not exist are not looked up.
class RowModifiers {
 public:
  FASTATTN_DEVICE RowModifiers(const AttentionParams& p, const Sequence& sequence, int row)
      : p_(p),
        sequence_(sequence),
        exists_(row < sequence.rows()),
        query_(sequence.query(exists_ ? row : 0)),
        head_(sequence.head(exists_ ? row : 0)),
        slope_(p.alibi_slopes ? kLog2eFloat * load_global(static_cast<const float*>(p.alibi_slopes) +
                                                          sequence.batch * p.alibi_stride_batch + head_)
                              : 0.0f) {}

  // Of a key that it has.
  FASTATTN_DEVICE void apply(float& s, int key) const {
    if (p_.bias.data) {
      const float bias = bias_at(p_.bias, sequence_.batch, head_, query_, key);
      // A bias of the lowest finite number means "almost never": log2(e) must not carry it to -inf.
      s += bias > -kInfinity ? maximum(kLowestFloat, bias * kLog2eFloat) : bias;
    }
    if (p_.alibi_slopes) s -= slope_ * absolute(static_cast<float>(sequence_.place(query_) - key));
    if (p_.mask.data &&
        !load_global(score_line<uint8_t>(p_.mask, sequence_.batch, head_, query_) + key * p_.mask.stride_k))
      s = -kInfinity;
  }

  FASTATTN_DEVICE bool has(int key) const { return exists_ && key < sequence_.seqlen_k; }
  FASTATTN_DEVICE int query() const { return query_; }
  FASTATTN_DEVICE int head() const { return head_; }

 private:
  static constexpr float kLog2eFloat = static_cast<float>(kLog2e);
  const AttentionParams& p_;
  const Sequence& sequence_;
  const bool exists_;
  const int query_, head_;
  const float slope_;
};

// Softcap, bias, ALiBi and mask, and before them the scale.
template <class Layout, class Tile>
FASTATTN_DEVICE void modify_scores(Tile& scores, const AttentionParams& p, const Sequence& sequence, Layout at) {
  const Softcap softcap(p);
#pragma unroll
  for (int r = 0; r < Layout::kRows; ++r) {
    const RowModifiers modifiers(p, sequence, at.row(r));
#pragma unroll
    for (int pair = 0; pair < Layout::kKeys; pair += 2)  // in one loop of all keys nvcc computes every address anew
#pragma unroll
      for (int k = pair; k < pair + 2; ++k) {
        float& s = Layout::at(scores, r, k);
        s = softcap(s);
        if (modifiers.has(at.key(k))) modifiers.apply(s, at.key(k));
      }
  }
}

// visit(r, k, whether dropout drops it) of every element; r is known to the compiler unless transposed. rng.h says
// which word decides. A Philox block serves four neighbouring keys of a row, which lie in different lanes: each draws
// blocks for some of the rows, and they exchange.
template <class Layout, class Visit>
FASTATTN_DEVICE void draw_dropout(const AttentionParams& p, const Sequence& sequence, Layout at, Visit visit) {
  const PhiloxKey key = dropout_key(p.dropout_seed, p.dropout_offset);
  const double words = p.dropout_p * 4294967296.0;
  const uint32_t threshold = words < 4294967296.0 ? static_cast<uint32_t>(words) : 0xffffffffu;
  const auto draw = [&](int query, int head, int k) {
    const int of_batch = sequence.batch * static_cast<int>(p.nheads) + head;
    return philox4x32_10({{static_cast<uint32_t>(at.key(k)) / 4, static_cast<uint32_t>(query),
                           static_cast<uint32_t>(of_batch), kDropoutDomain}},
                         key);
  };
  if constexpr (Layout::kIsTransposed) {
    const int mine = thread_index() / 4 % 4;  // a lane's key is the block's word `mine`
    // Four elements share blocks: of a lane with two rows only, two of each of its keys.
    constexpr int kRowStep = Layout::kRows < 4 ? 2 : 4, kKeyStep = 4 / kRowStep;
    const auto row_step = [](int i) { return kRowStep == 4 ? i : i % 2; };
    const auto key_step = [](int i) { return kRowStep == 4 ? 0 : i / 2; };
#pragma unroll
    for (int r = 0; r < Layout::kRows; r += kRowStep) {
      // This lane draws number `mine` of them; the lane that is `other` away wants its word mine ^ other.
      const int drawn = at.row(r + row_step(mine)), query = sequence.query(drawn), head = sequence.head(drawn);
#pragma unroll
      for (int k = 0; k < Layout::kKeys; k += kKeyStep) {
        const PhiloxBlock block = draw(query, head, k + key_step(mine));
#pragma unroll
        for (int other = 0; other < 4; ++other) {
          const int wanted = mine ^ other;
          const uint32_t low = wanted % 2 ? block.word[1] : block.word[0];
          const uint32_t high = wanted % 2 ? block.word[3] : block.word[2];
          visit(r + row_step(wanted), k + key_step(wanted),
                shuffle_xor(wanted / 2 ? high : low, 4 * other) < threshold);
        }
      }
    }
  } else {
    const int odd = thread_index() % 2;  // two lanes hold a block's four keys
#pragma unroll
    for (int r = 0; r < Layout::kRows; r += 2) {
      const int query = sequence.query(at.row(r + odd)), head = sequence.head(at.row(r + odd));
#pragma unroll
      for (int k = 0; k < Layout::kKeys; k += 2) {
        const PhiloxBlock mine = draw(query, head, k);
        uint32_t word[2][2];  // of this lane's two keys, by row
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const uint32_t other = shuffle_xor(odd ? mine.word[e] : mine.word[2 + e], 1);
          word[0][e] = odd ? other : mine.word[e];
          word[1][e] = odd ? mine.word[2 + e] : other;
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) visit(r + e / 2, k + e % 2, word[e / 2][e % 2] < threshold);
      }
    }
  }
}

FASTATTN_DEVICE float dropout_scale(double p) { return p < 1 ? static_cast<float>(1 / (1 - p)) : 0.0f; }

}  // namespace
}  // namespace fastattn
