// What llama.cpp's default samplers do to a row of logits, written anew as a peer for the benchmark: an array of
// {id, logit, p} of 12 bytes, std::partial_sort for the k best, softmax and top_p over them, one draw.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

namespace {

struct Token {
  int32_t id;
  float logit, p;
};

static_assert(sizeof(Token) == 12, "llama.cpp's triplet");

}  // namespace

extern "C" int32_t sample_top_k_top_p(const float* logits, int32_t vocab, float temperature, int32_t top_k, float top_p,
                                      uint32_t seed) {
  static thread_local std::vector<Token> tokens;  // kept between calls, as llama.cpp keeps its array
  tokens.resize(static_cast<size_t>(vocab));
  for (int32_t i = 0; i < vocab; ++i) tokens[static_cast<size_t>(i)] = {i, logits[i], 0.0f};
  top_k = std::min(top_k, vocab);
  std::partial_sort(tokens.begin(), tokens.begin() + top_k, tokens.end(),
                    [](const Token& a, const Token& b) { return a.logit > b.logit; });

  double total = 0.0;
  for (int32_t i = 0; i < top_k; ++i) {
    Token& token = tokens[static_cast<size_t>(i)];
    token.p = std::exp((token.logit - tokens[0].logit) / temperature);
    total += token.p;
  }
  int32_t kept = 0;
  double mass = 0.0;
  while (kept < top_k && mass < top_p * total) mass += tokens[static_cast<size_t>(kept++)].p;

  std::mt19937 generator(seed);
  double left = std::uniform_real_distribution<double>(0.0, mass)(generator);
  for (int32_t i = 0; i + 1 < kept; ++i)
    if ((left -= tokens[static_cast<size_t>(i)].p) < 0.0) return tokens[static_cast<size_t>(i)].id;
  return tokens[static_cast<size_t>(kept - 1)].id;
}
