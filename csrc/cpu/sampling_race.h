// The draw: argmax of log p + Gumbel noise over the kept tokens (the Gumbel-max trick), which needs no normalisation.
//
// A token's score is a double and costs logarithms, but only the winner's score matters. So groups of tokens are ruled
// out by the least clock among their noise (rng.h) and their largest logit, which costs one Philox block for 64 tokens;
// what is left, by each token's own logit, and then by its own clock; and only what is left then is scored. These
// bounds are floats in base 2, and may round as they like: they never decide a draw.
#pragma once

#include "cpu/sampling_filters.h"
#include "cpu/vec_math.h"
#include "rng.h"

namespace fastattn {
namespace {

template <class Vec>
class Race {
 public:
  using U32 = typename Vec::U32;
  using U64 = typename Vec::U64;

  Race(const NoiseStream& stream, const Softmax<Vec>& softmax, const Cut& cut)
      : stream_(stream),
        noise_(stream),
        softmax_(softmax),
        cut_(cut),
        minus_half_max_(-0.5f * softmax.max()),
        least_(cut.value) {
    // Bounds work on halves: the difference of two finite floats may overflow, that of their halves does not.
    const double scale = 2.0 * softmax.log2_scale();
    half_scale_ = scale < __FLT_MAX__ ? static_cast<float>(scale) : __FLT_MAX__;
  }

  // The token that won among those that ran, and its logit.
  int32_t winner() const { return winner_; }
  float winner_logit() const { return winner_logit_; }

  // Floats that run_row works in.
  static int64_t work_of(int64_t vocab) { return 5 * padded_groups_of(vocab); }

  // Everything that the cut keeps of the row. A token with the largest logit comes first, since it makes most others
  // hopeless; then the groups that could score most, so that few have to follow; those do in any order.
  template <class T>
  void run_row(const Row<Vec, T>& row, float* work) {
    constexpr int kLanes = Vec::kLanes;
    const int32_t best = row.find_maximum(softmax_.max());
    run(softmax_.max(), best, clock_of(stream_, static_cast<uint32_t>(best)));
    const int64_t n = padded_groups_of(row.size());
    float *bounds = work, *noise = work + n;
    auto* words = reinterpret_cast<uint32_t*>(work + 2 * n);  // three of each group, kLanes groups at a time
    const Leaders leaders = bound_groups(row, n, bounds, noise, words);
    int32_t numbers[kTogether + kLanes];
    const auto run_together = [&](int m) {
      run_groups(row, numbers, m, noise, words);
      finish();
    };
    const float most = reduce_max(leaders.bound);
    uint32_t first = lane_bits(Vec::set1(most) <= leaders.bound);
    first &= ~(first - 1);
    float starts[kLanes];
    leaders.start.store(starts);
    const auto run_leaders = [&](uint32_t chosen) {
      int m = 0;
      for (; chosen; chosen &= chosen - 1, ++m) {
        const int lane = __builtin_ctz(chosen);
        numbers[m] = static_cast<int32_t>(starts[lane]) + lane;
        bounds[numbers[m]] = kMinusInfinity;
      }
      run_together(m);
    };
    if (most > to_beat_) run_leaders(first);
    run_leaders(lane_bits(Vec::set1(to_beat_) < leaders.bound) & ~first);

    float could_score[kTogether + kLanes];  // not needed
    int m = 0;
    for (int64_t i = 0; i < n; i += kLanes) {
      const Vec bound = Vec::load(bounds + i);
      const auto able = Vec::set1(to_beat_) < bound;
      if (!lane_bits(able)) continue;
      m += Vec::compress(able, bound, static_cast<int32_t>(i), could_score + m, numbers + m);
      if (m < kTogether) continue;
      run_together(kTogether);
      m -= kTogether;
      memcpy(numbers, numbers + kTogether, static_cast<size_t>(m) * sizeof *numbers);
    }
    run_together(m);
    run_list(row.edited().values, row.edited().ids, row.edited().n);
    finish();
  }

  void run_candidates(const Candidates& c) {
    run_list(c.values, c.ids, c.n);
    finish();
  }

 private:
  static constexpr int kField = 4 * Vec::kLanes;  // tokens that run together
  static constexpr int kTogether = 16;            // groups whose tokens do
  static constexpr int kGroupVecs = 2;            // vectors of groups whose noise is made together

  static int64_t padded_groups_of(int64_t vocab) {
    constexpr int kStep = kGroupVecs * Vec::kLanes;
    const int64_t groups = (vocab + kNoiseBlock - 1) / kNoiseBlock * kNoiseGroups;
    return (groups + kStep - 1) / kStep * kStep;
  }

  // The words of its block: two make the least of its clocks, the third says whose that is.
  struct Group {
    uint32_t word0, word1, word2;

    double least() const { return exponential(word0, word1) / kNoiseGroup; }
  };

  // Twice as many 32-bit lanes: a0 b0 a1 b1 ... of the low halves.
  static U32 pair(U64 a, U64 b) { return reinterpret_cast<U32>((a & 0xffffffffu) | (b << 32)); }

  // The blocks of kLanes numbers, by their words.
  inline __attribute__((always_inline)) void blocks_of(const int32_t* numbers, uint32_t domain, U32 (&words)[3]) const {
    U64 both;
    memcpy(&both, numbers, sizeof both);
    U64 word[2][4];
    word[0][0] = both & 0xffffffffu;
    word[1][0] = both >> 32;
    noise_.generate(word, domain);
    for (int i = 0; i < 3; ++i) words[i] = pair(word[0][i], word[1][i]);
  }

  // log2(p / p_max)
  Vec log2_odds(Vec x) const { return fma(x, Vec::set1(0.5f), Vec::set1(minus_half_max_)) * Vec::set1(half_scale_); }

  // A bound of log2(1 / v) from above. The bits of a float read as an integer interpolate its logarithm from below;
  // zero counts as 2^-127.
  static Vec most_noise(Vec v) { return fma(Vec::from_int(as_bits(v)), Vec::set1(-0x1p-23f), Vec::set1(127.0f)); }

  // A bound of an exponential from below: -log(1 - v) >= v + v^2 / 2, without the last bit of the word, which does not
  // fit a signed conversion.
  static Vec least_exponential(U32 word) {
    const Vec v = Vec::from_int(~word >> 1) * Vec::set1(0x1p-31f);
    return fma(v * v, Vec::set1(0.5f), v);
  }

  // log2(1 / clock) of the least clock of a group whose block begins with word, at most.
  static Vec most_noise_of_group(U32 word) {
    return most_noise(least_exponential(word) * Vec::set1(1.0f / kNoiseGroup));
  }

  // In each lane the group that could score most, of those whose number has this lane as its remainder.
  struct Leaders {
    Vec bound;
    Vec start;  // the group's number without the lane
  };

  // What n groups could score at most, -inf where they cannot run, how much of that is noise, and the words of their
  // blocks, kLanes groups at a time.
  template <class T>
  Leaders bound_groups(const Row<Vec, T>& row, int64_t n, float* bounds, float* noise, uint32_t* words) const {
    constexpr int kLanes = Vec::kLanes, kMaximaOfGroup = 4, kVecs = kGroupVecs;
    static_assert(row.kChunk * kMaximaOfGroup == kNoiseGroup * kLanes, "a group's maxima are every fourth of 16");
    static_assert(row.kPadding == kVecs * kMaximaOfGroup * kLanes, "maxima are there for all groups");
    U64 even = {};
    for (int i = 0; i < kLanes / 2; ++i) even[i] = static_cast<uint64_t>(2 * i);
    const Vec none = Vec::set1(kMinusInfinity);
    Leaders leaders{none, Vec::zero()};
    for (int64_t first = 0; first < n;) {
      U64 word[2 * kVecs][4];
      for (int v = 0; v < kVecs; ++v) {
        word[2 * v][0] = even + static_cast<uint64_t>(first + v * kLanes);
        word[2 * v + 1][0] = word[2 * v][0] + 1;
      }
      noise_.generate(word, kGroupDomain);
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v, first += kLanes, words += 3 * kLanes) {
        const Vec x = Vec::max_of_fourths(row.maxima() + first * kMaximaOfGroup);
        U32 block[3];
        for (int i = 0; i < 3; ++i) block[i] = pair(word[2 * v][i], word[2 * v + 1][i]);
        memcpy(words, block, sizeof block);
        const Vec most = most_noise_of_group(block[0]);
        most.store(noise + first);
        const Vec bound = select(Vec::set1(least_) <= x, log2_odds(x) + most, none);
        bound.store(bounds + first);
        const auto leads = leaders.bound < bound;
        leaders.bound = select(leads, bound, leaders.bound);
        leaders.start = select(leads, Vec::set1(static_cast<float>(first)), leaders.start);
      }
    }
    return leaders;
  }

  // The tokens of some groups enter that could win with the least clock of their group. Which they are cannot be
  // foreseen: so that nothing waits for a branch, comparisons come first.
  template <class T>
  void run_groups(const Row<Vec, T>& row, const int32_t* numbers, int n, const float* noise, const uint32_t* words) {
    constexpr int kWordsOfBlock = kNoiseBlock / row.kWord, kChunksOfBlock = kNoiseBlock / row.kChunk;
    constexpr uint64_t kEveryFourth = 0x1111111111111111u;
    static_assert(kTogether >= Vec::kLanes, "the leaders run together");
    uint64_t hits[kTogether];  // bit i: token i % 4 * 64 + i / 4 * 4 + member of the block
    for (int g = 0; g < n; ++g) {
      const int64_t block = numbers[g] / kNoiseGroups;
      const int member = numbers[g] % kNoiseGroups;
      const float least = softmax_.logit_at(static_cast<double>(to_beat_) - static_cast<double>(noise[numbers[g]]));
      const Vec bound = Vec::set1(least > least_ ? least : least_);
      hits[g] = 0;
      for (int c = 0; c < kChunksOfBlock && block * kChunksOfBlock + c < row.chunks(); ++c)
#pragma GCC unroll 4
        for (int w = 0; w < row.kWords; ++w) {
          const uint64_t reaching = row.reaching(block * kChunksOfBlock + c, w, bound);
          hits[g] |= (reaching >> member & kEveryFourth) << (c * row.kWords + w);
        }
    }
    for (int g = 0; g < n; ++g) {
      constexpr int kLanes = Vec::kLanes;
      const int32_t number = numbers[g], place = number / kNoiseGroups * kNoiseBlock + number % kNoiseGroups;
      const uint32_t* word = words + number / kLanes * (3 * kLanes) + number % kLanes;
      const Group group{word[0], word[kLanes], word[2 * kLanes]};
      for (uint64_t left = hits[g]; left; left &= left - 1) {
        const int bit = __builtin_ctzll(left);
        const int32_t id = place + bit % kWordsOfBlock * row.kWord + bit / kWordsOfBlock * kNoiseGroups;
        enter(row.at(id), id, group);
      }
    }
  }

  // A list: the least clock of each token's group, and then its own.
  void run_list(const float* values, const int32_t* ids, int64_t n) {
    constexpr int kLanes = Vec::kLanes;
    for (int64_t i = 0; i < n; i += kLanes) {
      const int m = static_cast<int>(n - i < kLanes ? n - i : kLanes);
      const Vec x = Vec::load(values + i);
      const uint32_t able = lane_bits(Vec::set1(least_) <= x) & static_cast<uint32_t>((uint64_t{1} << m) - 1);
      if (!able) continue;
      float logits[kLanes];
      x.store(logits);
      int32_t groups[kLanes] = {};
      for (int lane = 0; lane < m; ++lane)
        groups[lane] = static_cast<int32_t>(noise_group(static_cast<uint32_t>(ids[i + lane])));
      U32 words[3];
      blocks_of(groups, kGroupDomain, words);
      const Vec best = log2_odds(x) + most_noise_of_group(words[0]);
      // A NaN, from (-inf) * 0, is never less than anything: -inf does not run.
      for (uint32_t left = able & lane_bits(Vec::set1(to_beat_) < best); left; left &= left - 1) {
        const int lane = __builtin_ctz(left);
        enter(logits[lane], ids[i + lane], Group{words[0][lane], words[1][lane], words[2][lane]});
      }
    }
  }

  inline __attribute__((always_inline)) void enter(float x, int32_t id, const Group& group) {
    if (!cut_.keeps(x, id)) return;
    if (has_least_clock(static_cast<uint32_t>(id), group.word2)) return run(x, id, group.least());
    logits_[entered_] = x;
    ids_[entered_] = id;
    group_words_[0][entered_] = group.word0;
    group_words_[1][entered_] = group.word1;
    if (++entered_ == kField) finish();
  }

  // Those that entered run.
  __attribute__((noinline)) void finish() {
    constexpr int kLanes = Vec::kLanes;
    const Vec none = Vec::set1(kMinusInfinity);
    for (int i = 0; i < entered_; i += kLanes) {
      const Vec x = Vec::load(logits_ + i);
      uint32_t able = lane_bits(Vec::set1(least_) <= x);
      if (entered_ - i < kLanes) able &= (1u << (entered_ - i)) - 1;
      if (!able) continue;
      U32 words[3];
      blocks_of(ids_ + i, kTokenDomain, words);
      U32 group;
      memcpy(&group, group_words_[0] + i, sizeof group);
      const Vec least = least_exponential(group) * Vec::set1(1.0f / kNoiseGroup);
      const Vec most = log2_odds(x) + most_noise(least + least_exponential(words[0]));
      Vec bound = select(Vec::lanes_of(able), most, none);
      while (const uint32_t left = lane_bits(Vec::set1(to_beat_) < bound)) {  // the likely winner first
        const int lane = __builtin_ctz(left & lane_bits(Vec::set1(reduce_max(bound)) <= bound));
        const Group of{group_words_[0][i + lane], group_words_[1][i + lane], 0};
        run(logits_[i + lane], ids_[i + lane], of.least() + exponential(words[0][lane], words[1][lane]));
        bound = select(Vec::lanes_of(1u << lane), none, bound);
      }
    }
    entered_ = 0;
  }

  __attribute__((noinline)) void run(float x, int32_t id, double clock) {
    const double score = softmax_.log_odds(x) - __builtin_log(clock);
    if (score < best_ || (score == best_ && id >= winner_)) return;
    best_ = score;
    winner_ = id;
    winner_logit_ = x;
    const double in_base_2 = score * 1.4426950408889634;
    to_beat_ = static_cast<float>(in_base_2 - 0x1p-8);        // more than the bounds' rounding
    const float reach = softmax_.logit_at(in_base_2 - 61.1);  // noise is at most 61 in base 2
    least_ = reach > cut_.value ? reach : cut_.value;
  }

  NoiseStream stream_;
  NoiseLanes<Vec> noise_;
  Softmax<Vec> softmax_;
  Cut cut_;
  float minus_half_max_, half_scale_;
  double best_ = -__builtin_inf();
  int32_t winner_ = -1;
  float winner_logit_ = kMinusInfinity;
  float to_beat_ = kMinusInfinity, least_;
  int entered_ = 0;
  float logits_[kField];
  int32_t ids_[kField] = {};
  uint32_t group_words_[2][kField] = {};
};

}  // namespace
}  // namespace fastattn
