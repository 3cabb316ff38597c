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

  // The first token to run is `id`, one with the largest logit: it makes most others hopeless.
  Race(const NoiseStream& stream, const Softmax<Vec>& softmax, const Cut& cut, int32_t id)
      : noise_(stream), softmax_(softmax), cut_(cut), minus_half_max_(-0.5f * softmax.max()) {
    // Bounds work on halves: the difference of two finite floats may overflow, that of their halves does not.
    const double scale = 2.0 * softmax.log2_scale();
    half_scale_ = scale < __FLT_MAX__ ? static_cast<float>(scale) : __FLT_MAX__;
    run(softmax.max(), id, clock_of(stream, static_cast<uint32_t>(id)));
  }

  // The token that won among those that ran, and its logit.
  int32_t winner() const { return winner_; }
  float winner_logit() const { return winner_logit_; }

  // Floats that run_row works in.
  static int64_t work_of(int64_t vocab) { return 5 * (groups_of(vocab) + Vec::kLanes); }

  // Everything that the cut keeps of the row. The groups that could score most come first, so that few have to follow;
  // those do in any order, and their tokens some groups at a time: a Philox block alone is one long chain.
  template <class T>
  void run_row(const Row<Vec, T>& row, float* work) {
    constexpr int kLanes = Vec::kLanes, kFirst = 8, kTogether = 8;
    const int64_t n = (groups_of(row.size()) + kLanes - 1) / kLanes * kLanes;
    float *bounds = work, *noise = work + n;
    auto* words = reinterpret_cast<uint32_t*>(work + 2 * n);  // three of each group, kLanes groups at a time
    top_groups(row, n, bounds);
    bound_groups(n, bounds, noise, words);
    for (int picks = 0; picks < kFirst; ++picks) {
      Vec top = Vec::load(bounds);
      for (int64_t i = kLanes; i < n; i += kLanes) top = max(top, Vec::load(bounds + i));
      const float best = reduce_max(top);
      if (!(best > to_beat_)) break;
      int64_t i = 0;
      uint32_t where;
      while (!(where = lane_bits(Vec::set1(best) <= Vec::load(bounds + i)))) i += kLanes;
      i += __builtin_ctz(where);
      bounds[i] = kMinusInfinity;
      run_group(row, i, noise, words);
      finish();
    }
    int waiting = 0;
    for (int64_t i = 0; i < n; i += kLanes)
      for (uint32_t left = lane_bits(Vec::set1(to_beat_) < Vec::load(bounds + i)); left; left &= left - 1) {
        run_group(row, i + __builtin_ctz(left), noise, words);
        if (++waiting % kTogether == 0) finish();
      }
    run_list(row.edited().values, row.edited().ids, row.edited().n);
    finish();
  }

  void run_candidates(const Candidates& c) {
    run_list(c.values, c.ids, c.n);
    finish();
  }

 private:
  static constexpr int kField = 4 * Vec::kLanes;  // tokens that run together

  static int64_t groups_of(int64_t vocab) { return (vocab + kNoiseBlock - 1) / kNoiseBlock * kNoiseGroups; }

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

  template <class T>
  static constexpr int kChunks = kNoiseBlock / Row<Vec, T>::kChunk;  // chunks in a block of groups

  // The largest logit of each group of the row; -inf behind them, up to n.
  template <class T>
  static void top_groups(const Row<Vec, T>& row, int64_t n, float* tops) {
    static_assert(kChunks<T> * Row<Vec, T>::kChunk == kNoiseBlock, "groups are parts of whole chunks");
    constexpr int kStep = kChunks<T> * Vec::kLanes;
    const int64_t maxima = row.chunks() * Vec::kLanes;
    int64_t group = 0;
    for (int64_t first = 0; first < maxima; first += kStep, group += kNoiseGroups) {
      const float* v = row.maxima() + first;
      const int64_t m = maxima - first < kStep ? maxima - first : kStep;
      float top[kNoiseGroups];
      memcpy(top, v, sizeof top);
      for (int64_t j = kNoiseGroups; j < m; j += kNoiseGroups)
        for (int k = 0; k < kNoiseGroups; ++k) top[k] = top[k] > v[j + k] ? top[k] : v[j + k];
      memcpy(tops + group, top, sizeof top);
    }
    for (; group < n; ++group) tops[group] = kMinusInfinity;
  }

  // From the largest logits of n groups to what they could score at most, how much of that is noise, and the words of
  // their blocks, kLanes groups at a time.
  void bound_groups(int64_t n, float* bounds, float* noise, uint32_t* words) const {
    constexpr int kLanes = Vec::kLanes;
    U64 even = {};
    for (int i = 0; i < kLanes / 2; ++i) even[i] = static_cast<uint64_t>(2 * i);
    for (int64_t first = 0; first < n; first += kLanes, words += 3 * kLanes) {
      const Vec x = Vec::load(bounds + first);
      const auto able = Vec::set1(least_) <= x;
      if (!lane_bits(able)) {
        Vec::set1(kMinusInfinity).store(bounds + first);
        continue;
      }
      U64 word[2][4];
      word[0][0] = even + static_cast<uint64_t>(first);
      word[1][0] = word[0][0] + 1;
      noise_.generate(word, kGroupDomain);
      U32 block[3];
      for (int i = 0; i < 3; ++i) block[i] = pair(word[0][i], word[1][i]);
      memcpy(words, block, sizeof block);
      const Vec most = most_noise_of_group(block[0]);
      most.store(noise + first);
      select(able, log2_odds(x) + most, Vec::set1(kMinusInfinity)).store(bounds + first);
    }
  }

  // The tokens of a group enter that could win with its least clock.
  template <class T>
  void run_group(const Row<Vec, T>& row, int64_t number, const float* noise, const uint32_t* words) {
    const int lane_of_words = static_cast<int>(number % Vec::kLanes);
    words += (number - lane_of_words) * 3 + lane_of_words;
    const Group group{words[0], words[Vec::kLanes], words[2 * Vec::kLanes]};
    const float least = softmax_.logit_at(static_cast<double>(to_beat_) - static_cast<double>(noise[number]));
    const Vec bound = Vec::set1(least > least_ ? least : least_);
    const int member = static_cast<int>(number % kNoiseGroups);
    const int64_t first = number / kNoiseGroups * kChunks<T>;
    for (int64_t c = first; c < first + kChunks<T> && c < row.chunks(); ++c) {
      uint64_t hits = 0;  // every fourth lane of four vectors makes kLanes bits
#pragma GCC unroll 16
      for (int i = 0; i < row.kChunkVecs; ++i) {
        const uint64_t lanes = lane_bits(bound <= row.load(c, i)) >> member & 0x1111u;
        hits |= lanes << (i % 4 + i / 4 * Vec::kLanes);
      }
      for (; hits; hits &= hits - 1) {
        const int bit = __builtin_ctzll(hits), vec = bit / Vec::kLanes * 4 + bit % 4;
        const int lane = bit % Vec::kLanes / 4 * 4 + member;
        const int64_t id = c * row.kChunk + vec * Vec::kLanes + lane;
        enter(row.at(id), static_cast<int32_t>(id), group);
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
      const Vec best = log2_odds(x) + most_noise(least + least_exponential(words[0]));
      for (uint32_t left = able & lane_bits(Vec::set1(to_beat_) < best); left; left &= left - 1) {
        const int lane = __builtin_ctz(left);
        const Group of{group_words_[0][i + lane], group_words_[1][i + lane], 0};
        run(logits_[i + lane], ids_[i + lane], of.least() + exponential(words[0][lane], words[1][lane]));
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

  NoiseLanes<Vec> noise_;
  Softmax<Vec> softmax_;
  Cut cut_;
  float minus_half_max_, half_scale_;
  double best_ = -__builtin_inf();
  int32_t winner_ = -1;
  float winner_logit_ = kMinusInfinity;
  float to_beat_, least_;
  int entered_ = 0;
  float logits_[kField];
  int32_t ids_[kField] = {};
  uint32_t group_words_[2][kField] = {};
};

}  // namespace
}  // namespace fastattn
