#include "cpu/isa/kernels.inc"
#include "cpu/simd/vec_avx512.h"

namespace fastattn {
extern const KernelTable avx512_kernels = make_table<VecAvx512, VecF64<64>>("avx512");
}
