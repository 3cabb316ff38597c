// Penalties, bias and mask: a copy of the rows with every logit edited, which sampling then reads in place of them. All
// edits take one pass over the vocabulary, and one over each list, however many they are.
#pragma once

#include "cuda/sampling_row.cuh"
#include "logit_edits.h"

namespace fastattn {
namespace {

constexpr int kEditThreads = 256, kEditTokens = 4096;  // of a block

struct EditParams {
  const void* logits;  // (batch, vocab)
  int64_t stride_batch;
  RowNumber<double> repetition, presence, frequency;
  LogitEdits edits;  // but for the penalties' numbers, which are above; bias_ids ascend
  float* edited;     // (batch, vocab)
  int vocab;
};

template <class V>
FASTATTN_DEVICE const V* row_of(const Rows<V>& rows, int row) {
  return rows.data ? rows.data + row * rows.stride : nullptr;
}

// How many of n ascending numbers are below `bound`.
template <class V>
FASTATTN_DEVICE int count_below(const V* ascending, int n, int64_t bound) {
  int low = 0, high = n;
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (load_global(ascending + middle) < bound)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// The tokens of a block: all of them first, then those on the lists once more.
template <class T>
class RowEditor {
 public:
  FASTATTN_DEVICE explicit RowEditor(const EditParams& p)
      : vocab_(p.vocab),
        first_(block_index_y() * kEditTokens),
        end_(p.vocab - first_ < kEditTokens ? p.vocab : first_ + kEditTokens),
        logits_(static_cast<const T*>(p.logits) + block_index_x() * p.stride_batch),
        edited_(p.edited + int64_t{block_index_x()} * p.vocab),
        penalties_(p.repetition.of(block_index_x()), p.presence.of(block_index_x()), p.frequency.of(block_index_x())),
        counts_(row_of(p.edits.counts, block_index_x())),
        prompt_(row_of(p.edits.prompt, block_index_x())),
        seen_ids_(row_of(p.edits.seen_ids, block_index_x())),
        seen_counts_(row_of(p.edits.seen_counts, block_index_x())),
        seen_n_(seen_ids_ ? load_global(p.edits.seen_n + block_index_x()) : 0),
        bias_(row_of(p.edits.bias, block_index_x())),
        bias_ids_(row_of(p.edits.bias_ids, block_index_x())),
        bias_values_(row_of(p.edits.bias_values, block_index_x())),
        bias_n_(bias_ids_ ? static_cast<int>(p.edits.bias_n) : 0),
        allowed_(row_of(p.edits.allowed, block_index_x())),
        allowed_bits_(row_of(p.edits.allowed_bits, block_index_x())) {}

  FASTATTN_DEVICE void run() const {
    for (int id = first_ + thread_index(); id < end_; id += kEditThreads) write(id, marked(id), dense_bias(id));
    block_barrier();  // what follows writes some of them anew
    edit_seen();
    block_barrier();
    edit_biased();
  }

 private:
  struct Seen {
    bool is_seen;   // read or written,
    int32_t count;  // and so often written
  };

  FASTATTN_DEVICE void edit_seen() const {
    const int last = count_below(seen_ids_, seen_n_, end_);
    for (int i = count_below(seen_ids_, seen_n_, first_) + thread_index(); i < last; i += kEditThreads) {
      const int id = load_global(seen_ids_ + i);
      write(id, {true, load_global(seen_counts_ + i)}, dense_bias(id));
    }
  }

  // The thread that has the first bias of a token adds up all of them, in their order.
  FASTATTN_DEVICE void edit_biased() const {
    if (has_wrong_ids()) {  // which the host cannot see: the row becomes one that has NaN
      if (first_ == 0 && thread_index() == 0) store_global(edited_, __builtin_nanf(""));
      return;
    }
    const int last = count_below(bias_ids_, bias_n_, end_);
    for (int i = count_below(bias_ids_, bias_n_, first_) + thread_index(); i < last; i += kEditThreads) {
      const int64_t id = load_global(bias_ids_ + i);
      if (i > 0 && load_global(bias_ids_ + i - 1) == id) continue;
      double bias = 0.0;
      for (int j = i; j < last && load_global(bias_ids_ + j) == id; ++j)
        bias += static_cast<double>(load_global(bias_values_ + j));
      write(static_cast<int>(id), seen_ids_ ? listed(static_cast<int>(id)) : marked(static_cast<int>(id)), bias);
    }
  }

  // Outside the vocabulary.
  FASTATTN_DEVICE bool has_wrong_ids() const {
    return bias_n_ > 0 && (load_global(bias_ids_) < -1 || load_global(bias_ids_ + bias_n_ - 1) >= vocab_);
  }

  FASTATTN_DEVICE Seen marked(int id) const {
    const int32_t count = counts_ ? load_global(counts_ + id) : 0;
    return {count > 0 || (prompt_ && load_global(prompt_ + id)), count};
  }

  FASTATTN_DEVICE Seen listed(int id) const {
    const int at = count_below(seen_ids_, seen_n_, id);
    if (at == seen_n_ || load_global(seen_ids_ + at) != id) return {false, 0};
    return {true, load_global(seen_counts_ + at)};
  }

  FASTATTN_DEVICE double dense_bias(int id) const { return bias_ ? static_cast<double>(load_global(bias_ + id)) : 0.0; }

  FASTATTN_DEVICE bool is_allowed(int id) const {
    if (allowed_) return load_global(allowed_ + id) != 0;
    return !allowed_bits_ || load_global(allowed_bits_ + id / 8) >> id % 8 & 1;
  }

  // NaN stays, allowed or not: sampling refuses a row that came with one.
  FASTATTN_DEVICE void write(int id, Seen seen, double bias) const {
    const float logit = to_float(load_global(logits_ + id));
    const double penalised = seen.is_seen ? penalties_.penalised(logit, seen.count) : static_cast<double>(logit);
    const bool counts = is_allowed(id) || logit != logit;
    store_global(edited_ + id, counts ? static_cast<float>(penalised + bias) : kMinusInfinity);
  }

  const int vocab_, first_, end_;
  const T* const logits_;
  float* const edited_;
  const Penalties penalties_;
  const int32_t* const counts_;
  const uint8_t* const prompt_;
  const int32_t *const seen_ids_, *const seen_counts_;
  const int seen_n_;
  const float* const bias_;
  const int64_t* const bias_ids_;
  const float* const bias_values_;
  const int bias_n_;
  const uint8_t *const allowed_, *const allowed_bits_;
};

template <class T>
FASTATTN_KERNEL(kEditThreads, 4)
edit_rows(FASTATTN_GRID_CONSTANT EditParams p) {
  RowEditor<T>(p).run();
}

}  // namespace
}  // namespace fastattn
