// What ThreadSanitizer is told, in builds for it (SIMT_THREAD_SANITIZER).
//
// The emulator itself is not instrumented: that fibers take turns on one CPU thread would order everything, and its own
// books are nobody's race. ThreadSanitizer hears of every CUDA thread as a fiber of its own, of what copies or
// multiplies on a thread's behalf as a further one, of each access that the kernel makes, and of what the kernel's
// barriers and waits order. Nothing else orders two accesses: blocks of a launch are ordered by nothing, shuffles and
// products of a warp do not order memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <vector>

extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_set_fiber_name(void* fiber, const char* name);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void __tsan_read_range(void* address, unsigned long bytes);
void __tsan_write_range(void* address, unsigned long bytes);
void __tsan_read_range_pc(void* address, unsigned long bytes, void* from);
void __tsan_write_range_pc(void* address, unsigned long bytes, void* from);
uint32_t __tsan_atomic32_fetch_add(volatile uint32_t* address, uint32_t value, int order);
}

namespace simt {

#ifdef SIMT_THREAD_SANITIZER
constexpr bool kJudged = true;
#define SIMT_ACCESS inline __attribute__((always_inline))  // so that reports name the kernel's line
#else
constexpr bool kJudged = false;  // all of this is nothing
#define SIMT_ACCESS inline
#endif

// A place where some leave what they know, and others take it.
using Token = uint64_t*;

class HappensBefore {
 public:
  void begin_launch() {
    if constexpr (!kJudged) return;
    scheduler_ = __tsan_get_current_fiber();
    taken_ = 0;
    begin_ = moment();
    end_ = token();
  }
  // Threads of other blocks, and what acts for them, are other threads. All begin with what was before the launch.
  void begin_block(int block, int threads) {
    if constexpr (!kJudged) return;
    block_ = block;
    threads_.clear();
    for (int i = 0; i < threads; ++i) threads_.push_back(fiber(i, ""));
    helpers_.assign(static_cast<size_t>(threads), nullptr);
  }
  void end_thread() { release(end_); }
  void end_block() {
    if constexpr (!kJudged) return;
    for (size_t i = 0; i < helpers_.size(); ++i)
      if (helpers_[i]) for_thread(static_cast<int>(i), [&] { release(end_); });
  }
  void end_launch() {
    if constexpr (!kJudged) return;
    acquire(end_);
    chunks_.clear();
    used_ = kChunk;
  }

  void to_thread(int thread) { to(threads_, static_cast<size_t>(thread)); }
  void to_scheduler() {
    if constexpr (kJudged) __tsan_switch_to_fiber(scheduler_, kNoSync);
  }
  // What is done asynchronously on behalf of a thread: it knows what it acquires, and the thread learns what it
  // releases.
  template <class Act>
  void for_thread(int thread, Act act) {
    if constexpr (!kJudged) return;
    void* before = __tsan_get_current_fiber();
    void*& helper = helpers_[static_cast<size_t>(thread)];
    if (!helper) helper = fiber(thread, ", asynchronously");
    __tsan_switch_to_fiber(helper, kNoSync);
    act();
    __tsan_switch_to_fiber(before, kNoSync);
  }

  // Of this launch.
  Token token() {
    if constexpr (!kJudged) return nullptr;
    if (used_ == kChunk) {
      chunks_.push_back(std::make_unique<uint64_t[]>(kChunk));
      used_ = 0;
    }
    return &chunks_.back()[used_++];
  }
  // What the caller knows now goes to a token of its own.
  Token moment() {
    const Token now = token();
    release(now);
    return now;
  }
  void release(Token to) {
    if constexpr (kJudged) __tsan_release(to);
  }
  void acquire(Token from) {
    if constexpr (kJudged) __tsan_acquire(from);
  }

  // `from`: where in the kernel, if it is not where this stands.
  SIMT_ACCESS void read(const void* address, size_t bytes, void* from = nullptr) {
    if constexpr (!kJudged) return;
    void* at = const_cast<void*>(address);
    from ? __tsan_read_range_pc(at, bytes, from) : __tsan_read_range(at, bytes);
  }
  SIMT_ACCESS void write(void* address, size_t bytes, void* from = nullptr) {
    if constexpr (!kJudged) return;
    from ? __tsan_write_range_pc(address, bytes, from) : __tsan_write_range(address, bytes);
  }
  // Orders nothing. The value is the emulator's to change.
  void atomic(void* word) {
    if constexpr (kJudged) __tsan_atomic32_fetch_add(static_cast<uint32_t*>(word), 0, __ATOMIC_RELAXED);
  }

 private:
  static constexpr unsigned kNoSync = 1;  // __tsan_switch_to_fiber_no_sync
  static constexpr size_t kChunk = 512;

  void to(const std::vector<void*>& fibers, size_t i) {
    if constexpr (kJudged) __tsan_switch_to_fiber(fibers[i], kNoSync);
  }
  // One that this launch has not seen yet. They are dear: the next launch, which comes after this one, takes them
  // again.
  void* fiber(int thread, const char* how) {
    void* before = __tsan_get_current_fiber();
    to_scheduler();
    if (taken_ == fibers_.size()) fibers_.push_back(__tsan_create_fiber(0));
    void* one = fibers_[taken_++];
    char name[60];
    snprintf(name, sizeof name, "block %d thread %d%s", block_, thread, how);
    __tsan_set_fiber_name(one, name);
    __tsan_switch_to_fiber(one, kNoSync);
    acquire(begin_);
    __tsan_switch_to_fiber(before, kNoSync);
    return one;
  }

  void* scheduler_ = nullptr;
  std::vector<void*> threads_, helpers_, fibers_;  // of the block, by thread; all that there are
  int block_ = 0;
  size_t taken_ = 0;  // of `fibers_`, by this launch
  std::vector<std::unique_ptr<uint64_t[]>> chunks_;
  size_t used_ = kChunk;
  Token begin_ = nullptr, end_ = nullptr;
};

inline HappensBefore happens_before;

}  // namespace simt
