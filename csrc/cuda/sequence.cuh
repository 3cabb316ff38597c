// Where the rows of one sequence are, and which keys each sees: cpu/sequence.h in 32 bits.
#pragma once

#include "cuda/traits.cuh"

namespace fastattn {
namespace {

FASTATTN_DEVICE int at_least(int low, int x) { return x < low ? low : x; }
FASTATTN_DEVICE int at_most(int high, int x) { return x > high ? high : x; }

// A window in 32 bits: wider than any sequence is as wide as this.
FASTATTN_DEVICE int narrow_window(int64_t keys) {
  constexpr int64_t kWidest = 1 << 30;
  return static_cast<int>(keys < kWidest ? keys : kWidest);
}

// One KV head of one sequence. Row r is query r / group of head head_k * group + r % group: the queries that share keys
// are neighbours, so one pass over K and V serves the whole GQA group.
struct Sequence {
  int batch, head_k, group;
  int q_row, q_first, seqlen_q;  // row and first token in q, out and lse
  int kv_row, kv_first,
      seqlen_k;  // row and first token in k and v; of pages the first token counts from the first page
  const int64_t &window_left, &window_right;

  FASTATTN_DEVICE Sequence(const AttentionParams& p, int b, int h)
      : batch(b), head_k(h), window_left(p.window_left), window_right(p.window_right) {
    group = static_cast<int>(p.nheads) / static_cast<int>(p.nheads_k);
    q_row = p.cu_seqlens_q ? 0 : b;
    q_first = p.cu_seqlens_q ? load_global(p.cu_seqlens_q + b) : 0;
    seqlen_q = p.cu_seqlens_q ? load_global(p.cu_seqlens_q + b + 1) - q_first : static_cast<int>(p.seqlen_q);
    const KVParams& kv = p.kv;
    kv_row = kv.cu_seqlens ? 0 : kv.batch_idx ? load_global(kv.batch_idx + b) : b;
    kv_first = (kv.cu_seqlens ? load_global(kv.cu_seqlens + b) : 0) + (kv.leftpad ? load_global(kv.leftpad + b) : 0);
    const int end = kv.seqlens      ? load_global(kv.seqlens + b)
                    : kv.cu_seqlens ? load_global(kv.cu_seqlens + b + 1)
                                    : static_cast<int>(kv.seqlen);
    seqlen_k = at_least(0, end - kv_first);
  }

  FASTATTN_DEVICE int rows() const { return seqlen_q * group; }
  FASTATTN_DEVICE int query(int row) const { return group == 1 ? row : row / group; }
  FASTATTN_DEVICE int head(int row) const { return head_k * group + (group == 1 ? 0 : row % group); }
  // Query i stands at key place(i).
  FASTATTN_DEVICE int place(int query) const { return query + seqlen_k - seqlen_q; }

  // Query i sees keys [begin, end), empty where end <= begin. Neither ever falls from a query to the next.
  FASTATTN_DEVICE int begin(int i) const {
    const int left = narrow_window(window_left);
    return left < 0 ? 0 : at_most(seqlen_k, at_least(0, place(i) - left));
  }
  FASTATTN_DEVICE int end(int i) const {
    const int right = narrow_window(window_right);
    return right < 0 ? seqlen_k : at_most(seqlen_k, at_least(0, place(i) + right + 1));
  }
};

// In elements.
FASTATTN_DEVICE int64_t row_offset(const TensorView& view, int batch, int seq, int head) {
  return batch * view.stride_batch + seq * view.stride_seqlen + head * view.stride_head;
}
template <class T>
FASTATTN_DEVICE T* row_pointer(const TensorView& view, int batch, int seq, int head) {
  return static_cast<T*>(view.data) + row_offset(view, batch, seq, head);
}

// The rows of a tile that begins at row `first`: the keys that any of them sees, and those that all of them see.
struct KeyRange {
  int begin, end;            // any
  int open_begin, open_end;  // all

  FASTATTN_DEVICE KeyRange(const Sequence& s, int first, int rows) {
    const int top = s.query(first), bottom = s.query(at_most(s.rows(), first + rows) - 1);
    begin = s.begin(top);
    open_begin = s.begin(bottom);
    open_end = s.end(top);
    end = s.end(bottom);
  }

  FASTATTN_DEVICE void clip(int low, int high) {
    begin = at_least(low, begin);
    end = at_most(high, end);
  }
};

// The keys of a tile that begins at key `first`: the rows that see any of them, and those that see all of them.
struct RowRange {
  int begin, end;            // any
  int open_begin, open_end;  // all

  FASTATTN_DEVICE RowRange(const Sequence& s, int first, int keys) {
    const int last = at_most(s.seqlen_k, first + keys) - 1;
    const int left = narrow_window(s.window_left), right = narrow_window(s.window_right);
    const auto row = [&](int query) { return at_most(s.seqlen_q, at_least(0, query)) * s.group; };
    const auto sees = [&](int key) { return key - s.place(0); };  // the query that stands at this key
    begin = right < 0 ? 0 : row(sees(first) - right);
    open_begin = right < 0 ? 0 : row(sees(last) - right);
    open_end = left < 0 ? s.rows() : row(sees(first) + left + 1);
    end = left < 0 ? s.rows() : row(sees(last) + left + 1);
  }
};

// Where a row's lse lies, and its delta.
FASTATTN_DEVICE int64_t lse_place(const AttentionParams& p, const Sequence& sequence, int query, int head) {
  return sequence.q_row * p.lse_stride_batch + head * p.lse_stride_head + sequence.q_first + query;
}

// How the keys of a long sequence are split among blocks: by its length alone, so that a row's bits do not depend on
// the batch around it.
constexpr int kMinSplitKeys = 512, kMaxSplits = 64;

FASTATTN_DEVICE int split_keys(int seqlen_k) {
  const int even = (seqlen_k + kMaxSplits - 1) / kMaxSplits;
  return at_least(kMinSplitKeys, (even + 63) / 64 * 64);
}
FASTATTN_DEVICE int split_count(int seqlen_k) {
  const int keys = split_keys(seqlen_k);
  return at_least(1, (seqlen_k + keys - 1) / keys);
}

// Where the rows of one split of one KV head of one sequence lie among partial results, in units of all their rows.
FASTATTN_DEVICE int64_t partial_place(const AttentionParams& p, int split, int batch, int head_k) {
  return (split * p.batch + batch) * p.nheads_k + head_k;
}

}  // namespace
}  // namespace fastattn
