// From logits to tokens: one read of the row for its maximum, cuts, and the race among what is left.
#pragma once

#include "cpu/parallel.h"
#include "cpu/sampling_logprobs.h"
#include "cpu/sampling_nucleus.h"
#include "cpu/scratch.h"
#include "dispatch.h"

namespace fastattn {
namespace {

constexpr int64_t kSerialLogits = int64_t{1} << 16;  // logits below which waking threads costs more than it saves

template <class Vec, class T>
void mark_kept(const Row<Vec, T>& row, const Cut& cut, bool* kept) {
  memset(kept, 0, static_cast<size_t>(row.size()));
  row.visit_chunks(cut.value, -kMinusInfinity, [&](int64_t c, int32_t first_id) {
    for (int i = 0; i < row.kChunkVecs; ++i, first_id += Vec::kLanes) {
      const Vec x = row.load(c, i);
      uint32_t able = lane_bits(Vec::set1(cut.value) <= x);  // padding is -inf
      if (!able) continue;
      float lanes[Vec::kLanes];
      x.store(lanes);
      for (; able; able &= able - 1) {
        const int lane = __builtin_ctz(able);
        kept[first_id + lane] = cut.keeps(lanes[lane], first_id + lane);
      }
    }
  });
  const EditedTokens& edited = row.edited();
  for (int64_t i = 0; i < edited.n; ++i) kept[edited.ids[i]] = cut.keeps(edited.values[i], edited.ids[i]);
}

// Why a row cannot be drawn from: what is wrong with it as it came, or else with its edits.
template <class Vec, class T>
int64_t error_of(const T* x, int64_t vocab, SamplingError edited) {
  bool inf = false, finite = false;
  for (int64_t i = 0; i < vocab; ++i) {
    const float v = to_single<Vec>(x + i);
    if (v != v) return -kHasNaN;
    inf = inf || v == -kMinusInfinity;
    finite = finite || v - v == 0.0f;
  }
  return inf ? -kHasInf : !finite ? -kNothingFinite : -edited;
}

// The working memory of a row: its summary, and where filters want them, lists that may hold all of it.
template <class Vec>
struct RowMemory {
  float* summary;
  Candidates candidates;

  RowMemory(int64_t vocab, bool lists) {
    // A list is written a vector at a time. Its working copy has room for two, and for a race.
    const int64_t summary_n = Row<Vec, float>::summary_of(vocab), list = lists ? vocab + 2 * Vec::kLanes : 0;
    const int64_t work = 2 * list + Race<Vec>::work_of(vocab);
    const auto words = static_cast<size_t>(summary_n + 2 * list + work);
    summary = static_cast<float*>(thread_scratch(ScratchSlot::kTile, words * sizeof(float)));
    float* values = summary + summary_n;
    candidates = {values, reinterpret_cast<int32_t*>(values + list), values + 2 * list};
  }
};

// What is drawn of a row that has been summarized and has a finite maximum.
template <class Vec, class T>
int32_t draw(const SamplingParams& p, int64_t index, const Row<Vec, T>& row, float max, Candidates* candidates) {
  const double temperature = p.temperature[index], top_p = p.top_p[index], min_p = p.min_p[index];
  const int64_t top_k = p.top_k[index];
  const bool limited = top_k > 0 && top_k < p.vocab, nucleus = top_p < 1.0;
  bool* kept = p.kept ? p.kept + index * p.vocab : nullptr;
  if (temperature == 0.0 || top_k == 1 || top_p == 0.0) {
    const int32_t best = row.find_maximum(max);
    if (kept) mark_kept(row, {max, best}, kept);
    return best;
  }

  const Softmax<Vec> softmax(max, temperature);
  Cut rest;  // what min_p keeps
  if (min_p > 0.0) rest.value = least_logit(min_p, softmax);
  const NoiseStream noise(static_cast<uint64_t>(p.seeds[index]), static_cast<uint64_t>(p.positions[index]));
  const auto start = [&](const Cut& cut) { return Race<Vec>(noise, softmax, rest.value > cut.value ? rest : cut); };
  if (nucleus && !limited && !kept) return draw_nucleus(row, top_p, softmax, candidates, start);

  Cut cut;
  if (limited) {
    cut = cut_top_k(row, max, top_k, candidates);
    if (nucleus) cut = cut_top_p(candidates, top_p, softmax);
  } else if (nucleus) {
    cut = cut_top_p(row, top_p, softmax, candidates);
  }
  if (rest.value > cut.value) cut = rest;
  if (kept) mark_kept(row, cut, kept);
  Race<Vec> race = start(cut);
  const bool few = !limited && !nucleus && min_p > 0.0 &&
                   count_reaching<Vec>(row.maxima(), row.maxima_of(p.vocab), cut.value) < p.vocab / 512;
  if (few) row.gather(cut.value, candidates);
  if (limited || nucleus || few)
    run(row, candidates, &race);
  else
    race.run_row(row, candidates->work);
  return race.winner();
}

template <class Vec, class T>
bool needs_lists(const SamplingParams& p, int64_t index) {
  const int64_t top_k = p.top_k[index];
  return (top_k > 0 && top_k < p.vocab) || p.top_p[index] < 1.0 || p.min_p[index] > 0.0 || p.best > 0;
}

// A row as it came.
struct NoEdits {
  const uint8_t* bits() const { return nullptr; }
  EditedTokens edited() const { return {}; }
  void edit_some() {}
  void edit_rest() {}
};

// One row, on one thread. `x` is the row as it came, `edited` what was made of it, but for the tokens of `edits`.
// Returns the token, or -SamplingError.
template <class Vec, class T, class Edited, class Edits>
int64_t sample_edited(const SamplingParams& p, int64_t index, const T* x, const Edited* edited, Edits&& edits) {
  RowMemory<Vec> memory(p.vocab, needs_lists<Vec, T>(p, index));
  Row<Vec, Edited> row(edited, p.vocab, memory.summary, edits.bits(), edits.edited());
  const bool good = row.summarize([&] { edits.edit_some(); });
  edits.edit_rest();
  if (!row.summarize_edited() || !good) return error_of<Vec>(x, p.vocab, kEditedHasNaN);
  const float max = row.maximum();
  if (max == -kMinusInfinity) return error_of<Vec>(x, p.vocab, kEditedHasInf);
  if (max == kMinusInfinity) return error_of<Vec>(x, p.vocab, kEditedNothingFinite);
  const int32_t token = draw(p, index, row, max, &memory.candidates);
  if (p.best > 0) {
    Row<Vec, T> raw(x, p.vocab, memory.summary);
    if (p.edits) {
      raw.summarize();
      if (raw.maximum() == -kMinusInfinity) return -kHasInf;
    }
    write_logprobs(p, index, raw, token, &memory.candidates);
  }
  return token;
}

template <class Vec, class T>
int64_t sample_row(const SamplingParams& p, int64_t index) {
  const T* x = static_cast<const T*>(p.logits) + index * p.stride_batch;
  if (!p.edits) return sample_edited<Vec>(p, index, x, x, NoEdits{});
  const size_t bytes = EditedRow<Vec, T>::bytes_for(*p.edits, p.vocab);
  EditedRow<Vec, T> row(*p.edits, x, p.vocab, index, thread_scratch(ScratchSlot::kShared, bytes));
  if (const int64_t error = row.prepare()) return error_of<Vec>(x, p.vocab, static_cast<SamplingError>(error));
  if (row.copy()) return sample_edited<Vec>(p, index, x, row.copy(), row);
  return sample_edited<Vec>(p, index, x, x, row);
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
