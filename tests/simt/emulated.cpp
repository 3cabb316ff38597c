// The launches of csrc/cuda, compiled for the emulator; its switch between fibers; and what tests ask of it: plain C,
// for ctypes.
#include <dlfcn.h>

#include "cuda/launch.cu"

#ifdef __x86_64__
asm(".globl simt_switch\n"
    "simt_switch:\n"
    "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\n"
    "mov %rsp,(%rdi)\nmov %rsi,%rsp\n"
    "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n");
#endif

extern "C" {

// A fresh machine. seed 0: threads and blocks in order. landing: 0 at the wait, 1 at issue, 2 anywhere between.
void simt_reset(uint64_t seed, int landing) {
  simt::machine.random_state = seed * 2654435761u + 88172645463325252ull;
  simt::machine.shuffled = seed != 0;
  simt::machine.landing = static_cast<simt::Landing>(landing);
  for (long& count : simt::machine.faults) count = 0;
  simt::machine.report.clear();
  simt::machine.mmas = simt::machine.wgmmas = simt::machine.switches = 0;
  simt::global.clear();
  simt::banks.clear();
}

// Of the device that launches are told of: 80, 90, ...
void simt_set_capability(int capability) { simt::machine.compute_capability = capability; }

// A tensor that kernels may read, or read and write.
void simt_allow(const void* data, size_t bytes, int writable) { simt::global.add(data, bytes, writable != 0); }

void simt_faults(long* counts) {
  for (int i = 0; i < simt::kFaults; ++i) counts[i] = simt::machine.faults[i];
}
const char* simt_report() { return simt::machine.report.c_str(); }

// The worst access site's cycles per phase, 1 = no bank conflict; and all sites, "file:line factor".
double simt_bank_factor() { return simt::banks.worst(); }
const char* simt_bank_table() {
  static std::string text;
  text = simt::banks.table();
  return text.c_str();
}
// The launches since the reset, "where the kernel begins in this library, bank ways" a line.
const char* simt_launches() {
  static std::string text;
  text.clear();
  for (const auto& [kernel, ways] : simt::banks.launches) {
    Dl_info library;
    char line[60];
    if (!dladdr(kernel, &library)) return nullptr;
    const auto offset = static_cast<const char*>(kernel) - static_cast<const char*>(library.dli_fbase);
    snprintf(line, sizeof line, "%lx %d\n", static_cast<unsigned long>(offset), ways);
    text += line;
  }
  return text.c_str();
}
long simt_mmas() { return simt::machine.mmas; }
long simt_wgmmas() { return simt::machine.wgmmas; }
}
