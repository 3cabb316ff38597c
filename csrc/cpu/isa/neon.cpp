#include "cpu/simd/vec_neon.h"
#include "cpu/isa/kernels.inc"

namespace fastattn {
extern const KernelTable neon_kernels = make_table<VecNeon>("neon");
}
