#include "cpu/isa/kernels.inc"
#include "cpu/simd/dot_avx512_bf16.h"

namespace fastattn {
extern const KernelTable avx512_bf16_kernels = make_table<VecAvx512, VecF64<64>, DotBf16Product>("avx512_bf16");
}
