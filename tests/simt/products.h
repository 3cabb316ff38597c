// The products of sm_90: asynchronous, of a warpgroup, with operands in shared memory or in registers.
#pragma once

#include <deque>
#include <memory>

#include "memory.h"

namespace simt {

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
  std::vector<uint32_t> operands = {};  // addresses of 16 bytes that it read
  struct Lane {
    Accumulator* c;
    const uint32_t* a;
    Token issued;
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
    product.lanes[index()] = {accumulator(c, wanted.tiles * 4, number), a, happens_before.moment()};
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
    for (; me.retired < last; ++me.retired)
      happens_before.acquire(finished_[me.retired].of_warp[machine.current->thread / 32 % 4]);
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
    account_for(product);
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
  struct Finished {
    Token of_warp[4];
  };
  // A product is one event to a warp, but reads the operands on behalf of each lane: what one lane alone knows is not
  // enough.
  void account_for(const Product& product) {
    Finished finished;
    for (Token& token : finished.of_warp) token = happens_before.token();
    for (int thread = 0; thread < 128; ++thread)
      happens_before.for_thread(128 * number_ + thread, [&] {
        happens_before.acquire(product.lanes[thread].issued);
        for (uint32_t address : product.operands)
          if (void* at = shared.bytes_at(address, 16)) happens_before.read(at, 16);
        happens_before.release(finished.of_warp[thread / 32]);
      });
    finished_.push_back(finished);
  }
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
  std::vector<Finished> finished_;  // by product
};
inline std::deque<Warpgroup> warpgroups;
inline Warpgroup& warpgroup() { return warpgroups[static_cast<size_t>(machine.current->thread / 128)]; }

}  // namespace simt
