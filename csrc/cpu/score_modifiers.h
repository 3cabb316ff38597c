// What happens to a score between QK^T and the softmax, beyond the visible range: softcap, bias, ALiBi, mask.
//
// Each is a pass over a tile of scores that lies in L1, so features combine freely and the loops around the products
// know none of them. Scores are in units of log2: natural scores times log2(e).
#pragma once

#include <cstring>

#include "cpu/sequence.h"
#include "cpu/vec_math.h"
#include "dispatch.h"

namespace fastattn {
namespace {

enum class Cover { none, some, all };  // how much of a tile a mask leaves

template <class Vec>
class ScoreModifiers {
 public:
  using Real = typename Vec::Real;

  static int64_t reals(const AttentionParams& p, int64_t rows) {
    return p.alibi_slopes ? 2 * round_up(rows, Vec::kLanes) : 0;
  }

  // For `rows` rows, whole vectors: those past the block's end repeat its last one.
  ScoreModifiers(const AttentionParams& p, const Sequence& sequence, const RowBlock& block, int64_t rows, Real* memory)
      : p_(p),
        sequence_(sequence),
        visibility_(p, sequence),
        block_(block),
        cap_(static_cast<Real>(p.softcap * kLog2e)),
        slopes_(memory),
        places_(memory + rows) {
    if (!p.alibi_slopes) return;
    const Real* slopes = static_cast<const Real*>(p.alibi_slopes) + sequence.batch * p.alibi_stride_batch;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = row_at(r);
      slopes_[r] = slopes[visibility_.head(block, row)] * static_cast<Real>(kLog2e);
      places_[r] = static_cast<Real>(visibility_.query(row) + visibility_.offset);
    }
  }

  // Whether apply() does anything under a mask that covers this much.
  bool any(Cover cover) const { return cap_ > 0 || p_.bias.data || p_.alibi_slopes || cover == Cover::some; }

  // What the mask says about rows [row, row + rows) of the block and keys [key, key + keys).
  Cover cover(int64_t row, int64_t rows, int64_t key, int64_t keys) const {
    if (!p_.mask.data) return Cover::all;
    if (is_flat(p_.mask)) rows = 1;
    bool some = false, all = true;
    for (int64_t r = row; r < at_most(block_.rows, row + rows); ++r) {
      if (p_.mask.stride_head == 0 && r > row && visibility_.query(row_at(r)) == visibility_.query(row_at(r - 1)))
        continue;
      const int8_t* line = element<int8_t>(p_.mask, r, key);
      int64_t j = 0;
      if (p_.mask.stride_k == 1)
        for (; j + 8 <= keys; j += 8) {
          uint64_t eight;
          memcpy(&eight, line + j, sizeof eight);
          some |= eight != 0;
          all &= eight == 0x0101010101010101u;
        }
      for (; j < keys; ++j) {
        const bool open = line[j * p_.mask.stride_k] != 0;
        some |= open;
        all &= open;
      }
      if (some && !all) return Cover::some;
    }
    return all ? Cover::all : some ? Cover::some : Cover::none;
  }

  // Rows in the lanes: s[j * ld + i] is key `key` + j of row `row` + i, for vecs * kLanes rows. With `slope`, laid out
  // as s, also the derivative of the softcap.
  void apply_tile(Real* s, int64_t ld, int64_t row, int vecs, int64_t key, int64_t keys, Cover cover,
                  Real* slope = nullptr) const {
    for (int64_t i = 0; i < vecs * Vec::kLanes; i += Vec::kLanes) {
      if (cap_ > 0)
        for (int64_t j = 0; j < keys; ++j) cap(s + j * ld + i, slope ? slope + j * ld + i : nullptr);
      if (p_.bias.data)
        visit_storage<Real>(p_.bias.dtype, [&](auto tag) {
          using T = typename decltype(tag)::type;
          modify_tile<T>(p_.bias, s + i, ld, row + i, key, keys, add_bias);
        });
      if (p_.alibi_slopes)
        for (int64_t j = 0; j < keys; ++j)
          add_alibi(s + j * ld + i, Vec::load(slopes_ + row + i),
                    Vec::load(places_ + row + i) - Vec::set1(static_cast<Real>(key + j)));
      if (cover == Cover::some) modify_tile<int8_t>(p_.mask, s + i, ld, row + i, key, keys, hide);
    }
  }

  // Keys in the lanes: s[j] is key `key` + j of row `row`; s has room for whole vectors.
  void apply_row(Real* s, int64_t row, int64_t key, int64_t keys) const {
    for (int64_t j = 0; j < keys; j += Vec::kLanes) {
      const int n = static_cast<int>(at_most(Vec::kLanes, keys - j));
      if (cap_ > 0) cap(s + j, nullptr);
      if (p_.bias.data)
        visit_storage<Real>(p_.bias.dtype, [&](auto tag) {
          using T = typename decltype(tag)::type;
          add_bias(load_line<T>(p_.bias, row, key + j, n), s + j);
        });
      if (p_.alibi_slopes) {
        Real keys_at[Vec::kLanes];
        for (int i = 0; i < Vec::kLanes; ++i) keys_at[i] = static_cast<Real>(key + j + i);
        add_alibi(s + j, Vec::set1(slopes_[row]), Vec::set1(places_[row]) - Vec::load(keys_at));
      }
      if (p_.mask.data) hide(load_line<int8_t>(p_.mask, row, key + j, n), s + j);
    }
  }

 private:
  static constexpr Real kInfinity = __builtin_inf();
  static constexpr Real kLowest = sizeof(Real) == 8 ? -__DBL_MAX__ : -__FLT_MAX__;

  // Lanes past the block's end repeat its last row.
  int64_t row_at(int64_t r) const { return block_.first_row + at_most(block_.rows - 1, r); }

  bool is_flat(const ScoreView& view) const {  // one line for all rows of the block
    return view.stride_q == 0 && (view.stride_head == 0 || visibility_.group == 1);
  }

  template <class T>
  const T* element(const ScoreView& view, int64_t r, int64_t key) const {
    const int64_t row = row_at(r);
    return static_cast<const T*>(view.data) + sequence_.batch * view.stride_batch +
           visibility_.head(block_, row) * view.stride_head + visibility_.query(row) * view.stride_q +
           key * view.stride_k;
  }

  // n neighbouring keys of one row.
  template <class T>
  Vec load_line(const ScoreView& view, int64_t r, int64_t key, int n) const {
    const T* line = element<T>(view, r, key);
    if (view.stride_k == 1) return n == Vec::kLanes ? Vec::load(line) : Vec::load_n(line, n);
    T gathered[Vec::kLanes] = {};
    for (int i = 0; i < n; ++i) gathered[i] = line[i * view.stride_k];
    return Vec::load(gathered);
  }

  // s[j * ld] = modify(element, s) for kLanes rows from r on: squares of rows by keys, transposed in registers unless
  // neighbouring rows are neighbours in memory.
  template <class T, class Modify>
  void modify_tile(const ScoreView& view, Real* s, int64_t ld, int64_t r, int64_t key, int64_t keys,
                   Modify&& modify) const {
    if (view.stride_q == 1 && visibility_.group == 1 && r + Vec::kLanes <= block_.rows) {
      const T* column = element<T>(view, r, key);
      for (int64_t j = 0; j < keys; ++j) modify(Vec::load(column + j * view.stride_k), s + j * ld);
      return;
    }
    const bool flat = is_flat(view);
    for (int64_t j = 0; j < keys; j += Vec::kLanes) {
      const int n = static_cast<int>(at_most(Vec::kLanes, keys - j));
      Vec square[Vec::kLanes];
      if (flat) {
        Real line[Vec::kLanes];
        load_line<T>(view, r, key + j, n).store(line);
        for (int i = 0; i < n; ++i) modify(Vec::set1(line[i]), s + (j + i) * ld);
      } else {
        for (int i = 0; i < Vec::kLanes; ++i) square[i] = load_line<T>(view, r + i, key + j, n);
        Vec::transpose(square);
        for (int i = 0; i < n; ++i) modify(square[i], s + (j + i) * ld);
      }
    }
  }

  void cap(Real* s, Real* slope) const {
    const Vec t = tanh(Vec::load(s) * Vec::set1(1 / cap_));
    (t * Vec::set1(cap_)).store(s);
    if (slope) (Vec::set1(1) - t * t).store(slope);
  }

  // A bias of the lowest finite number means "almost never", not "never": log2(e) must not carry it to -inf.
  static void add_bias(Vec bias, Real* s) {
    const Vec scaled = bias * Vec::set1(static_cast<Real>(kLog2e));
    const Vec finite = max(Vec::set1(kLowest), scaled);
    (Vec::load(s) + select(Vec::set1(-kInfinity) < bias, finite, scaled)).store(s);
  }

  static void add_alibi(Real* s, Vec slope, Vec distance) { (Vec::load(s) - slope * abs(distance)).store(s); }

  static void hide(Vec open, Real* s) { select(Vec::zero() < open, Vec::load(s), Vec::set1(-kInfinity)).store(s); }

  const AttentionParams& p_;
  const Sequence& sequence_;
  const Visibility visibility_;
  const RowBlock block_;
  const Real cap_;
  Real* const slopes_;  // (rows,) times log2(e)
  Real* const places_;  // (rows,) where the row's query stands among the keys
};

}  // namespace
}  // namespace fastattn
