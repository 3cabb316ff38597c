#include "cpu/isa/kernels.inc"
#include "cpu/simd/vec_avx2.h"

namespace fastattn {
extern const KernelTable avx2_kernels = make_table<VecAvx2, VecF64<32>>("avx2");
}
