// What this processor and its operating system support. Compiled without -m flags: runs anywhere.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace fastattn {

struct CpuFeatures {
  bool avx2 = false;           // AVX2, FMA and F16C, and the OS saves ymm
  bool avx512 = false;         // AVX-512 F, BW, DQ and VL, and the OS saves zmm and masks
  bool avx512_bf16 = false;    // the above and AVX512-BF16
  bool amx_bf16 = false;       // the above and AMX-BF16, and the OS lets this process use tile registers
  bool fast_bf16_dot = false;  // vdpbf16ps as often as an FMA: AMD's cores, not Intel's, which have AMX for that
};

// Tile registers are 8 KiB of state per thread, which Linux keeps for processes that ask.
inline bool may_use_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

inline CpuFeatures detect_cpu() {
  CpuFeatures features;
#if defined(__x86_64__)
  uint32_t a, b, c, d;
  const auto bit = [](uint32_t word, int index) { return (word >> index & 1u) != 0; };
  if (!__get_cpuid(1, &a, &b, &c, &d)) return features;
  const bool fma = bit(c, 12), osxsave = bit(c, 27), avx = bit(c, 28), f16c = bit(c, 29);
  if (!osxsave || !avx) return features;
  uint32_t state, high;  // XCR0: which registers the OS saves
  __asm__("xgetbv" : "=a"(state), "=d"(high) : "c"(0));
  const bool ymm = (state & 0x6u) == 0x6u, zmm = (state & 0xe6u) == 0xe6u, tiles = (state & 0x60000u) == 0x60000u;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return features;
  features.avx2 = ymm && fma && f16c && bit(b, 5);
  features.avx512 = features.avx2 && zmm && bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31);
  const bool amx_bf16 = bit(d, 22) && bit(d, 24);
  if (__get_cpuid_count(7, 1, &a, &b, &c, &d)) features.avx512_bf16 = features.avx512 && bit(a, 5);
  features.amx_bf16 = features.avx512_bf16 && amx_bf16 && tiles && may_use_tiles();
  __get_cpuid(0, &a, &b, &c, &d);
  features.fast_bf16_dot = features.avx512_bf16 && c == signature_AMD_ecx;
#endif
  return features;
}

}  // namespace fastattn
