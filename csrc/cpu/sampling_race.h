// The draw: argmax of log p + Gumbel noise over the kept tokens (the Gumbel-max trick), which needs no normalisation.
//
// A token's score is a double, and costs two logarithms; but only the winner's score matters. Noise comes out of Philox
// in vectors together with an upper bound of each score, in float and in base 2, and only the few tokens whose bound
// beats the best score so far are scored. So bounds may round as they like: they never decide a draw.
#pragma once

#include "cpu/sampling_filters.h"
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
      : noise_(stream), softmax_(softmax), cut_(cut), minus_half_max_(Vec::set1(-0.5f * softmax.max())) {
    // Bounds work on halves: the difference of two finite floats may overflow, that of their halves does not.
    const double scale = 2.0 * softmax.log2_scale();
    half_scale_ = Vec::set1(scale < __FLT_MAX__ ? static_cast<float>(scale) : __FLT_MAX__);
    run(softmax.max(), id, stream.word(static_cast<uint32_t>(id)));
  }

  int32_t winner() const { return winner_; }

  // Everything in the row: each Philox block is four neighbours.
  template <class T>
  void run_row(const Row<Vec, T>& row) {
    constexpr int kLanes = Vec::kLanes, kVecs = 4;
    U64 blocks = {};  // in lane order 0, n, 1, n + 1, ..., so that even_pairs, then odd_pairs come out by ascending id
    for (int i = 0; i < kLanes / 2; ++i) blocks[i] = static_cast<uint64_t>(i % 2 * kLanes / 4 + i / 2);
    const auto run_chunk = [&](const T* chunk, int32_t first_id) {
      for (int i = 0; i < row.kChunk; i += kVecs * kLanes) {
        Vec x[kVecs];
        uint32_t able[kVecs];
        for (int v = 0; v < kVecs; ++v) {
          x[v] = Vec::load(chunk + i + v * kLanes);
          able[v] = lane_bits(Vec::set1(least_) <= x[v]);
        }
        if (!(able[0] | able[1] | able[2] | able[3])) continue;
        const int32_t id = first_id + i;
        U64 word[2][4];
        word[0][0] = blocks + static_cast<uint64_t>(id / 4);
        word[1][0] = word[0][0] + static_cast<uint64_t>(kLanes / 2);
        noise_.generate(word);
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) {
          const U64(&w)[4] = word[v / 2];
          const U64 low = pair(w[0], w[1]), high = pair(w[2], w[3]);
          const U64 words = v % 2 ? Vec::odd_pairs(low, high) : Vec::even_pairs(low, high);
          run_lanes(x[v], reinterpret_cast<U32>(words), able[v], [&](int lane) { return id + v * kLanes + lane; });
        }
      }
    };
    row.visit_chunks([&] { return least_; }, run_chunk);
  }

  // A list: each token needs a Philox block of its own.
  void run_candidates(const Candidates& c) {
    for (int64_t i = 0; i < c.n; i += Vec::kLanes) {
      Vec x = Vec::load(c.values + i);
      if (i + Vec::kLanes > c.n) {
        float padded[Vec::kLanes];
        for (int lane = 0; lane < Vec::kLanes; ++lane)
          padded[lane] = i + lane < c.n ? c.values[i + lane] : kMinusInfinity;
        x = Vec::load(padded);
      }
      const uint32_t able = lane_bits(Vec::set1(least_) <= x);
      if (!able) continue;
      U64 ids;
      memcpy(&ids, c.ids + i, sizeof ids);
      const U64 even = ids & 0xffffffffu, odd = ids >> 32;
      U64 word[2][4];
      word[0][0] = even >> 2;
      word[1][0] = odd >> 2;
      noise_.generate(word);
      const U64 words = pair(choose(word[0], even), choose(word[1], odd));
      run_lanes(x, reinterpret_cast<U32>(words), able, [&](int lane) { return c.ids[i + lane]; });
    }
  }

 private:
  // Twice as many 32-bit lanes: a0 b0 a1 b1 ... of the low halves.
  static U64 pair(U64 a, U64 b) { return (a & 0xffffffffu) | (b << 32); }

  // word[id % 4], lane by lane.
  static U64 choose(const U64 (&word)[4], U64 ids) {
    const U64 odd = U64{} - (ids & 1), upper = U64{} - (ids >> 1 & 1);  // all ones or zero
    const U64 low = (word[1] & odd) | (word[0] & ~odd), high = (word[3] & odd) | (word[2] & ~odd);
    return (high & upper) | (low & ~upper);
  }

  // With v = 1 - uniform, -log(uniform) >= v, so the noise is at most -log(v). The bits of a float read as an integer
  // are a lower bound of its logarithm: bits(f) / 2^23 - 127 <= log2(f). The last bit of the word is dropped to fit a
  // signed conversion, which makes v smaller: still a bound.
  Vec bound(Vec x, U32 words) const {
    const Vec v = Vec::from_int(~words >> 1);  // v * 2^31
    const Vec noise = fma(Vec::from_int(as_bits(v)), Vec::set1(-0x1p-23f), Vec::set1(158.0f));
    return fma(fma(x, Vec::set1(0.5f), minus_half_max_), half_scale_, noise);
  }

  template <class IdOf>
  inline __attribute__((always_inline)) void run_lanes(Vec x, U32 words, uint32_t able, IdOf&& id_of) {
    // A NaN, from (-inf) * 0, is never less than anything: -inf does not run.
    uint32_t chosen = able & lane_bits(Vec::set1(to_beat_) < bound(x, words));
    if (!chosen) return;
    float logits[Vec::kLanes];
    x.store(logits);
    for (; chosen; chosen &= chosen - 1) {
      const int lane = __builtin_ctz(chosen);
      const int32_t id = id_of(lane);
      if (cut_.keeps(logits[lane], id)) run(logits[lane], id, words[lane]);
    }
  }

  __attribute__((noinline)) void run(float x, int32_t id, uint32_t word) {
    const double uniform = (static_cast<double>(word) + 0.5) * 0x1p-32;
    const double score = softmax_.log_odds(x) - __builtin_log(-__builtin_log(uniform));
    if (score < best_ || (score == best_ && id >= winner_)) return;
    best_ = score;
    winner_ = id;
    const double in_base_2 = score * 1.4426950408889634;
    to_beat_ = static_cast<float>(in_base_2 - 0x1p-8);        // more than the bounds' rounding
    const float reach = softmax_.logit_at(in_base_2 - 33.1);  // noise is at most 33.01 in base 2
    least_ = reach > cut_.value ? reach : cut_.value;
  }

  NoiseLanes<Vec> noise_;
  Softmax<Vec> softmax_;
  Cut cut_;
  Vec minus_half_max_, half_scale_;
  double best_ = -__builtin_inf();
  int32_t winner_ = -1;
  float to_beat_, least_;
};

}  // namespace
}  // namespace fastattn
