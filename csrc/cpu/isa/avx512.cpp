#include "cpu/simd/vec_avx512.h"
#include "cpu/isa/kernels.inc"

namespace fastattn {
extern const KernelTable avx512_kernels = make_table<VecAvx512>("avx512");
}
