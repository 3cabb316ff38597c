#include "cpu/registry.h"

#include <stdexcept>

#include "cpu/features.h"

namespace fastattn {

// isa_list.inc is written by the build: one ISA(name) per compiled file of isa/, best first.
#define ISA(name) extern const KernelTable name##_kernels;
#include "isa_list.inc"
#undef ISA

namespace {

bool can_run(const std::string& name, const CpuFeatures& cpu) {
  if (name == "avx512_amx") return cpu.amx_bf16;
  if (name == "avx512_bf16") return cpu.avx512_bf16;
  if (name == "avx512") return cpu.avx512;
  if (name == "avx2") return cpu.avx2;
  return true;  // baseline and neon: the compiler's own target
}

const KernelTable* active = nullptr;

}  // namespace

const std::vector<const KernelTable*>& supported_kernels() {
  static const std::vector<const KernelTable*> tables = [] {
    const CpuFeatures cpu = detect_cpu();
    std::vector<const KernelTable*> runnable;
#define ISA(name) \
  if (can_run(#name, cpu)) runnable.push_back(&name##_kernels);
#include "isa_list.inc"
#undef ISA
    return runnable;
  }();
  return tables;
}

void select_kernels(const std::string& name) {
  std::string choices;
  for (const KernelTable* table : supported_kernels()) {
    if (name.empty() || name == table->name) {
      active = table;
      return;
    }
    choices += choices.empty() ? table->name : std::string(", ") + table->name;
  }
  throw std::invalid_argument("FASTATTN_CPU_ISA: expected one of " + choices + ", got '" + name + "'");
}

bool has_fast_bf16_dot() {
  static const bool fast = detect_cpu().fast_bf16_dot;
  return fast;
}

const KernelTable& kernels() {
  if (!active) select_kernels("");
  return *active;
}

}  // namespace fastattn
