// Fetching what comes next while something else is at work: rows of a few cache lines, wherever they lie.
#pragma once

#include "cpu/integers.h"

namespace fastattn {
namespace {

constexpr int kIntoL2 = 2;     // __builtin_prefetch's locality
constexpr int64_t kLine = 64;  // bytes

// Walks through rows line by line, in the order in which they lie.
class Prefetch {
 public:
  // `n` starts of rows of `bytes` bytes.
  template <class T>
  Prefetch(const T* const* rows, int n, int64_t bytes)
      : rows_(reinterpret_cast<const char* const*>(rows)), end_(rows_ + n), bytes_(bytes) {}

  void lines(int64_t n) {
    while (n > 0 && rows_ != end_) {
      const int64_t left = ceil_div(bytes_ - at_, kLine), now = at_most(left, n);
      const char* line = *rows_ + at_;
      for (int64_t i = 0; i < now; ++i) __builtin_prefetch(line + i * kLine, 0, kIntoL2);
      at_ += now * kLine;
      n -= now;
      if (now == left) {
        at_ = 0;
        ++rows_;
      }
    }
  }

 private:
  const char* const* rows_;
  const char* const* end_;
  int64_t bytes_, at_ = 0;
};

// Rows anywhere, fetched a few lines at every step() while something else is at work.
class FetchAhead {
 public:
  void clear() { count_ = next_ = 0; }

  // Rows beyond what there is room for are not fetched.
  void add(const void* row, int64_t bytes) {
    if (count_ == kMaxRows) return;
    const char* at = static_cast<const char*>(row);
    rows_[count_++] = {at, at + bytes};
  }

  // step() will be called so often before the rows are needed.
  void spread(int64_t steps) {
    int64_t lines = 0;
    for (int i = 0; i < count_; ++i) lines += ceil_div(rows_[i].end - rows_[i].at, kLine);
    lines_ = ceil_div(lines, steps);
  }

  __attribute__((noinline)) void step() {
    for (int64_t n = lines_; n > 0 && next_ < count_; --n) {
      Row& row = rows_[next_];
      __builtin_prefetch(row.at, 0, kIntoL2);
      row.at += kLine;
      next_ += row.at >= row.end;
    }
  }

 private:
  static constexpr int kMaxRows = 512;
  struct Row {
    const char* at;
    const char* end;
  };
  Row rows_[kMaxRows];
  int count_ = 0, next_ = 0;
  int64_t lines_ = 0;
};

}  // namespace
}  // namespace fastattn
