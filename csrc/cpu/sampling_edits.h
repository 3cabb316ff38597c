// Penalties, bias and mask, without a pass of their own over the row: tokens that are edited one by one leave the row
// by a bit and stand beside it in a list, and the mask is those bits. Only a dense bias makes a copy of the row.
#pragma once

#include "cpu/sampling_row.h"

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
    const int64_t entries = vocab + Vec::kLanes, biases = 2 * e.bias_n;
    const int64_t words = (e.bias ? vocab : 0) + 4 * entries + 2 * biases;
    return static_cast<size_t>(words) * 4 + bits_bytes(vocab) + 64;
  }

  // Works in `memory`, which has bytes_for(...); the results lie there too.
  EditedRow(const LogitEdits& e, const T* x, int64_t vocab, int64_t index, void* memory)
      : e_(e),
        x_(x),
        vocab_(vocab),
        index_(index),
        repetition_(e.repetition[index]),
        inverse_(1.0 / repetition_),
        presence_(e.presence[index]),
        frequency_(e.frequency[index]) {
    const int64_t entries = vocab + Vec::kLanes;
    values_ = static_cast<float*>(memory);
    ids_ = reinterpret_cast<int32_t*>(values_ + entries);
    seen_ids_ = ids_ + entries;
    seen_counts_ = seen_ids_ + entries;
    bias_ids_ = reinterpret_cast<uint32_t*>(seen_counts_ + entries);
    bias_values_ = reinterpret_cast<float*>(bias_ids_ + 2 * e.bias_n);
    copy_ = bias_values_ + 2 * e.bias_n;
    bits_ = reinterpret_cast<uint8_t*>(copy_ + (e.bias ? vocab : 0));
  }

  // 0, or a SamplingError.
  int64_t carry_out() {
    const int32_t *seen_ids = nullptr, *seen_counts = nullptr;
    const int64_t seen = find_seen(&seen_ids, &seen_counts);
    const int64_t biased = e_.bias_ids ? sort_bias() : 0;
    if (biased < 0) return kBadBiasId;
    prepare_bits(seen + biased > 0 && !e_.bias);
    if (e_.bias)
      copy_dense(seen_ids, seen_counts, seen);
    else if (biased > 0)
      edit_both(seen_ids, seen_counts, seen, biased);
    else if (seen > 0)
      edit_seen(seen_ids, seen_counts, seen);
    for (int i = 0; i < Vec::kLanes; ++i) values_[edited_.n + i] = kMinusInfinity;
    return has_nan(values_, edited_.n) ? static_cast<int64_t>(kEditedHasNaN) : 0;
  }

  const float* copy() const { return e_.bias ? copy_ : nullptr; }  // the whole row, instead of the one given
  const uint8_t* bits() const { return counting_; }
  const EditedTokens& edited() const { return edited_; }

 private:
  static size_t bits_bytes(int64_t vocab) { return static_cast<size_t>((vocab + 511) / 512 * 64); }

  static bool has_nan(const float* v, int64_t n) {
    auto nan = either_nan(Vec::zero(), Vec::zero());
    for (int64_t i = 0; i < n; i += Vec::kLanes) nan = nan | either_nan(Vec::load(v + i), Vec::load(v + i));
    return lane_bits(nan) != 0;
  }

  bool is_allowed(int64_t id) const {
    if (e_.allowed) return e_.allowed[index_][id] != 0;
    return !e_.allowed_bits || e_.allowed_bits[index_][id / 8] >> id % 8 & 1;
  }

  // The tokens that penalties touch, by ascending id.
  int64_t find_seen(const int32_t** ids, const int32_t** counts) {
    *ids = seen_ids_;
    *counts = seen_counts_;
    if (e_.seen_ids) {
      *ids = e_.seen_ids[index_];
      *counts = e_.seen_counts[index_];
      return e_.seen_n[index_];
    }
    if (!e_.counts && !e_.prompt) return 0;
    constexpr int kBlock = 4 * Vec::kLanes;  // tokens; bytes in a U64
    const int32_t* written = e_.counts ? e_.counts[index_] : nullptr;
    const uint8_t* read = e_.prompt ? e_.prompt[index_] : nullptr;
    int64_t n = 0;
    for (int64_t first = 0; first < vocab_; first += kBlock) {
      const int64_t m = vocab_ - first < kBlock ? vocab_ - first : kBlock;
      uint64_t some = read ? bytes_set(read + first, m) : 0;
      for (int64_t part = 0; written && part < m; part += Vec::kLanes)
        some |= words_set(written + first + part, m - part < Vec::kLanes ? m - part : Vec::kLanes) << part;
      for (; some; some &= some - 1) {
        const int64_t id = first + __builtin_ctzll(some);
        const int32_t count = written ? written[id] : 0;
        if (count <= 0 && !(read && read[id])) continue;
        seen_ids_[n] = static_cast<int32_t>(id);
        seen_counts_[n++] = count > 0 ? count : 0;
      }
    }
    return n;
  }

  // Which of m <= 4 kLanes bytes, or m <= kLanes words, are not zero.
  static uint64_t bytes_set(const void* bytes, int64_t m) {
    typename Vec::U64 v = {};
    if (m == static_cast<int64_t>(sizeof v))
      memcpy(&v, bytes, sizeof v);
    else
      memcpy(&v, bytes, static_cast<size_t>(m));
    return Vec::bytes_reaching(v, 1);
  }

  static uint64_t words_set(const int32_t* words, int64_t m) {
    uint64_t bytes = bytes_set(words, 4 * m), set = 0;
    for (; bytes; bytes &= ~(uint64_t{15} << __builtin_ctzll(bytes) / 4 * 4))
      set |= uint64_t{1} << __builtin_ctzll(bytes) / 4;
    return set;
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

  // The bits of the tokens that count: where some are edited, or the mask is not packed, a copy.
  void prepare_bits(bool some_are_edited) {
    const auto bytes = static_cast<size_t>((vocab_ + 7) / 8);
    counting_ = some_are_edited || e_.allowed ? bits_ : nullptr;
    if (e_.allowed) {
      const uint8_t* allowed = e_.allowed[index_];
      constexpr int kBytes = 4 * Vec::kLanes;
      for (int64_t i = 0; i < vocab_; i += kBytes) {
        const uint64_t set = bytes_set(allowed + i, vocab_ - i < kBytes ? vocab_ - i : kBytes);
        memcpy(bits_ + i / 8, &set, kBytes / 8);
      }
    } else if (e_.allowed_bits) {
      if (counting_)
        memcpy(bits_, e_.allowed_bits[index_], bytes);
      else
        counting_ = e_.allowed_bits[index_];
    } else if (counting_) {
      memset(bits_, 0xff, bytes);
    }
  }

  void leave_out(int64_t id) { bits_[id / 8] = static_cast<uint8_t>(bits_[id / 8] & ~(1u << id % 8)); }

  double penalised(float logit, int32_t count) const {
    const double x = logit, scaled = x * (x > 0.0 ? inverse_ : repetition_);
    return count > 0 ? scaled - frequency_ * count - presence_ : scaled;
  }

  void edit_seen(const int32_t* ids, const int32_t* counts, int64_t n) {
    const bool masked = e_.allowed || e_.allowed_bits;
    constexpr int kBlock = 64;
    for (int64_t first = 0; first < n; first += kBlock) {
      const int64_t m = n - first < kBlock ? n - first : kBlock;
      float logits[kBlock] = {};
      for (int64_t i = 0; i < m; ++i) {
        logits[i] = to_single<Vec>(x_ + ids[first + i]);
        leave_out(ids[first + i]);
      }
      for (int64_t i = 0; i < m; ++i) values_[first + i] = static_cast<float>(penalised(logits[i], counts[first + i]));
      if (masked)
        for (int64_t i = 0; i < m; ++i)
          if (!is_allowed(ids[first + i])) values_[first + i] = kMinusInfinity;
    }
    edited_ = {values_, ids, n};
  }

  // Both lists are by ascending id; one id may have several biases.
  void edit_both(const int32_t* ids, const int32_t* counts, int64_t seen, int64_t biased) {
    int64_t n = 0, s = 0, b = 0;
    while (s < seen || b < biased) {
      const uint32_t next_seen = s < seen ? static_cast<uint32_t>(ids[s]) : ~0u;
      const uint32_t next_biased = b < biased ? bias_ids_[b] : ~0u;
      const uint32_t id = next_seen < next_biased ? next_seen : next_biased;
      const float logit = to_single<Vec>(x_ + id);
      double x = logit;
      if (next_seen == id) x = penalised(logit, counts[s++]);
      double bias = 0.0;
      for (; b < biased && bias_ids_[b] == id; ++b) bias += static_cast<double>(bias_values_[b]);
      if (next_biased == id) x += bias;
      ids_[n] = static_cast<int32_t>(id);
      values_[n++] = is_allowed(id) ? static_cast<float>(x) : kMinusInfinity;
      leave_out(id);
    }
    edited_ = {values_, ids_, n};
  }

  void copy_dense(const int32_t* ids, const int32_t* counts, int64_t seen) {
    const float* bias = e_.bias[index_];
    int64_t i = 0;
    for (; i + Vec::kLanes <= vocab_; i += Vec::kLanes) (Vec::load(x_ + i) + Vec::load(bias + i)).store(copy_ + i);
    for (; i < vocab_; ++i) copy_[i] = to_single<Vec>(x_ + i) + bias[i];
    for (int64_t s = 0; s < seen; ++s)
      copy_[ids[s]] =
          static_cast<float>(penalised(to_single<Vec>(x_ + ids[s]), counts[s]) + static_cast<double>(bias[ids[s]]));
  }

  const LogitEdits& e_;
  const T* x_;
  int64_t vocab_, index_;
  double repetition_, inverse_, presence_, frequency_;
  float* values_;
  int32_t *ids_, *seen_ids_, *seen_counts_;
  uint32_t* bias_ids_;
  float *bias_values_, *copy_;
  uint8_t* bits_;
  const uint8_t* counting_ = nullptr;
  EditedTokens edited_;
};

}  // namespace
}  // namespace fastattn
