// What penalties, bias and mask do to a logit, on every machine that samples: in double, no operation fused, rounded
// once.
#pragma once

#include <cstdint>

#include "rng.h"  // FASTATTN_HOST_DEVICE

namespace fastattn {
namespace {

// The penalties of one row.
struct Penalties {
  double repetition, inverse, presence, frequency;

  FASTATTN_HOST_DEVICE Penalties(double repetition_penalty, double presence_penalty, double frequency_penalty)
      : repetition(repetition_penalty),
        inverse(1.0 / repetition_penalty),
        presence(presence_penalty),
        frequency(frequency_penalty) {}

  // The logit of a token that was read or written; `count` times written.
  FASTATTN_HOST_DEVICE double penalised(float logit, int32_t count) const {
    const double x = static_cast<double>(logit), scaled = x * (x > 0.0 ? inverse : repetition);
    return count > 0 ? scaled - frequency * static_cast<double>(count) - presence : scaled;
  }
};

}  // namespace
}  // namespace fastattn
