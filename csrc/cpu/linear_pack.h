// The layout of packed weights, and packing.
//
// Weights are packed as 32-bit words: one fp32, or two bf16 that are neighbours along in_features. A panel serves
// kPanel outputs: kPanel biases, then, word by word along in_features, kPanel words side by side. So a vector load
// meets as many outputs as it has lanes, and a panel, like the panels after each other, is one contiguous stream.
// Outputs and features past the end are zero; where bf16 is multiplied in tiles, a panel has whole tiles of words.
#pragma once

#include <cstring>

#include "cpu/integers.h"
#include "cpu/parallel.h"
#include "params.h"

namespace fastattn {
namespace {

// Bf16Product says how weights of bf16 will be multiplied.
template <class Vec, class Bf16Product>
struct PanelLayout {
  static constexpr int64_t kPanel = Vec::kLanes * Vec::kTileVecs;

  PanelLayout(int64_t in_features, int64_t out_features, DType dtype)
      : words(dtype == DType::f32 ? in_features
                                  : round_up(ceil_div(in_features, 2), Bf16Product::kTiles ? Vec::kLanes : 1)),
        panels(ceil_div(out_features, kPanel)) {}

  int64_t panel_floats() const { return (words + 1) * kPanel; }

  int64_t words;  // per output
  int64_t panels;
};

template <class Vec, class Bf16Product>
int64_t packed_linear_floats(int64_t in_features, int64_t out_features, DType dtype) {
  const PanelLayout<Vec, Bf16Product> layout(in_features, out_features, dtype);
  return layout.panels * layout.panel_floats();
}

// kLanes outputs by up to kLanes words, transposed in registers.
template <class Vec>
void pack_square(const PackLinearParams& p, int64_t output, int64_t word, int64_t words, float* packed, int64_t ld) {
  constexpr int kLanes = Vec::kLanes;
  const int64_t element = p.dtype == DType::f32 ? 4 : 2;
  const int64_t left = p.in_features * element - word * 4;  // an odd in_features leaves half of the last word
  const size_t bytes = static_cast<size_t>(left < kLanes * 4 ? left : kLanes * 4);
  const char* source = static_cast<const char*>(p.weight) + word * 4;
  Vec square[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    float row[kLanes] = {};
    if (output + i < p.out_features) memcpy(row, source + (output + i) * p.stride_weight * element, bytes);
    square[i] = Vec::load(row);
  }
  Vec::transpose(square);
  for (int i = 0; i < words; ++i) square[i].store(packed + i * ld);
}

template <class Vec, class Bf16Product>
void pack_linear(const PackLinearParams& p) {
  using Layout = PanelLayout<Vec, Bf16Product>;
  constexpr int64_t kPanel = Layout::kPanel, kLanes = Vec::kLanes;
  const Layout layout(p.in_features, p.out_features, p.dtype);
  parallel_for(layout.panels, p.nthreads, [&](int64_t panel) {
    float* packed = p.packed + panel * layout.panel_floats();
    for (int64_t i = 0; i < kPanel; ++i) {
      const int64_t output = panel * kPanel + i;
      packed[i] = p.bias && output < p.out_features ? p.bias[output] : 0.0f;
    }
    for (int64_t first = 0; first < kPanel; first += kLanes)
      for (int64_t word = 0; word < layout.words; word += kLanes) {
        const int64_t words = layout.words - word < kLanes ? layout.words - word : kLanes;
        pack_square<Vec>(p, panel * kPanel + first, word, words, packed + (1 + word) * kPanel + first, kPanel);
      }
  });
}

}  // namespace
}  // namespace fastattn
