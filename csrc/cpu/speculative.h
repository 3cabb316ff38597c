// Exact speculative sampling of a chain (Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318):
// one read of every row for its sum, a coin for each drafted token, and one race, among max(p - q, 0) of the first row
// whose token is refused, or the row after the last.
//
// Sums and weights are double operations in an order that every ISA shares, so tokens are the same on all of them.
#pragma once

#include "cpu/parallel.h"
#include "cpu/sampling.h"

namespace fastattn {
namespace {

// Names of a seed's streams: neither may be the one that `sample` drew the drafted tokens from.
constexpr uint64_t kCoinStream = 0x636F696E, kResamplingStream = 0x72657361;

// The sum of a row of probabilities, element i in chain i % kChains; NaN where it cannot be drawn from.
template <class Vec, class T>
double total_probability(const T* x, int64_t vocab) {
  using F64 = typename Vec::F64;
  constexpr int kChains = 32, kVecs = kChains / Vec::kLanes, kHalf = Vec::kLanes / 2;
  F64 sums[2 * kVecs] = {};
  auto good = Vec::zero() <= Vec::zero();
  int64_t i = 0;
  for (; i + kChains <= vocab; i += kChains)
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      const Vec a = Vec::load(x + i + v * Vec::kLanes);
      good = good & (Vec::zero() <= a);  // a NaN is not
      sums[2 * v] += widen_low(a);
      sums[2 * v + 1] += widen_high(a);
    }
  double chains[kChains];
  for (int h = 0; h < 2 * kVecs; ++h) memcpy(chains + h * kHalf, &sums[h], sizeof sums[h]);
  bool all_good = lane_count(good) == Vec::kLanes;
  for (int c = 0; c < kChains && i < vocab; ++i, ++c) {
    const float a = to_single<Vec>(x + i);
    all_good = all_good && a >= 0.0f;
    chains[c] += static_cast<double>(a);
  }
  for (int width = kChains / 2; width > 0; width /= 2)
    for (int c = 0; c < width; ++c) chains[c] += chains[c + width];
  return all_good && chains[0] > 0.0 && chains[0] < __builtin_inf() ? chains[0] : __builtin_nan("");
}

// log(x) for normal x > 0, within 2e-10 of the truth; anything for others. x = 2^k m with m in [sqrt(1/2), sqrt(2)),
// and log(m) = 2 atanh((m - 1) / (m + 1)) by its series.
template <class Vec>
inline __attribute__((always_inline)) typename Vec::F64 log_of(typename Vec::F64 x) {
  using F64 = typename Vec::F64;
  using U64 = typename Vec::U64;
  constexpr uint64_t kRootHalf = 0x3fe6a09e667f3bcdu, kOneBits = 0x3ff0000000000000u;
  const U64 bits = reinterpret_cast<U64>(x), k = (bits + (kOneBits - kRootHalf)) >> 52;
  const F64 m = reinterpret_cast<F64>(bits - (k << 52) + kOneBits);
  const F64 exponent = reinterpret_cast<F64>(k | 0x4330000000000000u) - (0x1p52 + 1023.0);
  const F64 s = (m - 1.0) / (m + 1.0), s2 = s * s, s4 = s2 * s2;
  const F64 series = (s2 * (1.0 / 3) + 1.0) + s4 * ((s2 * (1.0 / 7) + 1.0 / 5) + s4 * (s2 * (1.0 / 11) + 1.0 / 9));
  return exponent * kLn2 + s * series * 2.0;
}

// The logarithms of max(p - q, 0) as logits, p and q divided by their totals; without q, of p. Returns whether any is
// finite. `logits` has room for whole vectors.
template <class Vec, class T>
bool write_residual(const T* p, double p_total, const T* q, double q_total, int64_t vocab, float* logits) {
  using F64 = typename Vec::F64;
  constexpr int kHalf = Vec::kLanes / 2;
  typedef float Single __attribute__((vector_size(sizeof(F64) / 2)));
  const F64 p_scale = F64{} + 1.0 / p_total, q_scale = F64{} + (q ? 1.0 / q_total : 0.0), zero = {};
  F64 most = {};
  for (int64_t i = 0; i < vocab; i += Vec::kLanes) {
    const int m = static_cast<int>(vocab - i < Vec::kLanes ? vocab - i : Vec::kLanes);
    const Vec a = m == Vec::kLanes ? Vec::load(p + i) : Vec::load_n(p + i, m);
    const Vec b = !q ? Vec::zero() : m == Vec::kLanes ? Vec::load(q + i) : Vec::load_n(q + i, m);
    const F64 left[2] = {widen_low(a) * p_scale - widen_low(b) * q_scale,
                         widen_high(a) * p_scale - widen_high(b) * q_scale};
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      most = Vec::max_f64(most, left[h]);
      const F64 log = left[h] > zero ? log_of<Vec>(left[h]) : zero - __builtin_inf();
      const Single rounded = __builtin_convertvector(log, Single);
      memcpy(logits + i + h * kHalf, &rounded, sizeof rounded);
    }
  }
  for (int i = 0; i < kHalf; ++i)
    if (most[i] > 0.0) return true;
  return false;
}

template <class Vec, class T>
struct Chain {
  const SpeculativeParams& p;
  int64_t index;

  const T* target(int64_t i) const {
    return static_cast<const T*>(p.target) + index * p.target_stride_batch + i * p.target_stride_token;
  }
  const T* draft(int64_t i) const {
    return static_cast<const T*>(p.draft) + index * p.draft_stride_batch + i * p.draft_stride_token;
  }
  const int64_t* drafted() const { return p.drafted + index * p.n; }
  // The drafts' sums come first.
  double* totals() const { return p.totals + index * (2 * p.n + 1); }

  // How many tokens are accepted; -1 if a row, or a token, cannot be.
  int64_t accept() const {
    for (int64_t i = 0; i < 2 * p.n + 1; ++i)
      if (!(totals()[i] > 0.0)) return -1;
    const uint64_t seed = stream_seed(static_cast<uint64_t>(p.seeds[index]), kCoinStream);
    int64_t accepted = p.n;
    for (int64_t i = p.n; i-- > 0;) {
      const int64_t token = drafted()[i];
      if (token < 0 || token >= p.vocab) return -1;
      const double drawn = static_cast<double>(to_single<Vec>(draft(i) + token)) / totals()[i];
      const double wanted = static_cast<double>(to_single<Vec>(target(i) + token)) / totals()[p.n + i];
      if (!(drawn > 0.0)) return -1;
      const double ratio = wanted / drawn, chance = ratio < 1.0 ? ratio : 1.0;
      const NoiseStream noise(seed, static_cast<uint64_t>(p.positions[index]) + static_cast<uint64_t>(i));
      // A race between two tokens, of which the first wins with this chance.
      if (!(clock_of(noise, 0) * (1.0 - chance) <= clock_of(noise, 1) * chance)) accepted = i;
    }
    return accepted;
  }

  int32_t draw(int64_t accepted) const {
    const int64_t lanes = Vec::kLanes;
    const auto room = static_cast<size_t>(p.vocab + lanes) * sizeof(float);
    auto* logits = static_cast<float*>(thread_scratch(ScratchSlot::kShared, room));
    const T *left = target(accepted), *off = accepted < p.n ? draft(accepted) : nullptr;
    const double total = totals()[p.n + accepted];
    if (!write_residual<Vec>(left, total, off, off ? totals()[accepted] : 1.0, p.vocab, logits))
      write_residual<Vec, T>(left, total, nullptr, 1.0, p.vocab, logits);
    RowMemory<Vec> memory(p.vocab, false);
    Row<Vec, float> row(logits, p.vocab, memory.summary);
    row.summarize();
    const float max = row.maximum();
    const NoiseStream noise(stream_seed(static_cast<uint64_t>(p.seeds[index]), kResamplingStream),
                            static_cast<uint64_t>(p.positions[index]) + static_cast<uint64_t>(accepted));
    Race<Vec> race(noise, Softmax<Vec>(max, 1.0), Cut{});
    race.run_row(row, memory.candidates.work);
    return race.winner();
  }
};

template <class Vec>
void speculate(const SpeculativeParams& p) {
  const int64_t rows = 2 * p.n + 1;
  const int nthreads = p.batch * rows * p.vocab < kSerialLogits ? 1 : p.nthreads;
  visit_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    parallel_for(p.batch * rows, nthreads, [&](int64_t item) {
      const int64_t i = item % rows;
      const Chain<Vec, T> chain{p, item / rows};
      chain.totals()[i] = total_probability<Vec>(i < p.n ? chain.draft(i) : chain.target(i - p.n), p.vocab);
    });
    parallel_for(p.batch, nthreads, [&](int64_t index) {
      const Chain<Vec, T> chain{p, index};
      const int64_t accepted = p.accepted[index] = chain.accept();
      if (accepted < 0) return;
      int64_t* tokens = p.tokens + index * (p.n + 1);
      for (int64_t i = 0; i < accepted; ++i) tokens[i] = chain.drafted()[i];
      tokens[accepted] = chain.draw(accepted);
      for (int64_t i = accepted + 1; i <= p.n; ++i) tokens[i] = -1;
    });
  });
}

}  // namespace
}  // namespace fastattn
