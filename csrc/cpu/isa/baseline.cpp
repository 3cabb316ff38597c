#include "cpu/isa/kernels.inc"
#include "cpu/simd/vec_scalar.h"

namespace fastattn {
extern const KernelTable baseline_kernels = make_table<VecScalar, VecF64<16>>("baseline");
}
