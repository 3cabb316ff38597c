// What one ISA exports: its name and its functions. Plain pointers, so that no ISA's code can leak into another's.
#pragma once

#include "params.h"

namespace fastattn {

struct KernelTable {
  const char* name;
  void (*attention_forward)(const AttentionParams&);
  void (*append_kv)(const KVAppendParams&);
  void (*sample)(const SamplingParams&);
};

}  // namespace fastattn
