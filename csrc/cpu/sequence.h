// Where the rows of one sequence are, and which keys each of its queries sees.
#pragma once

#include "cpu/integers.h"
#include "params.h"

namespace fastattn {
namespace {

template <class T>
inline T* row_pointer(const TensorView& view, int64_t batch, int64_t seq, int64_t head) {
  return static_cast<T*>(view.data) + batch * view.stride_batch + seq * view.stride_seqlen + head * view.stride_head;
}

// The keys of one sequence: `length` tokens of k and v from token `first` of row `row` on, or of its pages.
struct KeySpan {
  int64_t batch, row, first, length;

  KeySpan(const KVParams& kv, int64_t b)
      : batch(b),
        row(kv.cu_seqlens  ? 0
            : kv.batch_idx ? kv.batch_idx[b]
                           : b),
        first((kv.cu_seqlens ? kv.cu_seqlens[b] : 0) + (kv.leftpad ? kv.leftpad[b] : 0)) {
    const int64_t end = kv.seqlens ? kv.seqlens[b] : kv.cu_seqlens ? kv.cu_seqlens[b + 1] : kv.seqlen;
    length = at_least(0, end - first);
  }
};

// One sequence of the batch. Packed sequences lie in row 0, one after the other.
struct Sequence {
  int64_t batch;
  int64_t q_row, q_first, seqlen_q;  // row and first token in q, out and lse
  KeySpan keys;
  int64_t seqlen_k;

  Sequence(const AttentionParams& p, int64_t b)
      : batch(b),
        q_row(p.cu_seqlens_q ? 0 : b),
        q_first(p.cu_seqlens_q ? p.cu_seqlens_q[b] : 0),
        seqlen_q(p.cu_seqlens_q ? p.cu_seqlens_q[b + 1] - q_first : p.seqlen_q),
        keys(p.kv, b),
        seqlen_k(keys.length) {}

  template <class T>
  T* query(const TensorView& view, int64_t i, int64_t head) const {
    return row_pointer<T>(view, q_row, q_first + i, head);
  }
};

// The rows of one KV head of k, v or their scales, by key of the span.
template <class T>
class KeyRows {
 public:
  KeyRows(const TensorView& view, const KVParams& kv, const KeySpan& span, int64_t head)
      : stride_(view.stride_seqlen), first_(span.first), page_size_(kv.page_size) {
    if (kv.block_table) {
      pages_ = kv.block_table + span.batch * kv.stride_block_table;
      stride_page_ = view.stride_batch;
      data_ = row_pointer<T>(view, 0, 0, head);
    } else {
      data_ = row_pointer<T>(view, span.row, first_, head);
    }
  }

  T* operator[](int64_t key) const {
    if (!pages_) return data_ + key * stride_;
    const int64_t token = first_ + key;
    return data_ + pages_[token / page_size_] * stride_page_ + token % page_size_ * stride_;
  }

  // Whether keys [first, last] lie `stride()` apart.
  bool are_strided(int64_t first, int64_t last) const {
    return !pages_ || (first_ + first) / page_size_ == (first_ + last) / page_size_;
  }
  int64_t stride() const { return stride_; }

 private:
  T* data_;
  int64_t stride_, stride_page_ = 0, first_, page_size_;
  const int32_t* pages_ = nullptr;
};

// Rows of one KV head that share a work item. Row r is query r / group of head head_k * group + r % group: the queries
// that share keys are neighbours, so one pass over K and V serves the whole GQA group.
struct RowBlock {
  int64_t head_k;
  int64_t first_row;  // in 0 .. seqlen_q * group
  int64_t rows;
};

// What a score's place means: its query, its head, and the keys that the query sees.
struct Visibility {
  int64_t group;   // query heads per KV head
  int64_t offset;  // query i stands at key i + offset
  int64_t seqlen_k, left, right;

  Visibility(const AttentionParams& p, const Sequence& sequence)
      : group(p.nheads / p.nheads_k),
        offset(sequence.seqlen_k - sequence.seqlen_q),
        seqlen_k(sequence.seqlen_k),
        left(p.window_left),
        right(p.window_right) {}

  int64_t query(int64_t row) const { return row / group; }
  int64_t head(const RowBlock& block, int64_t row) const { return block.head_k * group + row % group; }

  // Row `row` sees keys [begin, end), empty where end <= begin. Neither ever falls from a row to the next.
  int64_t begin(int64_t row) const { return left < 0 ? 0 : at_most(seqlen_k, at_least(0, query(row) + offset - left)); }
  int64_t end(int64_t row) const {
    return right < 0 ? seqlen_k : at_most(seqlen_k, at_least(0, query(row) + offset + right + 1));
  }

  // The other way round: rows that see key `key` lie in [first_row, last_row], which may reach beyond the sequence.
  int64_t first_row(int64_t key) const { return right < 0 ? 0 : (key - offset - right) * group; }
  int64_t last_row(int64_t key) const { return left < 0 ? INT64_MAX : (key - offset + left + 1) * group - 1; }
};

}  // namespace
}  // namespace fastattn
