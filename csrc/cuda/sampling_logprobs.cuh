// Log-probabilities of the drawn and of the most likely tokens, under the softmax of the rows as they came. The n best
// are a cut by counts; who is ahead of how many of the others says where in the list a token stands.
#pragma once

#include "cuda/sampling_row.cuh"

namespace fastattn {
namespace {

constexpr double kMassUnit = 1.0 / (int64_t{1} << kMassBits);

struct RankParams : RowParams {
  int64_t* tokens;       // (batch,), drawn; of a row without log-probabilities a negative SamplingError
  uint64_t* ranks;       // (batch, n): working memory
  float* logprobs;       // (batch,)
  int64_t* best_ids;     // (batch, n)
  float* best_logprobs;  // (batch, n)
  int n;
};

struct RankState : CutSearch {
  enum Stage : int32_t { kSummarize, kSearch, kTally, kCollect, kPlace, kDone };

  uint64_t mass;  // of the row
  Stage stage;
};

template <class T>
class RowRanker : public RowSteps<T, RankParams, RankState, RowRanker<T>> {
  using Steps = RowSteps<T, RankParams, RankState, RowRanker<T>>;
  using Steps::gather, Steps::scan, Steps::is_writer, Steps::mass, Steps::row_, Steps::block_, Steps::p_;
  using Steps::kLaneTokens;

 public:
  FASTATTN_DEVICE explicit RowRanker(const RankParams& p) : Steps(p, 1.0) {}

  FASTATTN_DEVICE void work(const RankState& s) const {
    switch (s.stage) {
      case RankState::kSummarize: this->summarize(); break;
      case RankState::kSearch: this->weigh_buckets(s); break;
      case RankState::kTally: tally(s); break;
      case RankState::kCollect: collect(s); break;
      case RankState::kPlace: place(s); break;
      default: break;
    }
  }

  FASTATTN_DEVICE void conclude(RankState* s) const {
    switch (s->stage) {
      case RankState::kSummarize: begin(s); break;
      case RankState::kSearch:
        if (this->narrow(s)) s->stage = RankState::kTally;
        break;
      case RankState::kTally: {
        uint64_t found[2] = {};
        gather(found, Sums<2>{});
        s->mass = found[0];
        s->stage = RankState::kCollect;
        break;
      }
      case RankState::kCollect: s->stage = RankState::kPlace; break;
      default: s->stage = RankState::kDone;
    }
  }

 private:
  FASTATTN_DEVICE void begin(RankState* s) const {
    uint64_t found[4] = {};
    gather(found, typename Steps::Summary{});
    if (const int64_t problem = Steps::problem_of(found)) {
      s->stage = RankState::kDone;
      refuse(-problem);
      return;
    }
    s->max = logit_of(found[0]);
    s->best = id_of(found[0]);
    s->cut = rank_of(kMinusInfinity, p_.vocab - 1);  // what is not finite comes last
    s->stage = RankState::kSearch;
    if (p_.n == p_.vocab || this->search(s, static_cast<uint64_t>(p_.n), false)) s->stage = RankState::kTally;
  }

  FASTATTN_DEVICE void refuse(int64_t error) const {
    if (block_ > 0) return;
    for (int i = thread_index(); i < p_.n; i += kSampleThreads) put(i, -1, __builtin_nanf(""));
    if (thread_index() > 0) return;
    store_global(p_.logprobs + row_, __builtin_nanf(""));
    if (load_global(p_.tokens + row_) >= 0) store_global(p_.tokens + row_, error);
  }

  FASTATTN_DEVICE void put(int place, int64_t id, float logprob) const {
    store_global(p_.best_ids + int64_t{row_} * p_.n + place, id);
    store_global(p_.best_logprobs + int64_t{row_} * p_.n + place, logprob);
  }

  // The mass of this block's tokens, and how many of them are among the best.
  FASTATTN_DEVICE void tally(const RankState& s) const {
    uint64_t found[2] = {};
    scan([&](int id, const float (&x)[kLaneTokens]) {
#pragma unroll
      for (int i = 0; i < kLaneTokens; ++i) {
        found[0] += mass(x[i], s.max);
        found[1] += rank_of(x[i], id + 32 * i) >= s.cut;
      }
    });
    reduce_block(found, Sums<2>{}, this->findings());
  }

  // The ranks of the best, in any order.
  FASTATTN_DEVICE void collect(const RankState& s) const {
    uint64_t* ranks = p_.ranks + int64_t{row_} * p_.n;
    for (int block = 0; block < block_; ++block) ranks += load_global(this->found_by(block) + 1);
    if (thread_index() == 0) store_shared4(word_at(kCounterAt), 0);
    block_barrier();
    scan([&](int id, const float (&x)[kLaneTokens]) {
#pragma unroll
      for (int i = 0; i < kLaneTokens; ++i) {
        const uint64_t rank = rank_of(x[i], id + 32 * i);
        if (rank >= s.cut) store_global(ranks + add_shared4(word_at(kCounterAt), 1), rank);
      }
    });
  }

  FASTATTN_DEVICE void place(const RankState& s) const {
    const double norm = static_cast<double>(s.max) + logarithm(static_cast<double>(s.mass) * kMassUnit);
    const uint64_t* ranks = p_.ranks + int64_t{row_} * p_.n;
    for (int i = block_ * kSampleThreads + thread_index(); i < p_.n; i += p_.blocks * kSampleThreads) {
      const uint64_t rank = load_global(ranks + i);
      int ahead = 0;
      for (int j = 0; j < p_.n; ++j) ahead += load_global(ranks + j) > rank;
      put(ahead, id_of(rank), static_cast<float>(static_cast<double>(logit_of(rank)) - norm));
    }
    if (!is_writer()) return;
    const int64_t token = load_global(p_.tokens + row_);
    const float logit = token < 0 ? __builtin_nanf("") : to_float(load_global(this->logits_ + token));
    store_global(p_.logprobs + row_, static_cast<float>(static_cast<double>(logit) - norm));
  }
};

template <class T>
FASTATTN_KERNEL(kSampleThreads, 3)
rank_rows(FASTATTN_GRID_CONSTANT RankParams p) {
  run_steps<RowRanker<T>>(p);
}

}  // namespace
}  // namespace fastattn
