// top_p of a whole row, without a sort and mostly without the exact mass of every token.
//
// What is drawn is the winner of the race among the kept tokens, and if the winner among more tokens than those is
// kept, it is the same token. So the race may come first, and the question is then only whether its winner is kept:
// whether the tokens ahead of it have less than top_p of the mass. If it is not, nothing behind it is either, and those
// ahead race again. Sums of rough exponentials, with bounds of their errors, answer that nearly always. Where they do
// not, or where most races would be lost, the tokens above a guessed logit are listed and weighed exactly; and only
// where the rough total leaves the last kept token open too is the whole row weighed exactly.
#pragma once

#include "cpu/sampling_race.h"
#include "cpu/sampling_top_k.h"

namespace fastattn {
namespace {

// 2^t, roughly and in three qualities, for t = x * slope + shift - kRoughBias in [-62, 0], and something below 2^-61
// for less. Added to the bias, t lies in the low bits of the float with 16 of them behind the point; shifted up by 7
// they are a negative float 2^(t - 63) whose mantissa is interpolated, (1 + f) in place of 2^f.
constexpr float kRoughBias = 192.0f;

template <class Vec>
inline __attribute__((always_inline)) auto interpolated_exp2(Vec x, Vec slope, Vec shift) {
  return as_bits(max(Vec::set1(kRoughBias - 62.0f), fma(x, slope, shift))) << 7;  // max gives its second for a NaN
}

// As it is, within 3 %.
struct Interpolated {
  static constexpr double error = 0.0305, unit = -0.9705 * 0x1p63;

  template <class Vec>
  static inline __attribute__((always_inline)) Vec exp2(Vec x, Vec slope, Vec shift) {
    return Vec::from_bits(interpolated_exp2(x, slope, shift));
  }
};

// Mended by a polynomial in the mantissa, within 0.35 %.
struct Mended {
  static constexpr double error = 0.0035, unit = 1.0;

  template <class Vec>
  static inline __attribute__((always_inline)) Vec exp2(Vec x, Vec slope, Vec shift) {
    const auto bits = interpolated_exp2(x, slope, shift);
    const Vec g = Vec::from_bits((bits & 0x7fffffu) | 0x3f800000u);  // 1 + f
    const Vec p = fma(fma(Vec::set1(-0x1.de9e1ep+60f), g, Vec::set1(0x1.636fb8p+62f)), g, Vec::set1(-0x1.75026p+63f));
    return p * Vec::from_bits(bits);
  }
};

// As good as the sum's bias leaves it.
struct Fine {
  static constexpr double error = 8e-6, unit = 1.0;

  template <class Vec>
  static inline __attribute__((always_inline)) Vec exp2(Vec x, Vec slope, Vec shift) {
    const Vec t = max(Vec::set1(kRoughBias - 62.0f), fma(x, slope, shift));
    return fastattn::exp2(t - Vec::set1(kRoughBias));
  }
};

// The mass of a row, and of the tokens that come before one in the total order, in units of the largest token's: each
// is within `error` of the truth, relatively, and `slack` more.
struct RoughMass {
  double total = 0.0, ahead = 0.0, error = 1.0;
  static constexpr double slack = 0x1p-18;  // the masses' own rounding to integers

  double least_total() const { return total * (1.0 - error) - slack; }
  double most_total() const { return total * (1.0 + error) + slack; }
  double least_ahead() const { return ahead * (1.0 - error) - slack; }
  double most_ahead() const { return ahead * (1.0 + error) + slack; }

  // Whether the token that these are ahead of is certainly kept, or certainly is not.
  bool keeps(double top_p) const { return most_ahead() < top_p * least_total(); }
  bool drops(double top_p) const { return least_ahead() >= top_p * most_total(); }
  bool is_open(double top_p) const { return !keeps(top_p) && !drops(top_p); }
};

// The masses of the row around a token; or of as much of it as proves that the token is kept.
template <class Quality, class Vec, class T>
RoughMass weigh_roughly(const Row<Vec, T>& row, const Softmax<Vec>& softmax, float logit, int32_t id, double top_p) {
  const double scale = softmax.log2_scale(), offset = static_cast<double>(softmax.max()) * scale;
  RoughMass mass;
  // x * scale - offset must not lose more than the polynomial does.
  const double rounding = 2.0 * (__builtin_fabs(offset) + 256.0) * 0x1p-23;
  if (!(rounding < 0x1p-9 && scale > 0x1p-60 && scale < 0x1p+60)) return mass;
  mass.error = Quality::error + rounding;
  const Vec slope = Vec::set1(static_cast<float>(scale)), shift = Vec::set1(static_cast<float>(kRoughBias - offset));
  const Vec x1 = Vec::set1(logit);
  using F64 = typename Vec::F64;
  F64 total = {}, ahead = {};
  const auto add_up = [&] {
    mass.total = mass.ahead = 0.0;
    for (int i = 0; i < Vec::kLanes / 2; ++i) {
      mass.total += Quality::unit * total[i];
      mass.ahead += Quality::unit * ahead[i];
    }
  };
  const auto add = [&](int count, auto load, auto precedes) {
    Vec sum = Vec::zero(), before = Vec::zero();
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) {
      const Vec x = load(i), w = Quality::exp2(x, slope, shift);
      sum = sum + w;
      before = select(precedes(x, i), before + w, before);
    }
    total += widen_low(sum) + widen_high(sum);
    ahead += widen_low(before) + widen_high(before);
  };
  const EditedTokens& edited = row.edited();
  for (int64_t first = 0; first < edited.n; first += Vec::kLanes) {
    uint32_t lanes = 0;
    for (int i = 0; i < Vec::kLanes && first + i < edited.n; ++i)
      lanes |= static_cast<uint32_t>(edited.ids[first + i] < id) << i;
    add(
        1, [&](int) { return Vec::load(edited.values + first); },
        [&](Vec x, int) { return (x1 < x) | ((x1 <= x) & Vec::lanes_of(lanes)); });
  }
  constexpr int kVecs = Row<Vec, T>::kChunkVecs;
  const float weightless = softmax.logit_at(-64.0), least_ahead = logit > weightless ? logit : weightless;
  row.visit_chunks(least_ahead, -kMinusInfinity, [&](int64_t c, int32_t first_id) {
    const auto load = [&](int i) { return row.load(c, i); };
    if (first_id > id)
      add(kVecs, load, [&](Vec x, int) { return x1 < x; });
    else if (first_id + Row<Vec, T>::kChunk <= id)
      add(kVecs, load, [&](Vec x, int) { return x1 <= x; });
    else
      add(kVecs, load, [&](Vec x, int i) {
        const int32_t lower = id - first_id - i * Vec::kLanes;  // lanes with lower ids
        const uint32_t lanes = lower <= 0 ? 0 : lower >= Vec::kLanes ? ~0u : (1u << lower) - 1;
        return (x1 < x) | ((x1 <= x) & Vec::lanes_of(lanes));
      });
  });
  add_up();
  if (mass.keeps(top_p)) return mass;
  row.visit_chunks(weightless, least_ahead, [&](int64_t c, int32_t) {  // nothing here is ahead
    Vec sum = Vec::zero();
#pragma GCC unroll 4
    for (int i = 0; i < kVecs; ++i) sum = sum + Quality::exp2(row.load(c, i), slope, shift);
    total += widen_low(sum) + widen_high(sum);
  });
  add_up();
  return mass;
}

// A guess, from a sixty-fourth of the row, of a logit below which most of `spare` lies, in units of the largest mass,
// but not all of it.
template <class Vec, class T>
float guess_bound(const Row<Vec, T>& row, const Softmax<Vec>& softmax, double spare, float* work) {
  constexpr int kChunkStep = 4, kRatio = kChunkStep * Row<Vec, T>::kChunkVecs, kEnoughSamples = 128;
  int64_t n = 0;
  for (int64_t c = 0; c < row.chunks(); c += kChunkStep, n += Vec::kLanes) row.load(c, 0).store(work + n);
  if (n < kEnoughSamples) return kLowest;
  float* weights = work + n;
  const double scale = softmax.log2_scale();
  const Vec slope = Vec::set1(static_cast<float>(scale));
  const Vec shift = Vec::set1(static_cast<float>(kRoughBias - static_cast<double>(softmax.max()) * scale));
  Vec top = Vec::set1(kLowest), least = Vec::set1(softmax.max());
  for (int64_t i = 0; i < n; i += Vec::kLanes) {
    const Vec x = Vec::load(work + i);
    Mended::exp2(x, slope, shift).store(weights + i);
    top = max(top, x);
    least = min(least, select(Vec::set1(kLowest) <= x, x, least));
  }
  const auto below = [&](float bound) {
    Vec sum = Vec::zero();
    for (int64_t i = 0; i < n; i += Vec::kLanes)
      sum = sum + select(Vec::load(work + i) < Vec::set1(bound), Vec::load(weights + i), Vec::zero());
    float lanes[Vec::kLanes];
    sum.store(lanes);
    double total = 0.0;
    for (float lane : lanes) total += static_cast<double>(lane);
    return total;
  };
  const double most = 0.9 * spare / kRatio;
  float low = -reduce_max(Vec::zero() - least), high = reduce_max(top);
  if (below(high) <= most) return high;
  for (int round = 0; round < 64; ++round) {
    const float middle = between(low, high, round);
    if (!(low < middle && middle < high)) break;
    const double mass = below(middle);
    (mass <= most ? low : high) = middle;
    if (mass <= most && mass >= 0.8 * most) break;
  }
  return low;
}

// top_p among the whole row, exactly.
template <class Vec, class T>
Cut cut_top_p(const Row<Vec, T>& row, double top_p, const Softmax<Vec>& softmax, Candidates* c) {
  Cut cut;
  const uint64_t total = total_mass(row, softmax), target = prefix_mass(top_p, total);
  const double spare = static_cast<double>(total - target) / softmax.kOne;
  const float bound = guess_bound(row, softmax, spare, c->work);
  row.gather(bound, c);
  if (!cut_prefix<Vec>(*c, target, softmax, &cut) && bound > kLowest) {  // the guess was too high
    row.gather(kLowest, c);
    cut_prefix<Vec>(*c, target, softmax, &cut);
  }
  return cut;
}

// A list is cheaper to race than the row unless it is long: it takes a Philox block a token, the row one for 64.
template <class Vec, class T>
void run(const Row<Vec, T>& row, Candidates* c, Race<Vec>* race) {
  if (c->n < row.size() / 256)
    race->run_candidates(*c);
  else
    race->run_row(row, c->work);
}

// Draws under top_p. start(cut) makes a race that has not been run, among the tokens that the cut and other filters
// keep.
template <class Vec, class T, class Start>
int32_t draw_nucleus(const Row<Vec, T>& row, double top_p, const Softmax<Vec>& softmax, Candidates* c, Start&& start) {
  // A winner that is not kept leaves a race among those ahead of it. How often it is kept grows from top_p to 1.
  constexpr int kRaces = 4;
  RoughMass mass;
  Cut within;
  for (int races = 0; top_p >= 0.5 && races < kRaces; ++races) {
    Race<Vec> race = start(within);
    race.run_row(row, c->work);
    const float logit = race.winner_logit();
    const int32_t id = race.winner();
    mass = weigh_roughly<Interpolated>(row, softmax, logit, id, top_p);
    if (mass.is_open(top_p)) mass = weigh_roughly<Mended>(row, softmax, logit, id, top_p);
    if (mass.is_open(top_p)) mass = weigh_roughly<Fine>(row, softmax, logit, id, top_p);
    if (mass.keeps(top_p)) return id;
    if (mass.is_open(top_p)) break;
    within = {logit, id - 1};
  }
  mass = weigh_roughly<Fine>(row, softmax, -kMinusInfinity, 0, top_p);  // of the row
  constexpr int kGuesses = 3;  // a bound that is too high leaves out too much: then a lower one
  double spare = (1.0 - top_p) * mass.least_total();
  for (int guesses = 0; mass.error < 1.0 && guesses < kGuesses; ++guesses, spare /= 8.0) {
    row.gather(guess_bound(row, softmax, spare, c->work), c);
    const double least = mass.least_total() * softmax.kOne, most = mass.most_total() * softmax.kOne;
    Cut wide, narrow;
    if (!cut_prefix<Vec>(*c, prefix_mass(top_p, static_cast<uint64_t>(most) + 1), softmax, &wide)) continue;
    cut_prefix<Vec>(*c, prefix_mass(top_p, static_cast<uint64_t>(least)), softmax, &narrow);
    c->keep(wide);
    Race<Vec> likely = start(wide);
    run(row, c, &likely);
    if (narrow.keeps(likely.winner_logit(), likely.winner())) return likely.winner();
    break;
  }
  Race<Vec> certain = start(cut_top_p(row, top_p, softmax, c));
  run(row, c, &certain);
  return certain.winner();
}

}  // namespace
}  // namespace fastattn
