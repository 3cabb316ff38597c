// From logits to tokens, without a sort and without the host: filters are cuts, the draw is the race of rng.h.
#pragma once

#include "cuda/sampling_row.cuh"

namespace fastattn {
namespace {

struct SampleParams : RowParams {
  RowNumber<double> temperature, top_p, min_p;
  RowNumber<int64_t> top_k, seeds, positions;
  int64_t* tokens;    // (batch,)
  uint8_t* kept;      // (batch, vocab); null = tokens are wanted
  int32_t is_edited;  // what is wrong with a row, is wrong with it after edits
};

struct DrawState : CutSearch {
  enum Stage : int32_t { kSummarize, kSearch, kWeigh, kRace, kMark, kDone };

  int32_t nucleus;  // a search for top_p, not for top_k
  Stage stage;
};

template <class T>
class RowSampler : public RowSteps<T, SampleParams, DrawState, RowSampler<T>> {
  using Steps = RowSteps<T, SampleParams, DrawState, RowSampler<T>>;
  using Steps::gather, Steps::scan, Steps::findings, Steps::is_writer, Steps::mass, Steps::row_, Steps::p_;
  using Steps::kLaneTokens;

 public:
  FASTATTN_DEVICE explicit RowSampler(const SampleParams& p) : RowSampler(p, p.temperature.of(block_index_x())) {}

  FASTATTN_DEVICE void work(const DrawState& s) const {
    switch (s.stage) {
      case DrawState::kSummarize: this->summarize(); break;
      case DrawState::kSearch: this->weigh_buckets(s); break;
      case DrawState::kWeigh: weigh(s); break;
      case DrawState::kRace: race(s); break;
      case DrawState::kMark: mark(s); break;
      default: break;
    }
  }

  FASTATTN_DEVICE void conclude(DrawState* s) const {
    switch (s->stage) {
      case DrawState::kSummarize: begin(s); break;
      case DrawState::kSearch:
        if (this->narrow(s)) follow_cut(s);
        break;
      case DrawState::kWeigh: {
        uint64_t total[1] = {};
        gather(total, Sums<1>{});
        s->nucleus = 1;
        start_search(s, prefix_mass(p_.top_p.of(row_), total[0]), true);
        break;
      }
      case DrawState::kRace: {
        uint64_t best[2] = {};
        gather(best, Better{});
        finish(s, kIdMask - static_cast<int64_t>(best[1]));
        break;
      }
      default: s->stage = DrawState::kDone;
    }
  }

 private:
  FASTATTN_DEVICE RowSampler(const SampleParams& p, double temperature)
      : Steps(p, temperature), temperature_(temperature) {}

  // ---------------------------------------------------------------- readings
  FASTATTN_DEVICE void weigh(const DrawState& s) const {
    uint64_t total[1] = {};
    scan([&](int id, const float (&x)[kLaneTokens]) {
#pragma unroll
      for (int i = 0; i < kLaneTokens; ++i)
        if (rank_of(x[i], id + 32 * i) >= s.cut) total[0] += mass(x[i], s.max);
    });
    reduce_block(total, Sums<1>{}, findings());
  }

  FASTATTN_DEVICE double log_odds(float x, float max) const {
    return (static_cast<double>(x) - static_cast<double>(max)) / temperature_;
  }

  struct Better {  // a score that sorts as an integer, and the complement of the id
    FASTATTN_DEVICE void operator()(uint64_t (&mine)[2], const uint64_t (&other)[2]) const {
      if (other[0] < mine[0] || (other[0] == mine[0] && other[1] <= mine[1])) return;
      mine[0] = other[0];
      mine[1] = other[1];
    }
  };

  FASTATTN_DEVICE static uint64_t sort_key64(double x) {
    const auto bits = bits_as<uint64_t>(x);
    return bits ^ (static_cast<uint64_t>(static_cast<int64_t>(bits) >> 63) | uint64_t{1} << 63);
  }

  // A bound from above of the noise of a group whose least clock has this word, in floats: an exponential -log(1 - v)
  // is at least v + v^2 / 2.
  FASTATTN_DEVICE static float most_noise(uint32_t word) {
    const float v = static_cast<float>(~word >> 1) * 0x1p-31f;
    return -static_cast<float>(0.6931471805599453) * log2_approx(fused_multiply_add(v * v, 0.5f, v) / kNoiseGroup);
  }

  // Groups, and then tokens, are ruled out by bounds in floats, which may round as they like: they never decide.
  FASTATTN_DEVICE void race(const DrawState& s) const {
    const NoiseStream noise(static_cast<uint64_t>(p_.seeds.of(row_)), static_cast<uint64_t>(p_.positions.of(row_)));
    const double log_min_p = least_log_odds();
    uint64_t best[2] = {};
    float to_beat = kMinusInfinity;
    const auto run = [&](float x, int id, const PhiloxBlock& group) {
      const auto token = static_cast<uint32_t>(id);
      double clock = exponential(group.word[0], group.word[1]) / kNoiseGroup;
      if (!has_least_clock(token, group.word[2])) {
        const PhiloxBlock own = noise.block(token, kTokenDomain);
        clock += exponential(own.word[0], own.word[1]);
      }
      const double score = log_odds(x, s.max) - logarithm(clock);
      const uint64_t one[2] = {sort_key64(score), kIdMask - token};
      Better{}(best, one);
      to_beat = maximum(to_beat, static_cast<float>(score) - 0x1p-8f);  // more than the bounds' rounding
    };
    run(s.max, s.best, noise.block(noise_group(static_cast<uint32_t>(s.best)), kGroupDomain));

    // Halves: the difference of two finite floats may overflow, that of their halves does not.
    const double twice = 2.0 / temperature_;
    // Odds are negative: what is added to the scale's error covers all roundings.
    const float scale = twice < -static_cast<double>(kLowest) ? static_cast<float>(twice * (1.0 - 0x1p-20)) : -kLowest;
    const auto bound = [&](float x) { return (x * 0.5f - s.max * 0.5f) * scale; };
    scan([&](int id, const float (&x)[kLaneTokens]) {
      float top = x[0];
#pragma unroll
      for (int i = 1; i < kLaneTokens; ++i) top = maximum(top, x[i]);
      if (rank_of(top, 0) >= s.cut) {
        const PhiloxBlock group = noise.block(noise_group(static_cast<uint32_t>(id)), kGroupDomain);
        const float most = most_noise(group.word[0]);
        if (bound(top) + most >= to_beat) {
#pragma unroll 1
          for (int i = 0; i < kLaneTokens; ++i) {
            const float logit = select_of(x, i);
            if (rank_of(logit, id + 32 * i) < s.cut || log_odds(logit, s.max) < log_min_p) continue;
            if (bound(logit) + most >= to_beat) run(logit, id + 32 * i, group);
          }
        }
      }
#pragma unroll
      for (int mask = 16; mask > 0; mask /= 2) to_beat = maximum(to_beat, shuffle_xor(to_beat, mask));
    });
    reduce_block(best, Better{}, findings());
  }

  // x[i] without an address: an array that is indexed by a variable would lie in memory.
  FASTATTN_DEVICE static float select_of(const float (&x)[kLaneTokens], int i) {
    float one = x[0];
#pragma unroll
    for (int j = 1; j < kLaneTokens; ++j) one = i == j ? x[j] : one;
    return one;
  }

  FASTATTN_DEVICE void mark(const DrawState& s) const {
    const double log_min_p = least_log_odds();
    uint8_t* kept = p_.kept + int64_t{row_} * p_.vocab;
    scan([&](int id, const float (&x)[kLaneTokens]) {
#pragma unroll
      for (int i = 0; i < kLaneTokens; ++i)
        if (id + 32 * i < p_.vocab) {  // a greedy row's odds are NaN
          const bool keeps = rank_of(x[i], id + 32 * i) >= s.cut && !(log_odds(x[i], s.max) < log_min_p);
          store_global(kept + id + 32 * i, static_cast<uint8_t>(keeps));
        }
    });
  }

  FASTATTN_DEVICE double least_log_odds() const {
    const double min_p = p_.min_p.of(row_);
    return min_p > 0.0 ? logarithm(min_p) : -__builtin_inf();
  }

  // ---------------------------------------------------------------- conclusions
  FASTATTN_DEVICE void finish(DrawState* s, int64_t token) const {
    s->stage = DrawState::kDone;
    if (is_writer()) store_global(p_.tokens + row_, token);
  }

  FASTATTN_DEVICE void begin(DrawState* s) const {
    uint64_t found[4] = {};
    gather(found, typename Steps::Summary{});
    const int64_t top_k = p_.top_k.of(row_), finite = static_cast<int64_t>(found[2]);
    if (const int64_t problem = Steps::problem_of(found)) {
      s->cut = ~uint64_t{0};
      s->stage = DrawState::kMark;
      if (!p_.kept) finish(s, -problem - (p_.is_edited ? kEditedHasNaN - kHasNaN : 0));
      return;
    }
    s->max = logit_of(found[0]);
    s->best = id_of(found[0]);
    if (temperature_ == 0.0 || top_k == 1 || p_.top_p.of(row_) == 0.0) {
      s->cut = found[0];
      s->stage = DrawState::kMark;
      if (!p_.kept) finish(s, s->best);
      return;
    }
    s->cut = static_cast<uint64_t>(~static_cast<uint32_t>(found[1])) << kIdBits;
    if (top_k > 0 && top_k < finite)
      start_search(s, static_cast<uint64_t>(top_k), false);
    else
      filter_nucleus(s);
  }

  FASTATTN_DEVICE void start_search(DrawState* s, uint64_t target, bool by_mass) const {
    s->stage = DrawState::kSearch;
    if (this->search(s, target, by_mass)) follow_cut(s);
  }

  FASTATTN_DEVICE void follow_cut(DrawState* s) const {
    if (s->nucleus)
      s->stage = draw();
    else
      filter_nucleus(s);
  }

  FASTATTN_DEVICE void filter_nucleus(DrawState* s) const {
    s->stage = p_.top_p.of(row_) < 1.0 ? DrawState::kWeigh : draw();
  }
  FASTATTN_DEVICE DrawState::Stage draw() const { return p_.kept ? DrawState::kMark : DrawState::kRace; }

  const double temperature_;
};

template <class T>
FASTATTN_KERNEL(kSampleThreads, 3)
sample_rows(FASTATTN_GRID_CONSTANT SampleParams p) {
  run_steps<RowSampler<T>>(p);
}

}  // namespace
}  // namespace fastattn
