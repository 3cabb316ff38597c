// The noise of sampling and of dropout: Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as
// 1, 2, 3", SC 2011), a bijection of a 128-bit counter under a 64-bit key. No state: any backend finds any token's
// noise directly.
//
//   key        = (seed low, seed high)                                   id = the token's vocabulary id
//   group      = the block of (id / 256 * 4 + id % 4, position low, position high, kGroupDomain)
//   own        = the block of (id, position low, position high, kTokenDomain)
//   uniform(b) = (first 52 bits of b + 1/2) / 2^52, the first word on top    exact in double, never 0 or 1
//   clock      = -log(uniform(group)) / 64   - log(uniform(own)) unless id / 4 % 64 = word 2 of group % 64
//   Gumbel     = -log(clock), in [-3.7, 40.9]
//
// Clocks are independent exponentials: the least of 64 has 64 times the rate, is any of them with equal chances, and
// the others, which have no memory, start anew from it. So where even the least clock of a group cannot win, its
// tokens' own noise need not be looked at: the top-down construction of Maddison, Tarlow, Minka, "A* sampling", NeurIPS
// 2014.
//
// The drawn token is the argmax of (logit - max) / temperature + Gumbel, in double, over the kept tokens; the lower id
// wins between equal scores. That is all a GPU kernel has to reproduce.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FASTATTN_HOST_DEVICE __host__ __device__
#else
#define FASTATTN_HOST_DEVICE
#endif

namespace fastattn {
namespace {

constexpr uint32_t kPhiloxMul0 = 0xD2511F53u, kPhiloxMul1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxBump0 = 0x9E3779B9u, kPhiloxBump1 = 0xBB67AE85u;
constexpr uint32_t kGroupDomain = 0x73616d70u;  // "samp": other users of Philox take another last counter word
constexpr uint32_t kTokenDomain = 0x746f6b6eu;  // "tokn"

// A group is every fourth of 256 neighbours: its largest logit comes out of vectors of any length without a shuffle.
constexpr int kNoiseGroup = 64, kNoiseBlock = 256, kNoiseGroups = kNoiseBlock / kNoiseGroup;

FASTATTN_HOST_DEVICE inline uint32_t noise_group(uint32_t id) {
  return id / kNoiseBlock * kNoiseGroups + id % kNoiseGroups;
}

// Whether the token has the least clock of its group, whose block has this word 2.
FASTATTN_HOST_DEVICE inline bool has_least_clock(uint32_t id, uint32_t word) {
  return ((id / kNoiseGroups) ^ word) % kNoiseGroup == 0;
}

struct PhiloxKey {
  uint32_t low, high;
};

struct PhiloxBlock {
  uint32_t word[4];
};

FASTATTN_HOST_DEVICE inline PhiloxBlock philox4x32_10(PhiloxBlock c, PhiloxKey key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{kPhiloxMul0} * c.word[0], b = uint64_t{kPhiloxMul1} * c.word[2];
    c = {{static_cast<uint32_t>(b >> 32) ^ c.word[1] ^ key.low, static_cast<uint32_t>(b),
          static_cast<uint32_t>(a >> 32) ^ c.word[3] ^ key.high, static_cast<uint32_t>(a)}};
    key = {key.low + kPhiloxBump0, key.high + kPhiloxBump1};
  }
  return c;
}

// Where one row's noise comes from.
struct NoiseStream {
  PhiloxKey key;
  uint32_t position_low, position_high;

  FASTATTN_HOST_DEVICE NoiseStream(uint64_t seed, uint64_t position)
      : key{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)},
        position_low(static_cast<uint32_t>(position)),
        position_high(static_cast<uint32_t>(position >> 32)) {}

  FASTATTN_HOST_DEVICE PhiloxBlock block(uint32_t number, uint32_t domain) const {
    return philox4x32_10({{number, position_low, position_high, domain}}, key);
  }
};

// -log of the uniform that the first two words of a block make: an exponential.
FASTATTN_HOST_DEVICE inline double exponential(uint32_t word0, uint32_t word1) {
  const auto bits = static_cast<double>(uint64_t{word0} << 20 | word1 >> 12);
  return -__builtin_log((bits + 0.5) * 0x1p-52);
}

// One token's clock by itself.
inline double clock_of(const NoiseStream& stream, uint32_t id) {
  const PhiloxBlock group = stream.block(noise_group(id), kGroupDomain);
  const double least = exponential(group.word[0], group.word[1]) / kNoiseGroup;
  if (has_least_clock(id, group.word[2])) return least;
  const PhiloxBlock own = stream.block(id, kTokenDomain);
  return least + exponential(own.word[0], own.word[1]);
}

// Other streams of a seed, which have nothing to do with its own: SplitMix64 (Steele, Lea, Flood, "Fast splittable
// pseudorandom number generators", OOPSLA 2014) before and after the name comes in.
inline uint64_t mix64(uint64_t x) {
  x += 0x9E3779B97F4A7C15u;
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
  x = (x ^ x >> 27) * 0x94D049BB133111EBu;
  return x ^ x >> 31;
}

inline uint64_t stream_seed(uint64_t seed, uint64_t name) { return mix64(mix64(seed) ^ name); }

#ifndef __CUDACC__
// kLanes / 2 blocks side by side. A word is in the low half of its 64-bit lane; the high halves hold leftovers, which
// the products of low halves never see.
template <class Vec>
class PhiloxLanes {
 public:
  using U64 = typename Vec::U64;

  explicit PhiloxLanes(PhiloxKey key) {
    for (int round = 0; round < 10; ++round) {
      key_low_[round] = U64{} + key.low;
      key_high_[round] = U64{} + key.high;
      key = {key.low + kPhiloxBump0, key.high + kPhiloxBump1};
    }
  }

  // From counters, word by word, to the blocks' words. Several sets at a time keep the multipliers busy: a set alone is
  // one long chain.
  template <int kSets>
  inline __attribute__((always_inline)) void generate(U64 (&word)[kSets][4]) const {
    const U64 mul0 = U64{} + kPhiloxMul0, mul1 = U64{} + kPhiloxMul1;
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round)
#pragma GCC unroll 4
      for (auto& w : word) {
        const U64 a = Vec::mul_low32(w[0], mul0), b = Vec::mul_low32(w[2], mul1);
        w[0] = (b >> 32) ^ w[1] ^ key_low_[round];
        w[1] = b;
        w[2] = (a >> 32) ^ w[3] ^ key_high_[round];
        w[3] = a;
      }
  }

 private:
  U64 key_low_[10], key_high_[10];
};

// The lanes of one row's noise.
template <class Vec>
class NoiseLanes {
 public:
  using U64 = typename Vec::U64;

  explicit NoiseLanes(const NoiseStream& stream)
      : lanes_(stream.key), position_low_(U64{} + stream.position_low), position_high_(U64{} + stream.position_high) {}

  // From word[set][0] = block numbers, one per lane, to the words of those blocks.
  template <int kSets>
  inline __attribute__((always_inline)) void generate(U64 (&word)[kSets][4], uint32_t domain) const {
    for (auto& w : word) {
      w[1] = position_low_;
      w[2] = position_high_;
      w[3] = U64{} + domain;
    }
    lanes_.generate(word);
  }

 private:
  PhiloxLanes<Vec> lanes_;
  U64 position_low_, position_high_;
};
#endif

// Dropout: element (i, j) of a head is dropped iff its word is below p * 2^32. Tiles and threads do not come in.
//
//   key     = words 0 and 1 of Philox(key = seed, counter = (offset low, offset high, 0, kDropoutDomain))
//   counter = (j / 4, i, batch * nheads + head, kDropoutDomain)
//   word    = output word number j % 4
constexpr uint32_t kDropoutDomain = 0x64726f70u;  // "drop"

FASTATTN_HOST_DEVICE inline PhiloxKey dropout_key(uint64_t seed, uint64_t offset) {
  const PhiloxBlock counter = {{static_cast<uint32_t>(offset), static_cast<uint32_t>(offset >> 32), 0, kDropoutDomain}};
  const PhiloxBlock block = philox4x32_10(counter, {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)});
  return {block.word[0], block.word[1]};
}

}  // namespace
}  // namespace fastattn
