// Log-probabilities of the drawn and of the most likely tokens, under the softmax of the row as it came.
#pragma once

#include "cpu/sampling_edits.h"
#include "cpu/sampling_top_k.h"
#include "cpu/vec_math.h"

namespace fastattn {
namespace {

// log(sum(exp(x - max))), float terms summed in double chunk by chunk.
template <class Vec, class T>
double log_sum_exp(const Row<Vec, T>& row, float max) {
  const Vec top = Vec::set1(max), log2e = Vec::set1(static_cast<float>(kLog2e));
  double total = 0.0;
  const float weightless = max - 89.0f;  // below it exp is less than 2^-127
  row.visit_chunks(weightless, -kMinusInfinity, [&](int64_t c, int32_t) {
    Vec sum[2] = {Vec::zero(), Vec::zero()};
#pragma GCC unroll 2
    for (int i = 0; i < Row<Vec, T>::kChunkVecs; ++i) sum[i % 2] = sum[i % 2] + exp2((row.load(c, i) - top) * log2e);
    float lanes[Vec::kLanes];
    (sum[0] + sum[1]).store(lanes);
    for (float lane : lanes) total += static_cast<double>(lane);
  });
  return __builtin_log(total);
}

// The n best tokens of the row in the total order; what is not finite last, by id.
template <class Vec, class T>
void find_best(const Row<Vec, T>& row, float max, int64_t n, Candidates* c, int64_t* ids, float* logits) {
  cut_top_k(row, max, n, c);
  const int32_t* best = c->ids;
  if (c->n > kSmallList) {  // not in order yet
    auto* keys = reinterpret_cast<uint32_t*>(c->work);
    auto* sorted = reinterpret_cast<int32_t*>(c->values);  // and the list's ids behind them, as working memory
    for (int64_t i = 0; i < c->n; ++i) keys[i] = ~sort_key(c->values[i]);
    memcpy(sorted, c->ids, static_cast<size_t>(c->n) * sizeof *sorted);
    sort_pairs(keys, sorted, c->n, 32);
    best = sorted;
  }
  for (int64_t i = 0; i < c->n; ++i) {
    ids[i] = best[i];
    logits[i] = row.at(best[i]);
  }
  for (int64_t id = 0, filled = c->n; filled < n; ++id)
    if (row.at(id) == kMinusInfinity) {
      ids[filled] = id;
      logits[filled++] = kMinusInfinity;
    }
}

// For row `index`, of which `token` was drawn. `row` is the one without edits.
template <class Vec, class T>
void write_logprobs(const SamplingParams& p, int64_t index, const Row<Vec, T>& row, int64_t token, Candidates* c) {
  const float max = row.maximum();
  const double norm = static_cast<double>(max) + log_sum_exp(row, max);
  p.logprobs[index] = static_cast<float>(static_cast<double>(row.at(token)) - norm);
  int64_t* ids = p.best_ids + index * p.best;
  float* logprobs = p.best_logprobs + index * p.best;
  find_best(row, max, p.best, c, ids, logprobs);
  for (int64_t i = 0; i < p.best; ++i) logprobs[i] = static_cast<float>(static_cast<double>(logprobs[i]) - norm);
}

}  // namespace
}  // namespace fastattn
