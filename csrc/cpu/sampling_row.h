// What every step of sampling shares: a row of logits that can be searched without reading it again, the order of its
// tokens, and the lists of the tokens that are still in the running.
#pragma once

#include <cstdint>
#include <cstring>

#include "params.h"
#include "sampling_order.h"

namespace fastattn {
namespace {

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

  // Merges entries first.. into those before them, both by ascending id; `spare_ids` has room for as many as `work`.
  void merge(int64_t first, int32_t* spare_ids) {
    int64_t from = first, to = n, m = n - first;
    if (m == 0 || first == 0 || ids[first - 1] < ids[first]) return;
    memcpy(work, values + first, static_cast<size_t>(m) * sizeof *values);
    memcpy(spare_ids, ids + first, static_cast<size_t>(m) * sizeof *ids);
    while (m > 0) {  // from the back
      const bool second = from == 0 || ids[from - 1] < spare_ids[m - 1];
      const int64_t i = second ? --m : --from;
      values[--to] = second ? work[i] : values[i];
      ids[to] = second ? spare_ids[i] : ids[i];
    }
  }
};

// Tokens whose logits were edited one by one, by ascending id; the row itself leaves them out. Behind the values are
// -inf, up to a multiple of kVecs vectors.
struct EditedTokens {
  static constexpr int kVecs = 4;
  const float* values = nullptr;
  const int32_t* ids = nullptr;
  int64_t n = 0;
};

template <class Vec>
inline float to_single(const float* x) {
  return *x;
}

template <class Vec>
inline float to_single(const bf16_t* x) {
  return bits_as<float>(uint32_t{x->bits} << 16);
}

template <class Vec>
inline float to_single(const f16_t* x) {
  return Vec::single(x);
}

inline void store_minus_infinity(float* p) { *p = kMinusInfinity; }
inline void store_minus_infinity(bf16_t* p) { p->bits = 0xff80; }
inline void store_minus_infinity(f16_t* p) { p->bits = 0xfc00; }

// A row in chunks of kChunkVecs vectors, the last one padded with -inf; where there are bits, tokens whose bit is 0 are
// -inf too; and the edited tokens beside it. summarize() reads the row once and notes the maximum of each lane of each
// chunk: a sixteenth of the row, by which later passes find the chunks that matter. Those maxima are a row themselves,
// and the maxima of its chunks, the tops, find those of its chunks that matter.
template <class Vec, class T>
class Row {
 public:
  static constexpr int kChunkVecs = 16;
  static constexpr int kChunk = kChunkVecs * Vec::kLanes;
  static constexpr int kWord = 64, kWords = kChunk / kWord;  // tokens whose comparisons share a word, those of a chunk
  static constexpr int kPadding = 8 * Vec::kLanes;           // maxima that the race reads at once

  static int64_t chunks_of(int64_t size) { return (size + kChunk - 1) / kChunk; }
  static int64_t maxima_of(int64_t size) { return chunks_of(size) * Vec::kLanes; }
  static int64_t tops_of(int64_t size) { return maxima_of(maxima_of(size)); }
  static int64_t summary_of(int64_t size) { return padded(maxima_of(size)) + tops_of(size); }

  // `summary` has room for summary_of(size) floats: the maxima, -inf up to a multiple of kPadding, and the tops.
  Row(const T* data, int64_t size, float* summary, const uint8_t* bits = nullptr, EditedTokens edited = {})
      : data_(data),
        size_(size),
        whole_(size / kChunk),
        bits_(bits),
        maxima_(summary),
        tops_(summary + padded(maxima_of(size))),
        edited_(edited) {
    const int64_t left = size - whole_ * kChunk;
    memcpy(static_cast<void*>(tail_), data + whole_ * kChunk, static_cast<size_t>(left) * sizeof(T));
    for (int64_t i = left; i < kChunk; ++i) store_minus_infinity(tail_ + i);
    if (bits) memcpy(tail_bits_, bits + whole_ * (kChunk / 8), static_cast<size_t>((left + 7) / 8));
  }

  int64_t size() const { return size_; }
  int64_t chunks() const { return chunks_of(size_); }
  const float* maxima() const { return maxima_; }
  const float* tops() const { return tops_; }
  Row<Vec, float> row_of_maxima() const { return {maxima_, maxima_of(size_), tops_}; }
  const EditedTokens& edited() const { return edited_; }

  // Vector i of chunk c.
  inline __attribute__((always_inline)) Vec load(int64_t c, int i) const {
    const Vec x = Vec::load(chunk(c) + i * Vec::kLanes);
    return bits_ ? select(Vec::lanes_of(lanes_counting(c, i)), x, Vec::set1(kMinusInfinity)) : x;
  }

  // Bit i: whether token 64 * word + i of chunk c has a logit >= least.
  inline __attribute__((always_inline)) uint64_t reaching(int64_t c, int word, Vec least) const {
    const T* x = chunk(c) + word * kWord;
    uint64_t hits = 0;
#pragma GCC unroll 16
    for (int lane = 0; lane < kWord; lane += Vec::kLanes)
      hits |= uint64_t{lane_bits(least <= Vec::load(x + lane))} << lane;
    if (!bits_) return hits;
    uint64_t counting = 0;
    memcpy(&counting, bits_of(c) + word * (kWord / 8), kWord / 8);
    return hits & counting;
  }

  float at(int64_t id) const {
    const bool counts = !bits_ || bits_[id / 8] >> id % 8 & 1;
    return counts ? to_single<Vec>(data_ + id) : kMinusInfinity;
  }

  // Fills the summary; false if the row has a NaN, even one that a bit leaves out. beside() is called once a chunk:
  // work that fills the time which reading takes.
  template <class Beside>
  bool summarize(Beside&& beside) {
    return bits_ ? summarize_chunks<true>(beside) : summarize_chunks<false>(beside);
  }

  bool summarize() {
    return summarize([] {});
  }

  // The same of the edited tokens.
  bool summarize_edited() {
    Vec top = Vec::set1(kMinusInfinity);
    auto good = top <= top;
    for (int64_t i = 0; i < edited_.n; i += EditedTokens::kVecs * Vec::kLanes) {
      Vec x[EditedTokens::kVecs];
      load_edited(i, x);
      good = both_ordered(both_ordered(good, x[0], x[1]), x[2], x[3]);
      top = max(top, max(max(x[0], x[1]), max(x[2], x[3])));
    }
    top_of_edited_ = reduce_max(top);
    return lane_count(good) == Vec::kLanes;
  }

  float maximum() const {
    Vec top = Vec::set1(top_of_edited_);
    const int64_t n = tops_of(size_);
    for (int64_t i = 0; i < n; i += Vec::kLanes) top = max(top, Vec::load(tops_ + i));
    return reduce_max(top);
  }

  // visit(chunk, its first id) for the chunks whose largest logit is in [least, most), in order.
  template <class Visit>
  void visit_chunks(float least, float most, Visit&& visit) const {
    const Vec low = Vec::set1(least), high = Vec::set1(most);
    for (int64_t first = 0; first < chunks(); first += kChunkVecs) {
      if (!reaches(tops_ + first / kChunkVecs * Vec::kLanes, low)) continue;
      for (int64_t c = first; c < first + kChunkVecs && c < chunks(); ++c) {
        const float* maxima = maxima_ + c * Vec::kLanes;
        if (reaches(maxima, low) && !reaches(maxima, high)) visit(c, static_cast<int32_t>(c * kChunk));
      }
    }
  }

  // The lowest id whose logit is `value`, which must be the maximum.
  int32_t find_maximum(float value) const {
    const Vec wanted = Vec::set1(value);
    int32_t best = INT32_MAX;
    for (int64_t i = 0; i < edited_.n && best == INT32_MAX; i += Vec::kLanes)
      if (const uint32_t hits = lane_bits(wanted <= Vec::load(edited_.values + i)))
        best = edited_.ids[i + __builtin_ctz(hits)];
    int64_t c = 0;
    while (c < chunks() && !reaches(tops_ + c / kChunkVecs * Vec::kLanes, wanted)) c += kChunkVecs;
    for (; c < chunks(); ++c)
      if (reaches(maxima_ + c * Vec::kLanes, wanted))
        for (int i = 0;; ++i)
          if (const uint32_t hits = lane_bits(wanted <= load(c, i))) {
            const auto id = static_cast<int32_t>(c * kChunk + i * Vec::kLanes + __builtin_ctz(hits));
            return id < best ? id : best;
          }
    return best;
  }

  // The tokens with logit >= bound, which is finite; or only the first of the row, at least `enough`.
  void gather(float bound, Candidates* out, int64_t enough = INT64_MAX) const {
    const Vec least = Vec::set1(bound);
    int64_t n = 0;
    for (int64_t first = 0; first < chunks() && n < enough; first += kTogether) {
      int32_t visited[kTogether];
      int visits = 0;
      for (int64_t c = first; c < first + kTogether && c < chunks(); ++c) {
        visited[visits] = static_cast<int32_t>(c);
        visits += reaches(maxima_ + c * Vec::kLanes, least);
      }
      n += take_chunks(visited, visits, least, enough - n, out->values + n, out->ids + n);
    }
    out->n = n;
    take_edited(least, enough, out);
    out->merge(n, reinterpret_cast<int32_t*>(out->work + out->n));
  }

  // The same in no order, from a list of maxima, as row_of_maxima() numbers them, among which are all that are >=
  // bound. False if the tokens are more than `most`: then what `c` holds means nothing.
  bool gather_from_maxima(float bound, int64_t most, Candidates* c) const {
    const Vec least = Vec::set1(bound);
    auto* reached = reinterpret_cast<int32_t*>(c->work);
    int64_t m = 0, n = 0;
    for (int64_t i = 0; i < c->n; ++i) {
      reached[m] = c->ids[i];
      m += c->values[i] >= bound;
    }
    int32_t members[Vec::kLanes];  // a maximum is that of a lane, of every kLanes-th token
    for (int i = 0; i < Vec::kLanes; ++i) members[i] = i * Vec::kLanes;
    for (int64_t i = 0; i < m && n <= most; ++i) {
      const int32_t c_of_lane = reached[i] / Vec::kLanes, lane = reached[i] % Vec::kLanes;
      const T* x = chunk(c_of_lane) + lane;
#pragma GCC unroll 4
      for (int place = lane; place < kChunk; place += Vec::kLanes * Vec::kLanes, x += Vec::kLanes * Vec::kLanes)
        for (uint32_t hits = lane_bits(least <= Vec::gather(x, members)); hits; hits &= hits - 1) {
          const int32_t id = c_of_lane * kChunk + place + __builtin_ctz(hits) * Vec::kLanes;
          c->values[n] = at(id) + 0.0f;  // -0 becomes +0: equal logits have equal bits
          c->ids[n] = id;
          n += c->values[n] >= bound;  // unless its bit is 0
        }
    }
    c->n = n;
    take_edited(least, most, c);
    return c->n <= most;
  }

 private:
  static int64_t padded(int64_t maxima) { return (maxima + kPadding - 1) / kPadding * kPadding; }

  static bool reaches(const float* maxima, Vec least) { return lane_bits(least <= Vec::load(maxima)) != 0; }

  const T* chunk(int64_t c) const { return c < whole_ ? data_ + c * kChunk : tail_; }

  const uint8_t* bits_of(int64_t c) const { return c < whole_ ? bits_ + c * (kChunk / 8) : tail_bits_; }

  uint32_t lanes_counting(int64_t c, int i) const {
    const uint8_t* bits = bits_of(c);
    if constexpr (Vec::kLanes < 8) {
      return bits[i / 2] >> i % 2 * Vec::kLanes & ((1u << Vec::kLanes) - 1);
    } else {
      uint32_t lanes = 0;
      memcpy(&lanes, bits + i * (Vec::kLanes / 8), Vec::kLanes / 8);  // little-endian, as every target is
      return lanes;
    }
  }

  // The tokens with logit >= least of some chunks, or at least `enough` of them; returns how many. Which vectors they
  // are in cannot be foreseen where they are few: so that nothing waits for a branch, comparisons come first, and leave
  // a list of words that have hits.
  static constexpr int kTogether = 32;  // chunks at most
  int64_t take_chunks(const int32_t* visited, int visits, Vec least, int64_t enough, float* values,
                      int32_t* ids) const {
    uint64_t hits[kTogether * kWords];
    int32_t places[kTogether * kWords];  // of each word's first token
    int words = 0;
    for (int v = 0; v < visits; ++v)
#pragma GCC unroll 4
      for (int w = 0; w < kWords; ++w) {
        const uint64_t some = reaching(visited[v], w, least);
        hits[words] = some;
        places[words] = visited[v] * kChunk + w * kWord;
        words += some != 0;
      }
    int64_t n = 0;
    for (int w = 0; w < words && n < enough; ++w) n += take(hits[w], places[w], least, values + n, ids + n);
    return n;
  }

  // Edited tokens join the list, at least `enough` of them if there are so many.
  void take_edited(Vec least, int64_t enough, Candidates* out) const {
    const int64_t own = out->n;
    int64_t n = own;
    for (int64_t first = 0; first < edited_.n && n - own < enough; first += EditedTokens::kVecs * Vec::kLanes) {
      Vec x[EditedTokens::kVecs];
      load_edited(first, x);
      if (!lane_bits(least <= max(max(x[0], x[1]), max(x[2], x[3])))) continue;
      for (int v = 0; v < EditedTokens::kVecs; ++v)
        for (uint32_t hits = lane_bits(least <= x[v]); hits; hits &= hits - 1, ++n) {
          const int64_t i = first + v * Vec::kLanes + __builtin_ctz(hits);
          out->values[n] = edited_.values[i] + 0.0f;  // -0 becomes +0: equal logits have equal bits
          out->ids[n] = edited_.ids[i];
        }
    }
    out->n = n;
  }

  // The tokens of a word of hits: some at a time, that many or not, since how many cannot be foreseen; or where there
  // are many, a vector at a time.
  int64_t take(uint64_t hits, int32_t place, Vec least, float* values, int32_t* ids) const {
    int64_t n = 0;
    if (__builtin_popcountll(hits) > kWord / 4) {
      for (int i = 0; i < kWord; i += Vec::kLanes) {
        const int32_t id = place + i;
        const Vec v = load(id / kChunk, id % kChunk / Vec::kLanes) + Vec::zero();
        n += Vec::compress(least <= v, v, id, values + n, ids + n);
      }
      return n;
    }
    constexpr int kSome = 4;
    const int all = __builtin_popcountll(hits);
    for (; n < all; n += kSome)
#pragma GCC unroll 4
      for (int i = 0; i < kSome; ++i) {
        ids[n + i] = place + __builtin_ctzll(hits);
        values[n + i] = to_single<Vec>(data_ + ids[n + i]) + 0.0f;  // -0 becomes +0: equal logits have equal bits
        hits = hits & (hits - 1) ? hits & (hits - 1) : hits;
      }
    return all;
  }

  template <bool kHasBits, class Beside>
  bool summarize_chunks(Beside&& beside) {
    const Vec none = Vec::set1(kMinusInfinity);
    auto good = none <= none, good_too = good;  // two: they are chains of comparisons
    for (int64_t first = 0; first < chunks(); first += kChunkVecs) {
      Vec top_of_all = none;
      for (int64_t c = first; c < first + kChunkVecs && c < chunks(); ++c) {
        const T* x = chunk(c);
        Vec top = none;
#pragma GCC unroll 8
        for (int i = 0; i < kChunkVecs; i += 2) {
          const Vec a = Vec::load(x + i * Vec::kLanes), b = Vec::load(x + (i + 1) * Vec::kLanes);
          auto& ordered = i % 4 ? good_too : good;
          ordered = both_ordered(ordered, a, b);
          if constexpr (kHasBits) {
            top = select(Vec::lanes_of(lanes_counting(c, i)), max(top, a), top);
            top = select(Vec::lanes_of(lanes_counting(c, i + 1)), max(top, b), top);
          } else {
            top = max(max(top, a), b);  // one chain: chunks overlap
          }
        }
        top = top + Vec::zero();  // -0 becomes +0
        top.store(maxima_ + c * Vec::kLanes);
        top_of_all = max(top_of_all, top);
        beside();
      }
      top_of_all.store(tops_ + first / kChunkVecs * Vec::kLanes);
    }
    for (float* p = maxima_ + maxima_of(size_); p < tops_; p += Vec::kLanes) none.store(p);
    return lane_count(good & good_too) == Vec::kLanes;
  }

  void load_edited(int64_t i, Vec (&x)[EditedTokens::kVecs]) const {
    for (int v = 0; v < EditedTokens::kVecs; ++v) x[v] = Vec::load(edited_.values + i + v * Vec::kLanes);
  }

  const T* data_;
  int64_t size_, whole_;
  const uint8_t* bits_;
  float *maxima_, *tops_;
  EditedTokens edited_;
  float top_of_edited_ = kMinusInfinity;
  T tail_[kChunk];
  uint8_t tail_bits_[kChunk / 8] = {};
};

}  // namespace
}  // namespace fastattn
