#include "cpu/simd/vec_scalar.h"
#include "cpu/isa/kernels.inc"

namespace fastattn {
extern const KernelTable baseline_kernels = make_table<VecScalar>("baseline");
}
