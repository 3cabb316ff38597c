// From logits to tokens: one read of the row for its maximum, cuts, and the race among what is left.
#pragma once

#include "cpu/parallel.h"
#include "cpu/sampling_race.h"
#include "cpu/scratch.h"
#include "dispatch.h"

namespace fastattn {
namespace {

constexpr int64_t kSerialLogits = int64_t{1} << 16;  // logits below which waking threads costs more than it saves

template <class Vec, class T>
void mark_kept(const Row<Vec, T>& row, const Cut& cut, bool* kept) {
  float lanes[Vec::kLanes];
  for (int64_t id = 0; id < row.size(); ++id) {
    const int lane = static_cast<int>(id % Vec::kLanes);
    if (lane == 0) Vec::load(row.chunk(id / row.kChunk) + id % row.kChunk).store(lanes);
    kept[id] = cut.keeps(lanes[lane], static_cast<int32_t>(id));
  }
}

// One row, on one thread. Returns the token, or -SamplingError.
template <class Vec, class T>
int64_t sample_row(const SamplingParams& p, int64_t index) {
  using Logits = Row<Vec, T>;
  const double temperature = p.temperature[index], top_p = p.top_p[index], min_p = p.min_p[index];
  const int64_t top_k = p.top_k[index];
  const bool limited = top_k > 0 && top_k < p.vocab, nucleus = top_p < 1.0;

  // A list may hold the whole row, and is written a vector at a time.
  const int64_t maxima = Logits::maxima_of(p.vocab), list = Logits::chunks_of(p.vocab) * Logits::kChunk + Vec::kLanes;
  const int64_t words = maxima + (limited || nucleus ? 3 * list : 0);
  float* memory = static_cast<float*>(thread_scratch(ScratchSlot::kTile, static_cast<size_t>(words) * sizeof(float)));

  Logits row(static_cast<const T*>(p.logits) + index * p.stride_batch, p.vocab, memory);
  if (!row.summarize()) return -kHasNaN;
  const float max = row.maximum();
  if (max == -kMinusInfinity) return -kHasInf;
  if (max == kMinusInfinity) return -kNothingFinite;
  const int32_t best = row.find_maximum(max);
  bool* kept = p.kept ? p.kept + index * p.vocab : nullptr;
  if (temperature == 0.0 || top_k == 1 || top_p == 0.0) {
    if (kept) mark_kept(row, {max, best}, kept);
    return best;
  }

  const Softmax<Vec> softmax(max, temperature);
  Candidates candidates = {memory + maxima, reinterpret_cast<int32_t*>(memory + maxima + list),
                           memory + maxima + 2 * list};
  Cut cut;
  if (limited) {
    cut = cut_top_k(row, max, top_k, &candidates);
    if (nucleus) {
      candidates.keep(cut);
      cut = cut_top_p(candidates, top_p, softmax);
    }
  } else if (nucleus) {
    cut = cut_top_p(row, top_p, softmax, &candidates);
  }
  if (min_p > 0.0) {
    const float least = least_logit(min_p, softmax);
    if (least > cut.value) cut = {least, INT32_MAX};
  }

  if (kept) mark_kept(row, cut, kept);
  Race<Vec> race(NoiseStream(static_cast<uint64_t>(p.seeds[index]), static_cast<uint64_t>(p.positions[index])), softmax,
                 cut, best);
  // A list is cheaper to race unless it holds most of the row: it takes a Philox block a token, the row one for four.
  if ((limited || nucleus) && candidates.n < p.vocab / 3)
    race.run_candidates(candidates);
  else
    race.run_row(row);
  return race.winner();
}

template <class Vec>
void sample(const SamplingParams& p) {
  const bool small = p.batch * p.vocab < kSerialLogits;
  visit_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    parallel_for(p.batch, small ? 1 : p.nthreads, [&](int64_t row) { p.tokens[row] = sample_row<Vec, T>(p, row); });
  });
}

}  // namespace
}  // namespace fastattn
