// What sm_90 adds to the emulated machine: barriers in shared memory and by name, copies that arrive at them, bulk
// copies, and the products of warpgroups. All of it is asynchronous, and done as early or as late as the seed likes.
#pragma once

#include <deque>

#include "memory.h"

namespace simt {

// Copies may land whenever they like between issue and wait.
inline void land(Copy& copy) {
  if (copy.landed) return;
  unsigned char data[16] = {};
  if (copy.bytes && global.read(copy.source, 16, copy.site)) memcpy(data, copy.source, 16);
  shared.land(copy.target, data);
  copy.landed = true;
}

// The oldest `count` copies of a thread that waits for them.
inline void land_oldest(Fiber& me, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    land(me.copies[i]);
    shared.end_copy(me.copies[i].target, me.thread, me.clock[static_cast<size_t>(me.thread)]);
  }
  me.copies.erase(me.copies.begin(), me.copies.begin() + static_cast<long>(count));
}

// ---------------------------------------------------------------- barriers
struct Barrier {
  int expected = 0, missing = 0;
  uint32_t phase = 0;
  std::vector<uint32_t> known, arriving;  // clocks: of the phases that have ended, and with those that have arrived

  void arrive(Site site) {
    if (missing == 0) return machine.fault(kBarrier, "arrival at a barrier that was never made", site);
    if (--missing) return;
    missing = expected;
    ++phase;
    known = arriving;
    machine.wake();
  }
};

class Barriers {
 public:
  void reset() {
    in_memory_.clear();
    named_.clear();
  }

  void init(uint32_t address, int arrivals, Site site) {
    const uint64_t state = 0;
    shared.write(address, &state, 8, site);
    in_memory_[address] = Barrier{arrivals, arrivals, 0, {}, {}};
  }
  Barrier& at(uint32_t address, Site site) {
    uint64_t state;
    shared.read(address, &state, 8, site);  // was it made, and is that known here?
    return in_memory_[address];
  }
  void wait(uint32_t address, int parity, Site site) {
    Barrier& barrier = at(address, site);
    machine.wait_until(site, [&] { return static_cast<int>(barrier.phase % 2) != parity; });
    machine.current->learn(barrier.known);
  }

  void meet(int id, int threads, Site site) {
    Barrier& barrier = named_[id];
    if (barrier.phase == 0 && barrier.missing == 0) barrier.expected = barrier.missing = threads;
    if (barrier.expected != threads || id < 1 || id > 15)
      machine.fault(kBarrier, "threads disagree about a named barrier", site);
    const uint32_t phase = barrier.phase;
    machine.current->publish(barrier.arriving);
    barrier.arrive(site);
    machine.wait_until(site, [&] { return barrier.phase != phase; });
    machine.current->learn(barrier.known);
  }

 private:
  std::map<uint32_t, Barrier> in_memory_;
  std::map<int, Barrier> named_;
};
inline Barriers barriers;

// Copies at whose landing their thread arrives at a barrier. Those of a thread land one after the other.
class Arrivals {
 public:
  void reset() { of_thread_.clear(); }

  // All copies of this thread that nothing waits for yet, and its arrival after them.
  void add(Barrier& barrier, Site site) {
    Fiber& me = *machine.current;
    Arrival arrival{me.copies, &barrier, {}, me.clock[static_cast<size_t>(me.thread)], site};
    me.copies.clear();
    me.groups.clear();
    me.ungrouped = 0;
    me.publish(arrival.known);
    of_thread_[me.thread].push_back(std::move(arrival));
    if (machine.landing == Landing::at_issue) land_all_of(me.thread);
  }

  void land_first_of(int thread) {
    std::deque<Arrival>& waiting = of_thread_[thread];
    Arrival arrival = std::move(waiting.front());
    waiting.pop_front();
    if (waiting.empty()) of_thread_.erase(thread);
    for (Copy& copy : arrival.copies) {
      land(copy);
      shared.end_copy(copy.target, thread, arrival.clock);
    }
    std::vector<uint32_t>& arriving = arrival.barrier->arriving;
    arriving.resize(arrival.known.size());
    for (size_t i = 0; i < arriving.size(); ++i) arriving[i] = std::max(arriving[i], arrival.known[i]);
    arrival.barrier->arrive(arrival.site);
  }
  void land_all_of(int thread) {
    while (of_thread_.count(thread)) land_first_of(thread);
  }
  bool land_any() {
    if (of_thread_.empty()) return false;
    auto place = of_thread_.begin();
    std::advance(place, machine.random() % of_thread_.size());
    land_first_of(place->first);
    return true;
  }
  bool empty() const { return of_thread_.empty(); }

 private:
  struct Arrival {
    std::vector<Copy> copies;
    Barrier* barrier;
    std::vector<uint32_t> known;
    uint32_t clock;
    Site site;
  };
  std::map<int, std::deque<Arrival>> of_thread_;
};
inline Arrivals arrivals;

// ---------------------------------------------------------------- bulk copies
class BulkStores {
 public:
  void reset() { pending_.clear(); }

  void add(void* target, uint32_t source, uint32_t bytes, Site site) {
    if (bytes % 16 || source % 16 || reinterpret_cast<uintptr_t>(target) % 16)
      machine.fault(kAlignment, "misaligned bulk copy", site);
    Store store{target, {}, machine.current->thread, false, source, site};
    store.data.resize(bytes / 16 * 16);
    ProxyReader reader;
    reader.asked_by(*machine.current);
    for (uint32_t i = 0; i < bytes; i += 16) shared.read_by_proxy(source + i, &store.data[i], reader, site);
    shared.count_reader(source, bytes, 1);
    pending_.push_back(std::move(store));
  }
  void commit() {
    for (Store& store : pending_) store.grouped |= store.thread == machine.current->thread;
  }
  void wait() {
    for (size_t i = 0; i < pending_.size();)
      if (pending_[i].thread == machine.current->thread && pending_[i].grouped)
        finish(i);
      else
        ++i;
  }
  bool empty() const { return pending_.empty(); }

 private:
  struct Store {
    void* target;
    std::vector<char> data;
    int thread;
    bool grouped;
    uint32_t source;
    Site site;
  };
  void finish(size_t i) {
    Store& store = pending_[i];
    for (size_t b = 0; b < store.data.size(); b += 16) {
      char* at = static_cast<char*>(store.target) + b;
      if (global.write(at, 16, store.site)) memcpy(at, &store.data[b], 16);
    }
    shared.count_reader(store.source, static_cast<uint32_t>(store.data.size()), -1);
    pending_.erase(pending_.begin() + static_cast<long>(i));
  }
  std::vector<Store> pending_;
};
inline BulkStores bulk_stores;

// ---------------------------------------------------------------- products
// A matrix descriptor, decoded as the PTX ISA has it: where 16 bytes of an operand lie.
struct Descriptor {
  uint32_t start, leading, stride, span;  // span: bytes of the swizzle, 16 = none

  explicit Descriptor(uint64_t bits)
      : start(static_cast<uint32_t>(bits & 0x3fff) << 4),
        leading(static_cast<uint32_t>(bits >> 16 & 0x3fff) << 4),
        stride(static_cast<uint32_t>(bits >> 32 & 0x3fff) << 4) {
    constexpr uint32_t spans[4] = {16, 128, 64, 32};
    span = spans[bits >> 62];
  }

  // Chunk `chunk` (8 elements along k) of row `row`: K-major.
  uint32_t of_row(int row, int chunk) const {
    const uint32_t in_row = static_cast<uint32_t>(chunk) * (span == 16 ? leading : 16);
    return swizzled(start + static_cast<uint32_t>(row / 8) * stride + static_cast<uint32_t>(row % 8) * span + in_row);
  }
  // Chunk `chunk` (8 elements along n) of line k: MN-major.
  uint32_t of_line(int k, int chunk) const {
    const uint32_t eight = static_cast<uint32_t>(k / 8), line = static_cast<uint32_t>(k % 8) * span;
    const uint32_t at = static_cast<uint32_t>(chunk) * 16;
    if (span == 16) return start + static_cast<uint32_t>(chunk) * stride + eight * leading + line;
    return swizzled(start + at / span * leading + eight * stride + line + at % span);
  }

 private:
  uint32_t swizzled(uint32_t address) const { return address ^ ((address >> 7 & (span / 16 - 1)) << 4); }
};

// A thread's accumulators while they belong to products: what is at `home` is NaN until the wait.
struct Accumulator {
  float* home;
  std::vector<float> value;
  uint32_t last = 0;  // the youngest product that adds to it
};

struct Product {
  uint64_t a_tile, b_tile;  // a_tile is 0 where a is in registers
  int tiles;                // n / 8
  bool add, b_is_columns;
  void (*multiply)(Product&, int group, uint32_t number);
  Site site;
  int issued = 0;
  ProxyReader reader = {};
  struct Lane {
    Accumulator* c;
    const uint32_t* a;
  } lanes[128] = {};

  bool same(const Product& other) const {
    return a_tile == other.a_tile && b_tile == other.b_tile && tiles == other.tiles && add == other.add &&
           b_is_columns == other.b_is_columns && site.line == other.site.line;
  }
};

// The products of one warpgroup, which run in the order of their issue.
class Warpgroup {
 public:
  explicit Warpgroup(int number) : number_(number), threads_(128) {}

  void fence() { mine().fenced = true; }

  void issue(const Product& wanted, float* c, const uint32_t* a) {
    perhaps_finish();
    Thread& me = mine();
    if (!me.fenced) machine.fault(kWarpgroup, "product without a fence", wanted.site);
    const uint32_t number = ++me.issued;
    if (number - done_ > products_.size()) products_.push_back(wanted);
    Product& product = products_[number - done_ - 1];
    if (!product.same(wanted)) machine.fault(kWarpgroup, "threads issue different products", wanted.site);
    product.lanes[index()] = {accumulator(c, wanted.tiles * 4, number), a};
    product.reader.asked_by(*machine.current);
    if (++product.issued < 128) return;
    machine.wake();
    while (machine.landing == Landing::at_issue && finish_one()) {
    }
  }
  void commit() { mine().groups.push_back(mine().issued); }

  void wait(size_t pending, Site site) {
    Thread& me = mine();
    me.fenced = false;
    uint32_t last = 0;
    for (; me.groups.size() > pending; me.groups.pop_front()) last = me.groups.front();
    if (!last) return;
    machine.wait_until(site, [&] {
      while (done_ < last && finish_one()) {
      }
      return done_ >= last;
    });
    me.retired = last;
    for (size_t i = 0; i < me.accumulators.size();)
      if (me.accumulators[i]->last <= last)
        give_back(me, i, site);
      else
        ++i;
    machine.current->clock[static_cast<size_t>(machine.threads + machine.current->thread / 32)] = last;
  }

  bool finish_one() {
    if (products_.empty() || products_.front().issued < 128) return false;
    Product product = products_.front();
    products_.pop_front();
    ++done_;
    product.multiply(product, number_, done_);
    machine.wake();
    return true;
  }
  void perhaps_finish() {
    if (machine.landing == Landing::between && (machine.random() & 3) == 0) finish_one();
  }
  bool is_done(int thread) const {
    return threads_[static_cast<size_t>(thread % 128)].issued == threads_[static_cast<size_t>(thread % 128)].retired;
  }

 private:
  struct Thread {
    uint32_t issued = 0, retired = 0;
    bool fenced = false;
    std::deque<uint32_t> groups;  // the last product of each that was committed and not waited for
    std::vector<std::unique_ptr<Accumulator>> accumulators;
  };
  static size_t index() { return static_cast<size_t>(machine.current->thread % 128); }
  Thread& mine() { return threads_[index()]; }

  Accumulator* accumulator(float* home, int count, uint32_t number) {
    Thread& me = mine();
    for (auto& known : me.accumulators)
      if (known->home == home) {
        known->last = number;
        return known.get();
      }
    me.accumulators.push_back(std::make_unique<Accumulator>(Accumulator{home, {home, home + count}, number}));
    memset(home, 0xFF, static_cast<size_t>(count) * 4);
    return me.accumulators.back().get();
  }
  static void give_back(Thread& me, size_t i, Site site) {
    Accumulator& c = *me.accumulators[i];
    for (size_t e = 0; e < c.value.size(); ++e) {
      uint32_t bits;
      memcpy(&bits, c.home + e, 4);
      if (bits != 0xffffffffu) machine.fault(kWarpgroup, "accumulators were touched while a product had them", site);
      c.home[e] = c.value[e];
    }
    me.accumulators.erase(me.accumulators.begin() + static_cast<long>(i));
  }

  const int number_;
  uint32_t done_ = 0;
  std::deque<Product> products_;  // from number done_ + 1 on
  std::vector<Thread> threads_;
};
inline std::deque<Warpgroup> warpgroups;
inline Warpgroup& warpgroup() { return warpgroups[static_cast<size_t>(machine.current->thread / 128)]; }

// ---------------------------------------------------------------- the block
inline void begin_block() {
  barriers.reset();
  arrivals.reset();
  bulk_stores.reset();
  warpgroups.clear();
  for (int group = 0; 128 * group < machine.threads; ++group) warpgroups.emplace_back(group);
  machine.finish_something = [] { return arrivals.land_any(); };
}

inline void end_block() {
  bool done = arrivals.empty() && bulk_stores.empty();
  for (int thread = 0; thread < machine.threads; ++thread)
    done &= warpgroups[static_cast<size_t>(thread / 128)].is_done(thread);
  if (!done) machine.fault(kUnwaited, "a block ends with copies or products in flight", {"", 0});
}

inline void perhaps_land() {
  if (machine.landing != Landing::between) return;
  for (Copy& copy : machine.current->copies)
    if (machine.random() & 1) land(copy);
  if ((machine.random() & 7) == 0) arrivals.land_any();
}

}  // namespace simt
