// CUDA's threads on one CPU thread: a fiber per CUDA thread, one block at a time, in an order drawn from a seed.
//
// Nothing here is lenient where hardware is: a warp's lanes share no lockstep, a barrier that not all threads reach is
// an error, and so is a warp collective that not all lanes reach.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "happens_before.h"

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace simt {

// What a launch can be guilty of; fastattn's tests ask for the counts by this order.
enum Fault {
  kSharedRace,     // two threads meet at a word of shared memory, one writes, no barrier is between them
  kInFlight,       // a word of shared memory is touched while an asynchronous copy to it has not been waited for
  kUninitialised,  // a word of shared memory is read that nobody wrote
  kSharedBounds,
  kGlobalBounds,  // outside every tensor of the call, or a write to an input
  kGlobalRace,    // two threads meet in global memory, one writes, nothing orders them
  kAlignment,
  kBarrier,     // threads meet at different barriers, or some never come
  kCollective,  // lanes meet at different warp collectives, or some never come
  kUnwaited,    // a thread ends with asynchronous copies or products in flight
  kWarpgroup,   // threads of a warpgroup ask for different products, without a fence, or touch registers in flight
  kProxy,       // wgmma or a bulk copy reads what was written without fence.proxy.async behind it
  kFaults
};

enum class Landing { at_wait, at_issue, between };  // when asynchronous copies write their target

struct Site {  // a place in the kernel's source
  const char* file;
  int line;
};

// Where a call stands: a default argument is evaluated at its call.
inline Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }

struct Index3 {
  unsigned x = 1, y = 1, z = 1;
};

struct Copy {
  uint32_t target;  // shared address
  const void* source;
  uint32_t bytes;  // 16, or 0 = zeros
  bool landed;
  Site site;
  Token issued;
};

struct Fiber {
  void* stack_pointer = nullptr;
  std::vector<char> stack;
#ifndef __x86_64__
  ucontext_t context;
#endif
  int thread = 0;
  bool ready = false, done = false;
  Site site{};                 // of the barrier at which it waits
  std::vector<Copy> copies;    // issued, not yet waited for, oldest first
  std::vector<size_t> groups;  // how many of `copies` each committed group holds
  size_t ungrouped = 0;        // the youngest of `copies` that belong to no group yet
  bool polling = false;        // waits for what another thread or an asynchronous operation does
  uint64_t proxy_fence = 0;    // when it last fenced, by machine.now
  // Vector clock: what of each thread this one knows to have happened before, then how many products of each warp.
  std::vector<uint32_t> clock;

  bool knows(int by, uint32_t at) const { return static_cast<size_t>(by) < clock.size() && clock[by] >= at; }
  void learn(const std::vector<uint32_t>& other) {
    for (size_t i = 0; i < other.size(); ++i)
      if (other[i] > clock[i]) clock[i] = other[i];
  }
  // What it has done so far goes into `known`; what it does from here on is not in it.
  void publish(std::vector<uint32_t>& known) {
    if (known.size() < clock.size()) known.resize(clock.size());
    for (size_t i = 0; i < clock.size(); ++i)
      if (clock[i] > known[i]) known[i] = clock[i];
    ++clock[static_cast<size_t>(thread)];
  }
};

struct Warp {
  int arrived = 0;
  Site site{};
  long generation = 0;
  uint32_t epoch = 0;  // warp barriers passed
  Token barriers[2];   // by turns: nobody is two collectives ahead of another
  alignas(16) unsigned char in[32][64], out[32][64];
};

class Machine {
 public:
  uint64_t random_state = 1;
  bool shuffled = true;  // false: threads and blocks in order
  Landing landing = Landing::between;
  long faults[kFaults] = {};
  std::string report;

  Fiber* current = nullptr;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  int block = 0, threads = 0;
  Index3 grid, block_index;
  uint32_t epoch = 0;  // block barriers passed
  long switches = 0, mmas = 0, wgmmas = 0;
  uint64_t now = 0;                      // of writes and proxy fences
  int compute_capability = 80;           // what launches are told
  bool (*finish_something)() = nullptr;  // when all threads wait: one asynchronous operation, or false if there is none

  uint64_t random() {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state;
  }

  void fault(Fault kind, const char* what, Site site) {
    if (faults[kind]++ >= 2) return;
    char line[400];
    snprintf(line, sizeof line, "%s at %s:%d, block %d thread %d\n", what, base_name(site.file), site.line, block,
             current ? current->thread : -1);
    report += line;
  }

  int lane() const { return current->thread % 32; }
  Warp& warp() { return warps[static_cast<size_t>(current->thread / 32)]; }

  // Runs body() for every thread of every block. `before` and `after` frame each block.
  void launch(Index3 grid_size, int block_threads, const std::function<void()>& body,
              const std::function<void()>& before, const std::function<void()>& after);

  void barrier(Site site);
  // Until done(), asked again whenever something was finished that a thread may wait for.
  template <class Done>
  void wait_until(Site site, Done done) {
    Fiber& me = *current;
    me.site = site;
    while (!done()) {
      me.polling = true;
      me.ready = false;
      to_scheduler();
    }
  }
  void wake() {
    for (Fiber& fiber : fibers)
      if (fiber.polling) {
        fiber.polling = false;
        fiber.ready = true;
      }
  }
  // All lanes bring 64 bytes in warp().in; `combine` fills warp().out once.
  void collective(Site site, void (*combine)(Warp&));

 private:
  static const char* base_name(const char* path) {
    const char* name = path;
    for (; *path; ++path)
      if (*path == '/') name = path + 1;
    return name;
  }
  void to_scheduler();
  void run(Fiber& fiber);
  void start(Fiber& fiber);
  static void entry();

  int arrived_ = 0, live_ = 0;
  long generation_ = 0;
  Token barriers_[2];  // by turns
  void* scheduler_pointer_ = nullptr;
#ifndef __x86_64__
  ucontext_t scheduler_context_;
#endif
  const std::function<void()>* body_ = nullptr;
};

inline Machine machine;

#ifdef __x86_64__
extern "C" void simt_switch(void** save, void* load);  // emulated.cpp

inline void Machine::to_scheduler() {
  ++switches;
  happens_before.to_scheduler();
  simt_switch(&current->stack_pointer, scheduler_pointer_);
}
inline void Machine::run(Fiber& fiber) {
  current = &fiber;
  happens_before.to_thread(fiber.thread);
  simt_switch(&scheduler_pointer_, fiber.stack_pointer);
}
inline void Machine::start(Fiber& fiber) {
  void** top = reinterpret_cast<void**>(fiber.stack.data() + fiber.stack.size() / 64 * 64);
  top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t{63});
  *--top = nullptr;  // the stack of a function's first instruction is 8 off 16
  *--top = reinterpret_cast<void*>(&Machine::entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
}
#else
inline void Machine::to_scheduler() {
  ++switches;
  happens_before.to_scheduler();
  swapcontext(&current->context, &scheduler_context_);
}
inline void Machine::run(Fiber& fiber) {
  current = &fiber;
  happens_before.to_thread(fiber.thread);
  swapcontext(&scheduler_context_, &fiber.context);
}
inline void Machine::start(Fiber& fiber) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.data();
  fiber.context.uc_stack.ss_size = fiber.stack.size();
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, &Machine::entry, 0);
}
#endif

inline void Machine::entry() {
  (*machine.body_)();
  happens_before.end_thread();
  Fiber& me = *machine.current;
  me.ready = false;
  me.done = true;
  --machine.live_;
  for (;;) machine.to_scheduler();
}

inline void Machine::barrier(Site site) {
  Fiber& me = *current;
  me.site = site;
  me.ready = false;
  const long generation = generation_;
  const Token token = barriers_[generation % 2];
  happens_before.release(token);
  if (++arrived_ == threads) {
    for (Fiber& fiber : fibers) {
      if (fiber.site.line != site.line) fault(kBarrier, "threads meet at different barriers", site);
      fiber.ready = true;
    }
    arrived_ = 0;
    ++generation_;
    ++epoch;
  }
  while (generation_ == generation) to_scheduler();
  happens_before.acquire(token);
}

inline void Machine::collective(Site site, void (*combine)(Warp&)) {
  Warp& mine = warp();
  const size_t first = static_cast<size_t>(current->thread) / 32 * 32;
  const long generation = mine.generation;
  if (mine.arrived == 0)
    mine.site = site;
  else if (mine.site.line != site.line)
    fault(kCollective, "lanes meet at different warp collectives", site);
  current->ready = false;
  if (++mine.arrived == 32) {
    combine(mine);
    mine.arrived = 0;
    ++mine.generation;
    for (size_t i = first; i < first + 32; ++i) fibers[i].ready = true;
  }
  while (mine.generation == generation) to_scheduler();
}

inline void Machine::launch(Index3 grid_size, int block_threads, const std::function<void()>& body,
                            const std::function<void()>& before, const std::function<void()>& after) {
  grid = grid_size;
  threads = block_threads;
  body_ = &body;
  fibers.resize(static_cast<size_t>(threads));
  for (Fiber& fiber : fibers) fiber.stack.resize(64 << 10);
  happens_before.begin_launch();
  std::vector<int> blocks(grid.x * grid.y * grid.z), order;
  for (size_t i = 0; i < blocks.size(); ++i) blocks[i] = static_cast<int>(i);
  for (size_t i = blocks.size(); shuffled && i > 1; --i) std::swap(blocks[i - 1], blocks[random() % i]);
  for (int number : blocks) {
    block = number;
    const unsigned at = static_cast<unsigned>(number);
    block_index = {at % grid.x, at / grid.x % grid.y, at / (grid.x * grid.y)};
    const int warp_count = (threads + 31) / 32;
    happens_before.begin_block(block, threads);
    warps.assign(static_cast<size_t>(warp_count), Warp{});
    for (Token& token : barriers_) token = happens_before.token();
    for (Warp& warp : warps)
      for (Token& token : warp.barriers) token = happens_before.token();
    arrived_ = 0;
    epoch = 0;
    live_ = threads;
    for (int i = 0; i < threads; ++i) {
      Fiber& fiber = fibers[static_cast<size_t>(i)];
      fiber.thread = i;
      fiber.ready = true;
      fiber.done = false;
      fiber.copies.clear();
      fiber.groups.clear();
      fiber.ungrouped = 0;
      fiber.polling = false;
      fiber.proxy_fence = 0;
      fiber.clock.assign(static_cast<size_t>(threads + warp_count), 0);
      fiber.clock[static_cast<size_t>(i)] = 1;
      start(fiber);
    }
    before();
    while (live_) {
      order.clear();
      for (int i = 0; i < threads; ++i)
        if (fibers[static_cast<size_t>(i)].ready) order.push_back(i);
      if (order.empty()) {
        current = nullptr;
        if (finish_something && finish_something()) continue;
        fault(arrived_ ? kBarrier : kCollective, "some threads wait for others that never come", {"", 0});
        break;
      }
      for (size_t i = order.size(); shuffled && i > 1; --i) std::swap(order[i - 1], order[random() % i]);
      for (int i : order) {
        Fiber& fiber = fibers[static_cast<size_t>(i)];
        if (!fiber.ready) continue;
        run(fiber);
        if (shuffled && (random() & 7) == 0) break;  // let some run far ahead of the others
      }
    }
    for (Fiber& fiber : fibers) {
      current = &fiber;
      if (!fiber.copies.empty()) fault(kUnwaited, "a thread ends with copies in flight", fiber.copies[0].site);
    }
    after();
    happens_before.end_block();
    current = nullptr;
  }
  happens_before.end_launch();
}

}  // namespace simt
