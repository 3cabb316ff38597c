// Penalties, bias and mask, without a pass of their own over the row: tokens that are edited one by one leave the row
// by a bit and stand beside it in a list, and the mask is those bits. Only a dense bias makes a copy of the row.
#pragma once

#include "cpu/sampling_row.h"
#include "logit_edits.h"

namespace fastattn {
namespace {

// Pairs by ascending key, equal keys in their order: counting sort, eleven bits a round. Keys lie below 2^bits; the
// second half of each array is working memory.
template <class Value>
void sort_pairs(uint32_t* keys, Value* values, int64_t n, int bits) {
  constexpr int kDigit = 11, kBuckets = 1 << kDigit;
  uint32_t *from = keys, *to = keys + n;
  Value *from_values = values, *to_values = values + n;
  for (int shift = 0; shift < bits; shift += kDigit) {
    int64_t next[kBuckets] = {};
    for (int64_t i = 0; i < n; ++i) ++next[from[i] >> shift & (kBuckets - 1)];
    int64_t sum = 0;
    for (int64_t& place : next) {
      const int64_t count = place;
      place = sum;
      sum += count;
    }
    for (int64_t i = 0; i < n; ++i) {
      const int64_t place = next[from[i] >> shift & (kBuckets - 1)]++;
      to[place] = from[i];
      to_values[place] = from_values[i];
    }
    uint32_t* keys_before = from;
    Value* values_before = from_values;
    from = to, from_values = to_values;
    to = keys_before, to_values = values_before;
  }
  if (from == keys) return;
  memcpy(keys, from, static_cast<size_t>(n) * sizeof *keys);
  memcpy(values, from_values, static_cast<size_t>(n) * sizeof *values);
}

// One row's edits, carried out.
template <class Vec, class T>
class EditedRow {
 public:
  static size_t bytes_for(const LogitEdits& e, int64_t vocab) {
    const int64_t entries = vocab + kListSpare, biases = 2 * e.bias_n;
    const int64_t words = (e.bias ? vocab : 0) + 4 * entries + 2 * biases;
    return static_cast<size_t>(words) * 4 + bits_bytes(vocab) + 64;
  }

  // Works in `memory`, which has bytes_for(...); the results lie there too.
  EditedRow(const LogitEdits& e, const T* x, int64_t vocab, int64_t index, void* memory)
      : e_(e),
        x_(x),
        vocab_(vocab),
        index_(index),
        penalties_(e.repetition[index], e.presence[index], e.frequency[index]),
        lanes_(penalties_) {
    const int64_t entries = vocab + kListSpare;
    values_ = static_cast<float*>(memory);
    ids_ = reinterpret_cast<int32_t*>(values_ + entries);
    seen_ids_ = ids_ + entries;
    seen_counts_ = seen_ids_ + entries;
    bias_ids_ = reinterpret_cast<uint32_t*>(seen_counts_ + entries);
    bias_values_ = reinterpret_cast<float*>(bias_ids_ + 2 * e.bias_n);
    copy_ = bias_values_ + 2 * e.bias_n;
    bits_ = reinterpret_cast<uint8_t*>(copy_ + (e.bias ? vocab : 0));
  }

  // 0, or a SamplingError. What remains to be done are values of edited tokens, which may be NaN: edit_some() does a
  // few of them, edit_rest() all.
  int64_t prepare() {
    const Seen seen = e_.seen_ids ? listed() : e_.counts || e_.prompt ? found() : Seen{};
    const int64_t biased = e_.bias_ids ? sort_bias() : 0;
    if (biased < 0) return kBadBiasId;
    if (e_.bias) {
      prepare_bits(nullptr, false);
      copy_dense(seen);
    } else if (biased > 0) {
      prepare_bits(nullptr, true);
      edit_both(seen, biased);
    } else {
      prepare_bits(seen.n > 0 ? seen.unseen : nullptr, false);
      edited_ = {values_, seen.ids, seen.n};
      remaining_ = seen;
    }
    for (int i = 0; i < kListSpare; ++i) values_[edited_.n + i] = kMinusInfinity;
    return 0;
  }

  inline __attribute__((always_inline)) void edit_some() {
    if (done_ + Vec::kLanes > remaining_.n) return;
    const int32_t *ids = remaining_.ids + done_, *counts = remaining_.counts + done_;
    lanes_.penalise(Vec::gather(x_, ids), counts, values_ + done_);
    done_ += Vec::kLanes;
  }

  void edit_rest() {
    while (done_ + Vec::kLanes <= remaining_.n) edit_some();
    for (; done_ < remaining_.n; ++done_) {
      const float logit = to_single<Vec>(x_ + remaining_.ids[done_]);
      values_[done_] = static_cast<float>(penalties_.penalised(logit, remaining_.counts[done_]));
    }
    if (e_.allowed || e_.allowed_bits)
      for (int64_t i = 0; i < remaining_.n; ++i)
        if (!is_allowed(remaining_.ids[i])) values_[i] = kMinusInfinity;
  }

  const float* copy() const { return e_.bias ? copy_ : nullptr; }  // the whole row, instead of the one given
  const uint8_t* bits() const { return counting_; }
  const EditedTokens& edited() const { return edited_; }

 private:
  static constexpr int kListSpare = EditedTokens::kVecs * Vec::kLanes;  // found() writes four tokens at a time

  static size_t bits_bytes(int64_t vocab) { return static_cast<size_t>((vocab + 511) / 512 * 64); }

  bool is_allowed(int64_t id) const {
    if (e_.allowed) return e_.allowed[index_][id] != 0;
    return !e_.allowed_bits || e_.allowed_bits[index_][id / 8] >> id % 8 & 1;
  }

  // The tokens that penalties touch, by ascending id, how often each was written, and a bit for each of the others.
  struct Seen {
    const int32_t *ids = nullptr, *counts = nullptr;
    int64_t n = 0;
    const uint8_t* unseen = nullptr;
  };

  Seen listed() const { return {e_.seen_ids[index_], e_.seen_counts[index_], e_.seen_n[index_], e_.unseen[index_]}; }

  // From counts and marks of the whole vocabulary, kBlock tokens at a time. How many of them are seen cannot be
  // foreseen: the first few are written down whether there are that many or not.
  Seen found() {
    constexpr int kFew = 4;
    const int32_t* written = e_.counts ? e_.counts[index_] : nullptr;
    const uint8_t* read = e_.prompt ? e_.prompt[index_] : nullptr;
    int64_t n = 0;
    for (int64_t first = 0; first < vocab_; first += kBlock) {
      uint64_t some;
      if (vocab_ - first >= kBlock) {
        some = (read ? marks(read + first) : 0) | (written ? counted(written + first) : 0);
      } else {  // padded
        const auto m = static_cast<size_t>(vocab_ - first);
        int32_t last_written[kBlock] = {};
        uint8_t last_read[kBlock] = {};
        if (written) memcpy(last_written, written + first, m * sizeof *written);
        if (read) memcpy(last_read, read + first, m);
        some = marks(last_read) | counted(last_written);
      }
      const uint64_t unseen = ~some;
      memcpy(bits_ + first / 8, &unseen, sizeof unseen);
      const int64_t all = __builtin_popcountll(some);
      const auto note = [&](int64_t i) {
        const int64_t id = some ? first + __builtin_ctzll(some) : first;
        const int32_t count = written ? written[id] : 0;
        seen_ids_[n + i] = static_cast<int32_t>(id);
        seen_counts_[n + i] = count > 0 ? count : 0;
        some &= some - 1;
      };
      if (all > 0) {
#pragma GCC unroll 4
        for (int i = 0; i < kFew; ++i) note(i);
        for (int64_t i = kFew; i < all; ++i) note(i);
      }
      n += all;
    }
    return {seen_ids_, seen_counts_, n, bits_};
  }

  static constexpr int kBlock = 64;  // tokens whose bits are a word

  static uint64_t marks(const uint8_t* bytes) {  // which are set
    constexpr int kStep = 4 * Vec::kLanes;
    uint64_t set = 0;
#pragma GCC unroll 4
    for (int i = 0; i < kBlock; i += kStep) set |= bytes_set(bytes + i, kStep) << i;
    return set;
  }

  static uint64_t counted(const int32_t* counts) {  // which are positive
    uint64_t set = 0;
#pragma GCC unroll 16
    for (int i = 0; i < kBlock; i += Vec::kLanes) {
      typename Vec::U32 v;
      memcpy(&v, counts + i, sizeof v);
      set |= uint64_t{lane_bits(Vec::zero() < Vec::from_int(v))} << i;
    }
    return set;
  }

  // Which of m <= 4 kLanes bytes are not zero.
  static uint64_t bytes_set(const void* bytes, int64_t m) {
    typename Vec::U64 v = {};
    if (m == static_cast<int64_t>(sizeof v))
      memcpy(&v, bytes, sizeof v);
    else
      memcpy(&v, bytes, static_cast<size_t>(m));
    return Vec::bytes_reaching(v, 1);
  }

  // The biases by ascending id, without padding; -1 if an id is none.
  int64_t sort_bias() {
    const int64_t* ids = e_.bias_ids[index_];
    const float* values = e_.bias_values[index_];
    int64_t n = 0;
    bool sorted = true;
    for (int64_t i = 0; i < e_.bias_n; ++i) {
      if (ids[i] < -1 || ids[i] >= vocab_) return -1;
      if (ids[i] < 0) continue;
      bias_ids_[n] = static_cast<uint32_t>(ids[i]);
      bias_values_[n] = values[i];
      sorted = sorted && (n == 0 || bias_ids_[n - 1] <= bias_ids_[n]);
      ++n;
    }
    if (!sorted) sort_pairs(bias_ids_, bias_values_, n, 22);
    return n;
  }

  // The bits of the tokens that count, those of `unseen` if there are any; a copy if more are to be left out, or if the
  // mask is not packed. `unseen` may be bits_ itself.
  void prepare_bits(const uint8_t* unseen, bool is_edited) {
    const int64_t bytes = (vocab_ + 7) / 8;
    counting_ = bits_;
    if (e_.allowed) {
      const uint8_t* allowed = e_.allowed[index_];
      constexpr int kBytes = 4 * Vec::kLanes;
      for (int64_t i = 0; i < vocab_; i += kBytes) {
        uint64_t set = bytes_set(allowed + i, vocab_ - i < kBytes ? vocab_ - i : kBytes), other = ~uint64_t{0};
        if (unseen) memcpy(&other, unseen + i / 8, kBytes / 8);
        set &= other;
        memcpy(bits_ + i / 8, &set, kBytes / 8);
      }
    } else if (e_.allowed_bits) {
      const uint8_t* allowed = e_.allowed_bits[index_];
      if (unseen)
        for (int64_t i = 0; i < bytes; ++i) bits_[i] = allowed[i] & unseen[i];
      else if (is_edited)
        memcpy(bits_, allowed, static_cast<size_t>(bytes));
      else
        counting_ = allowed;
    } else if (is_edited) {
      memset(bits_, 0xff, static_cast<size_t>(bytes));
    } else {
      counting_ = unseen;
    }
  }

  void leave_out(int64_t id) { bits_[id / 8] = static_cast<uint8_t>(bits_[id / 8] & ~(1u << id % 8)); }

  // Penalties in every lane.
  struct PenaltyLanes {
    using F64 = typename Vec::F64;
    F64 repetition, inverse, presence, frequency;

    explicit PenaltyLanes(const Penalties& one)
        : repetition(F64{} + one.repetition),
          inverse(F64{} + one.inverse),
          presence(F64{} + one.presence),
          frequency(F64{} + one.frequency) {}

    // Penalties::penalised of kLanes tokens; of one never written a zero is taken off.
    void penalise(Vec x, const int32_t* counts, float* out) const {
      constexpr int kHalf = Vec::kLanes / 2;
      typedef float Single __attribute__((vector_size(sizeof(F64) / 2)));
      const F64 halves[2] = {widen_low(x), widen_high(x)}, zero = {};
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        const F64 times = Vec::widen(counts + h * kHalf);
        const F64 scaled = halves[h] * (halves[h] > zero ? inverse : repetition) - times * frequency;
        const F64 edited = times > zero ? scaled - presence : scaled;
        const Single rounded = __builtin_convertvector(edited, Single);
        memcpy(out + h * kHalf, &rounded, sizeof rounded);
      }
    }
  };

  // Both lists are by ascending id; one id may have several biases.
  void edit_both(const Seen& seen, int64_t biased) {
    int64_t n = 0, s = 0, b = 0;
    while (s < seen.n || b < biased) {
      const uint32_t next_seen = s < seen.n ? static_cast<uint32_t>(seen.ids[s]) : ~0u;
      const uint32_t next_biased = b < biased ? bias_ids_[b] : ~0u;
      const uint32_t id = next_seen < next_biased ? next_seen : next_biased;
      const float logit = to_single<Vec>(x_ + id);
      double x = logit;
      if (next_seen == id) x = penalties_.penalised(logit, seen.counts[s++]);
      double bias = 0.0;
      for (; b < biased && bias_ids_[b] == id; ++b) bias += static_cast<double>(bias_values_[b]);
      if (next_biased == id) x += bias;
      ids_[n] = static_cast<int32_t>(id);
      values_[n++] = is_allowed(id) ? static_cast<float>(x) : kMinusInfinity;
      leave_out(id);
    }
    edited_ = {values_, ids_, n};
  }

  void copy_dense(const Seen& seen) {
    const float* bias = e_.bias[index_];
    int64_t i = 0;
    for (; i + Vec::kLanes <= vocab_; i += Vec::kLanes) (Vec::load(x_ + i) + Vec::load(bias + i)).store(copy_ + i);
    for (; i < vocab_; ++i) copy_[i] = to_single<Vec>(x_ + i) + bias[i];
    for (int64_t s = 0; s < seen.n; ++s) {
      const int32_t id = seen.ids[s];
      const double x = penalties_.penalised(to_single<Vec>(x_ + id), seen.counts[s]);
      copy_[id] = static_cast<float>(x + static_cast<double>(bias[id]));
    }
  }

  const LogitEdits& e_;
  const T* x_;
  int64_t vocab_, index_;
  Penalties penalties_;
  PenaltyLanes lanes_;
  float* values_;
  int32_t *ids_, *seen_ids_, *seen_counts_;
  uint32_t* bias_ids_;
  float *bias_values_, *copy_;
  uint8_t* bits_;
  const uint8_t* counting_ = nullptr;
  EditedTokens edited_;
  Seen remaining_;  // of which done_ are edited
  int64_t done_ = 0;
};

}  // namespace
}  // namespace fastattn
