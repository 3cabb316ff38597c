// Fetching what comes next while something else is at work: rows of a few cache lines, wherever they lie.
#pragma once

#include "cpu/integers.h"

namespace fastattn {
namespace {

// Walks through rows line by line, in the order in which they lie.
class Prefetch {
 public:
  Prefetch() = default;
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
  static constexpr int kIntoL2 = 2;
  static constexpr int64_t kLine = 64;
  const char* const* rows_ = nullptr;
  const char* const* end_ = nullptr;
  int64_t bytes_ = 0, at_ = 0;
};

}  // namespace
}  // namespace fastattn
