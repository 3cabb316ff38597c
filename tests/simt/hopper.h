// What sm_90 adds to the emulated machine: barriers in shared memory and by name, copies that arrive at them, bulk
// copies; products.h has those of warpgroups. All of it is asynchronous, and done as early or as late as the seed
// likes.
#pragma once

#include <deque>
#include <map>

#include "products.h"

namespace simt {

// Copies may land whenever they like between issue and wait.
inline void land(Copy& copy) {
  if (copy.landed) return;
  unsigned char data[16] = {};
  if (copy.bytes && !global.read(copy.source, 16, copy.site)) copy.bytes = 0;
  memcpy(data, copy.source, copy.bytes);
  shared.land(copy.target, data);
  copy.landed = true;
}

// A landed copy's accesses, by who copies for its thread.
inline void account_for(const Copy& copy) {
  happens_before.acquire(copy.issued);
  happens_before.read(copy.source, copy.bytes);
  if (void* at = shared.bytes_at(copy.target, 16)) happens_before.write(at, 16);
}

// The oldest `count` copies of a thread that waits for them.
inline void land_oldest(Fiber& me, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    land(me.copies[i]);
    shared.end_copy(me.copies[i].target, me.thread, me.clock[static_cast<size_t>(me.thread)]);
  }
  const Token landed = happens_before.token();
  happens_before.for_thread(me.thread, [&] {
    for (size_t i = 0; i < count; ++i) account_for(me.copies[i]);
    happens_before.release(landed);
  });
  happens_before.acquire(landed);
  me.copies.erase(me.copies.begin(), me.copies.begin() + static_cast<long>(count));
}

// ---------------------------------------------------------------- barriers
struct Barrier {
  int expected = 0, missing = 0;
  uint32_t phase = 0;
  std::vector<uint32_t> known, arriving;  // clocks: of the phases that have ended, and with those that have arrived
  Token token = happens_before.token();   // of this phase
  std::vector<Token> ended = {};          // of those before

  // Whoever arrives has released `token`.
  void arrive(Site site) {
    if (missing == 0) return machine.fault(kBarrier, "arrival at a barrier that was never made", site);
    if (--missing) return;
    missing = expected;
    ++phase;
    known = arriving;
    ended.push_back(token);
    token = happens_before.token();
    machine.wake();
  }
  void learn() const {
    machine.current->learn(known);
    for (Token phase_token : ended) happens_before.acquire(phase_token);
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
    Barrier& barrier = in_memory_[address] = Barrier{};
    barrier.expected = barrier.missing = arrivals;
  }
  Barrier& at(uint32_t address, Site site) {
    uint64_t state;
    shared.read(address, &state, 8, site);  // was it made, and is that known here?
    return in_memory_[address];
  }
  void wait(uint32_t address, int parity, Site site) {
    Barrier& barrier = at(address, site);
    machine.wait_until(site, [&] { return static_cast<int>(barrier.phase % 2) != parity; });
    barrier.learn();
  }

  void meet(int id, int threads, Site site) {
    Barrier& barrier = named_[id];
    if (barrier.phase == 0 && barrier.missing == 0) barrier.expected = barrier.missing = threads;
    if (barrier.expected != threads || id < 1 || id > 15)
      machine.fault(kBarrier, "threads disagree about a named barrier", site);
    const uint32_t phase = barrier.phase;
    machine.current->publish(barrier.arriving);
    happens_before.release(barrier.token);
    barrier.arrive(site);
    machine.wait_until(site, [&] { return barrier.phase != phase; });
    barrier.learn();
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
    Arrival arrival{me.copies, &barrier, {}, me.clock[static_cast<size_t>(me.thread)], site, happens_before.moment()};
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
    happens_before.for_thread(thread, [&] {
      for (const Copy& copy : arrival.copies) account_for(copy);
      happens_before.acquire(arrival.issued);
      happens_before.release(arrival.barrier->token);
    });
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
    Token issued;
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
    const Token issued = happens_before.moment();
    happens_before.for_thread(store.thread, [&] {
      happens_before.acquire(issued);
      if (void* at = shared.bytes_at(source, bytes)) happens_before.read(at, bytes);
    });
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
      if (!global.write(at, 16, store.site)) continue;
      memcpy(at, &store.data[b], 16);
      happens_before.for_thread(store.thread, [&] { happens_before.write(at, 16); });
    }
    const Token done = happens_before.token();
    happens_before.for_thread(store.thread, [&] { happens_before.release(done); });
    happens_before.acquire(done);
    shared.count_reader(store.source, static_cast<uint32_t>(store.data.size()), -1);
    pending_.erase(pending_.begin() + static_cast<long>(i));
  }
  std::vector<Store> pending_;
};
inline BulkStores bulk_stores;

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
