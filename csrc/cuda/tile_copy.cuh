// Rows of q, k and v on their way to shared memory, 16 bytes a thread and copy.
#pragma once

#include "cuda/sequence.cuh"

namespace fastattn {
namespace {

// How far apart rows lie, in bytes, multiplied out: as kernel parameters they cost no registers.
struct CopySteps {
  int64_t rows;  // of one copy by all threads
  int64_t tile;

  template <class Traits>
  static CopySteps of(const TensorView& view) {
    const int64_t row = view.stride_seqlen * Traits::kElementBytes;
    return {row * Traits::kCopyRows, row * Traits::kKeys};
  }
};

// One of k and v: tile after tile, from the last key to the first. Columns past headdim arrive as zeros.
template <class Traits, bool kPaged>
class KeyCopy {
 public:
  FASTATTN_DEVICE KeyCopy(const TensorView& view, const CopySteps& steps, const KVParams& kv, const Sequence& sequence,
                          int64_t headdim)
      : view_(view),
        steps_(steps),
        kv_(kv),
        row_(thread_index() / Traits::kRowLanes),
        chunk_(thread_index() % Traits::kRowLanes),
        chunks_(static_cast<int>(headdim) / Traits::kChunkElements),
        target_(Traits::Panels::template chunk_offset<Traits::kKeys>(row_, chunk_)) {
    if constexpr (kPaged) {
      pages_ = kv.block_table + sequence.batch * kv.stride_block_table;
      first_ = sequence.kv_first;
      source_ = static_cast<const char*>(view.data) + sequence.head_k * view.stride_head * Traits::kElementBytes;
    } else {
      source_ = static_cast<const char*>(view.data) +
                row_offset(view, sequence.kv_row, sequence.kv_first, sequence.head_k) * Traits::kElementBytes;
    }
    source_ += chunk_ * 16;
  }

  // The tile to copy next begins at this key.
  FASTATTN_DEVICE void seek(int key) {
    if constexpr (kPaged)
      key_ = key;
    else
      source_ += (key + row_) * view_.stride_seqlen * Traits::kElementBytes;
  }

  // `edge`: the tile may reach beyond `seqlen_k`, where zeros stand in.
  template <bool edge>
  FASTATTN_DEVICE void copy(uint32_t tile, int key, int seqlen_k) {
    const char* source = source_;
#pragma unroll
    for (int r = 0; r < Traits::kKeys; r += Traits::kCopyRows) {
      const bool exists = !edge || key + row_ + r < seqlen_k;
      if constexpr (kPaged) source = exists ? source_ + paged(key_ + row_ + r) : source_;
#pragma unroll
      for (int c = 0; c < Traits::kCopyColumns; ++c) {
        const bool wanted = exists && chunk_ + c * Traits::kRowLanes < chunks_;
        cp_async16(tile + column_target(c) + static_cast<uint32_t>(r * Traits::Panels::kBytes),
                   source + c * Traits::kRowLanes * 16, wanted);
      }
      if constexpr (!kPaged) source += steps_.rows;
    }
    if constexpr (kPaged)
      key_ -= Traits::kKeys;
    else
      source_ -= steps_.tile;
  }

 private:
  FASTATTN_DEVICE uint32_t column_target(int c) const {
    if constexpr (Traits::kRowLanes >= 8)
      return target_ + static_cast<uint32_t>(c * Traits::kRowLanes * Traits::kKeys * 16);
    else
      return (target_ ^ static_cast<uint32_t>(c % 2 * kPanelBytes)) +
             static_cast<uint32_t>(c * Traits::kKeys * kPanelBytes);
  }

  FASTATTN_DEVICE int64_t paged(int key) const {
    const int page_size = static_cast<int>(kv_.page_size), token = first_ + key, page = token / page_size;
    return (load_global(pages_ + page) * view_.stride_batch + (token - page * page_size) * view_.stride_seqlen) *
           Traits::kElementBytes;
  }

  const TensorView& view_;
  const CopySteps& steps_;
  const KVParams& kv_;
  const int row_, chunk_, chunks_;
  const uint32_t target_;  // of this thread's first chunk within a tile
  const char* source_;     // its bytes in global memory; of pages: in page 0
  const int32_t* pages_ = nullptr;
  int first_ = 0, key_ = 0;
};

// The kLines lines of a tile, 16 bytes a thread: line_of(i, exists) points to line i's first byte, and where exists is
// false to any other's: zeros stand in.
// Columns past `dims` arrive as zeros.
template <class Traits, int kLines, class LineOf>
FASTATTN_DEVICE void copy_lines(uint32_t tile, int64_t dims, LineOf line_of) {
  const int line = thread_index() / Traits::kRowLanes, chunk = thread_index() % Traits::kRowLanes;
#pragma unroll
  for (int r = 0; r < kLines; r += Traits::kCopyRows) {
    bool exists = true;
    const char* source = line_of(line + r, exists) + chunk * 16;
#pragma unroll
    for (int c = 0; c < Traits::kChunks; c += Traits::kRowLanes) {
      const bool wanted = exists && chunk + c < dims / Traits::kChunkElements;
      cp_async16(tile + Traits::Panels::template chunk_offset<kLines>(line + r, chunk + c), source + c * 16, wanted);
    }
  }
}

// Rows from `first` on of a tensor that is laid out as q; those beyond the sequence arrive as zeros.
template <class Traits, int kLines>
FASTATTN_DEVICE void copy_rows(uint32_t tile, const TensorView& view, int64_t dims, const Sequence& sequence,
                               int first) {
  copy_lines<Traits, kLines>(tile, dims, [&](int line, bool& exists) {
    exists = first + line < sequence.rows();
    const int at = exists ? first + line : first;
    return static_cast<const char*>(view.data) +
           row_offset(view, sequence.q_row, sequence.q_first + sequence.query(at), sequence.head(at)) *
               Traits::kElementBytes;
  });
}

// Keys from `first` on of k or v, which are not paged.
template <class Traits>
FASTATTN_DEVICE void copy_keys(uint32_t tile, const TensorView& view, int64_t dims, const Sequence& sequence,
                               int first) {
  copy_lines<Traits, Traits::kRows>(tile, dims, [&](int line, bool& exists) {
    exists = first + line < sequence.seqlen_k;
    return static_cast<const char*>(view.data) +
           row_offset(view, sequence.kv_row, sequence.kv_first + (exists ? first + line : first), sequence.head_k) *
               Traits::kElementBytes;
  });
}

}  // namespace
}  // namespace fastattn
