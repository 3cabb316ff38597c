#include "cpu/isa/kernels.inc"
#include "cpu/simd/vec_neon.h"

namespace fastattn {
extern const KernelTable neon_kernels = make_table<VecNeon, VecF64<16>>("neon");
}
