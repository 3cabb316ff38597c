#include "cpu/isa/kernels.inc"
#include "cpu/simd/amx.h"

namespace fastattn {
extern const KernelTable avx512_amx_kernels = make_table<VecAvx512, VecF64<64>, AmxBf16Product>("avx512_amx");
}
