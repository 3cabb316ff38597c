// The memories of the emulated machine, and who may touch what when.
//
// Every access of a kernel comes through here. Shared memory has a shadow per 4-byte word, written global memory one
// per byte: the last writer and the readers since, in epochs of the block's barriers and of each warp's. Two
// accesses of which one writes are ordered only by a barrier between them; that the schedule at hand did not show the
// race does not matter. A write, and the reads of one thread, are ordered before what comes later also by a chain of
// mbarriers and named barriers, which vector clocks follow.
#pragma once

#include <algorithm>
#include <cstring>

#include "fibers.h"

namespace simt {

// The last write to a place and the reads since.
struct History {
  static constexpr int kNobody = -1, kSeveralWarps = -2, kAtomics = 1 << 20;  // a thread of no warp
  int writer = kNobody, reader_warp = kNobody, reader = kNobody;  // reader: kNobody also when several threads read
  uint32_t write_epoch = 0, write_warp_epoch = 0, read_epoch = 0, read_warp_epoch = 0;
  uint32_t write_clock = 0, read_clock = 0;  // the writer's own, and the one reader's

  // Atomics are ordered among themselves, and race with all else.
  bool atomic() {
    if (writer == kAtomics && write_epoch == machine.epoch && reader_warp == kNobody) return true;
    const bool fine = write();
    writer = kAtomics;
    return fine;
  }

  // Whether an access by the current thread comes after the last write.
  bool after_write() const {
    const int thread = machine.current->thread, by = writer;
    if (by == kNobody || by == thread || write_epoch < machine.epoch) return true;
    if (by < machine.threads && machine.current->knows(by, write_clock)) return true;
    const uint32_t at_warp = write_warp_epoch;
    return by / 32 == thread / 32 && at_warp < machine.warp().epoch;
  }

  bool read() {
    const bool fine = after_write();
    const int thread = machine.current->thread;
    if (read_epoch != machine.epoch || reader_warp == kNobody) {
      reader_warp = thread / 32;
      reader = thread;
    } else if (reader_warp != thread / 32) {
      reader_warp = kSeveralWarps;
      reader = kNobody;
    } else if (reader != thread) {
      reader = kNobody;
    }
    read_clock = machine.current->clock[static_cast<size_t>(thread)];
    read_epoch = machine.epoch;
    read_warp_epoch = machine.warp().epoch;
    return fine;
  }

  bool write() {
    const int thread = machine.current->thread;
    bool fine = after_write();
    const bool knows_reader = reader != kNobody && machine.current->knows(reader, read_clock);
    if (reader_warp != kNobody && read_epoch == machine.epoch && reader != thread && !knows_reader)
      fine &= reader_warp == thread / 32 && read_warp_epoch < machine.warp().epoch;
    written_by(thread, machine.current->clock[static_cast<size_t>(thread)]);
    return fine;
  }

  void written_by(int thread, uint32_t clock) {
    writer = thread;
    write_clock = clock;
    write_epoch = machine.epoch;
    write_warp_epoch = machine.warps[static_cast<size_t>(thread / 32)].epoch;
    reader_warp = reader = kNobody;
  }
};

// Who reads through the asynchronous proxy: what all threads knew that asked for it, and when they fenced at the
// latest.
struct ProxyReader {
  uint64_t fence = ~uint64_t{0};
  std::vector<uint32_t> clock;

  void asked_by(const Fiber& fiber) {
    fence = std::min(fence, fiber.proxy_fence);
    if (clock.empty()) clock = fiber.clock;
    for (size_t i = 0; i < clock.size(); ++i) clock[i] = std::min(clock[i], fiber.clock[i]);
  }
};

class SharedMemory {
 public:
  uint32_t base = 0;  // the address of the first byte

  void begin_launch() { earlier_blocks_.clear(); }
  void reset(size_t bytes) {
    // As aligned as hardware promises, and not more.
    base = 128 * static_cast<uint32_t>(1 + machine.random() % 8);
    if (kJudged) earlier_blocks_.push_back(std::move(bytes_));  // the same bytes again would be a race between blocks
    bytes_.assign(bytes, 0xFF);                                 // NaN in every format
    words_.assign(bytes / 4, Word{});
  }

  bool inside(uint32_t address, uint32_t bytes, Site site) {
    if (address % bytes) machine.fault(kAlignment, "misaligned shared address", site);
    if (address >= base && address - base + bytes <= bytes_.size()) return address % bytes == 0;
    machine.fault(kSharedBounds, "shared memory out of bounds", site);
    return false;
  }

  __attribute__((noinline)) void read(uint32_t address, void* out, uint32_t bytes, Site site) {
    memset(out, 0xFF, bytes);
    if (!inside(address, bytes, site)) return;
    for (uint32_t i = 0; i < bytes; i += 4) {
      Word& word = words_[(address - base + i) / 4];
      if (word.flight != History::kNobody) machine.fault(kInFlight, "read of a copy in flight", site);
      if (word.history.writer == History::kNobody)
        machine.fault(kUninitialised, "read of shared memory never written", site);
      if (!word.history.read()) machine.fault(kSharedRace, "shared read races with a write", site);
    }
    happens_before.read(&bytes_[address - base], bytes, __builtin_return_address(0));
    memcpy(out, &bytes_[address - base], bytes);
  }

  __attribute__((noinline)) void write(uint32_t address, const void* data, uint32_t bytes, Site site) {
    if (!inside(address, bytes, site)) return;
    claim(address, bytes, site);
    happens_before.write(&bytes_[address - base], bytes, __builtin_return_address(0));
    memcpy(&bytes_[address - base], data, bytes);
  }

  uint32_t add(uint32_t address, uint32_t value, Site site) {
    if (!inside(address, 4, site)) return 0;
    Word& word = words_[(address - base) / 4];
    if (word.flight != History::kNobody) machine.fault(kInFlight, "atomic on a copy in flight", site);
    if (word.history.writer == History::kNobody)
      machine.fault(kUninitialised, "atomic on shared memory never written", site);
    if (!word.history.atomic()) machine.fault(kSharedRace, "shared atomic races with another access", site);
    happens_before.atomic(&bytes_[address - base]);
    uint32_t before;
    memcpy(&before, &bytes_[address - base], 4);
    const uint32_t after = before + value;
    memcpy(&bytes_[address - base], &after, 4);
    return before;
  }

  // A copy to these 16 bytes begins: until it is waited for nobody may touch them, and what they hold is NaN.
  void begin_copy(uint32_t address, Site site) {
    if (!inside(address, 16, site)) return;
    claim(address, 16, site);
    for (uint32_t i = 0; i < 16; i += 4) words_[(address - base + i) / 4].flight = machine.current->thread;
    memset(&bytes_[address - base], 0xFF, 16);
  }

  void land(uint32_t address, const void* data) {
    if (address >= base && address - base + 16 <= bytes_.size()) memcpy(&bytes_[address - base], data, 16);
  }

  // From here on it counts as a write of that thread, at that time by its own clock.
  void end_copy(uint32_t address, int thread, uint32_t clock) {
    if (address < base || address - base + 16 > bytes_.size()) return;
    for (uint32_t i = 0; i < 16; i += 4) {
      Word& word = words_[(address - base + i) / 4];
      word.flight = History::kNobody;
      word.history.written_by(thread, clock);
      word.written_at = ++machine.now;
    }
  }

  // Where the bytes are, for ThreadSanitizer; null outside.
  void* bytes_at(uint32_t address, uint32_t bytes) {
    return address >= base && address - base + bytes <= bytes_.size() ? &bytes_[address - base] : nullptr;
  }

  // 16 bytes as the asynchronous proxy sees them: NaN where neither the reader nor who wrote them has fenced since.
  void read_by_proxy(uint32_t address, void* out, const ProxyReader& reader, Site site) {
    memset(out, 0xFF, 16);
    if (!inside(address, 16, site)) return;
    memcpy(out, &bytes_[address - base], 16);
    for (uint32_t i = 0; i < 16; i += 4) {
      const Word& word = words_[(address - base + i) / 4];
      const int writer = word.history.writer;
      if (word.flight != History::kNobody) machine.fault(kInFlight, "asynchronous read of a copy in flight", site);
      if (writer < 0 || writer >= machine.threads) {
        machine.fault(kUninitialised, "asynchronous read of shared memory never written", site);
        continue;
      }
      const size_t by = static_cast<size_t>(writer);
      if (word.history.write_epoch == machine.epoch && reader.clock[by] < word.history.write_clock)
        machine.fault(kSharedRace, "asynchronous read races with a write", site);
      if (reader.fence > word.written_at || machine.fibers[by].proxy_fence > word.written_at) continue;
      machine.fault(kProxy, "no proxy fence between a write and an asynchronous read", site);
      memset(static_cast<char*>(out) + i, 0xFF, 4);
    }
  }

  // Product number `number` of a warpgroup may read these 16 bytes until all its warps have waited for it.
  void mark_operand(uint32_t address, int group, uint32_t number) {
    if (address < base || address - base + 16 > bytes_.size()) return;
    for (uint32_t i = 0; i < 16; i += 4) words_[(address - base + i) / 4].product[group] = number;
  }
  // A bulk copy begins to read these bytes, or has done so.
  void count_reader(uint32_t address, uint32_t bytes, int change) {
    for (uint32_t i = 0; i < bytes; i += 4)
      if (address >= base && address - base + i < bytes_.size())
        words_[(address - base + i) / 4].bulk_readers += change;
  }

 private:
  static constexpr int kGroups = 4;  // warpgroups of a block
  struct Word {
    History history;
    int flight = History::kNobody;
    uint64_t written_at = 0;         // by machine.now
    uint32_t product[kGroups] = {};  // the last that reads it, by warpgroup
    int bulk_readers = 0;
  };

  // Whether the current thread knows of every warp that it is done with the products that read this word.
  static bool after_products(const Word& word) {
    for (int group = 0; group < kGroups; ++group)
      for (int warp = 4 * group; word.product[group] && warp < 4 * group + 4; ++warp)
        if (!machine.current->knows(machine.threads + warp, word.product[group])) return false;
    return true;
  }

  void claim(uint32_t address, uint32_t bytes, Site site) {
    for (uint32_t i = 0; i < bytes; i += 4) {
      Word& word = words_[(address - base + i) / 4];
      if (word.flight != History::kNobody) machine.fault(kInFlight, "write to a copy in flight", site);
      if (!word.history.write()) machine.fault(kSharedRace, "shared write races with another access", site);
      if (!after_products(word)) machine.fault(kSharedRace, "shared write races with a product that reads it", site);
      if (word.bulk_readers) machine.fault(kSharedRace, "shared write races with a bulk copy that reads it", site);
      word.written_at = ++machine.now;
    }
  }

  std::vector<unsigned char> bytes_;
  std::vector<std::vector<unsigned char>> earlier_blocks_;  // of this launch
  std::vector<Word> words_;
};

inline SharedMemory shared;

class GlobalMemory {
 public:
  void clear() { regions_.clear(); }
  void add(const void* data, size_t bytes, bool writable) {
    if (!data || !bytes) return;
    Region region{reinterpret_cast<uintptr_t>(data), bytes, writable, {}};
    if (writable) region.places.resize(bytes);
    regions_.push_back(std::move(region));
  }
  // A launch begins: what earlier ones did is done.
  void begin_launch() {
    for (Region& region : regions_)
      for (Place& place : region.places) place = Place{};
  }

  bool read(const void* pointer, uint32_t bytes, Site site) {
    Region* region = find(pointer, bytes, site);
    if (region && region->writable) touch(*region, pointer, bytes, false, site);
    return region;
  }
  bool write(void* pointer, uint32_t bytes, Site site) {
    Region* region = find(pointer, bytes, site);
    if (region && !region->writable) machine.fault(kGlobalBounds, "write to an input", site);
    if (!region || !region->writable) return false;
    touch(*region, pointer, bytes, true, site);
    return true;
  }

 private:
  struct Place {
    int block = History::kNobody, reader_block = History::kNobody;
    History history;
  };
  struct Region {
    uintptr_t begin;
    size_t bytes;
    bool writable;
    std::vector<Place> places;
  };

  Region* find(const void* pointer, uint32_t bytes, Site site) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(pointer);
    if (at % bytes) {
      machine.fault(kAlignment, "misaligned global address", site);
      return nullptr;
    }
    for (Region& region : regions_)
      if (at >= region.begin && at + bytes <= region.begin + region.bytes) return &region;
    machine.fault(kGlobalBounds, "global memory out of bounds", site);
    return nullptr;
  }

  void touch(Region& region, const void* pointer, uint32_t bytes, bool write, Site site) {
    const size_t first = reinterpret_cast<uintptr_t>(pointer) - region.begin;
    for (size_t i = first; i < first + bytes; ++i) {
      Place& place = region.places[i];
      bool fine = place.block == History::kNobody || place.block == machine.block;
      if (write) fine &= place.reader_block == History::kNobody || place.reader_block == machine.block;
      if (place.block != machine.block && place.reader_block != machine.block) place.history = History{};
      fine &= write ? place.history.write() : place.history.read();
      (write ? place.block : place.reader_block) = machine.block;
      if (!fine) machine.fault(kGlobalRace, write ? "global write races" : "global read races with a write", site);
    }
  }

  std::vector<Region> regions_;
};

inline GlobalMemory global;

}  // namespace simt
