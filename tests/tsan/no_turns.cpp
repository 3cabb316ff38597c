// csrc/cpu/turns.cpp with a planted bug: nobody waits, so blocks of keys add to the same dQ at the same time.
#include "cpu/turns.h"

namespace fastattn {

void wait_for_turn(const int32_t*, int32_t) {}
void pass_turn(int32_t*) {}

}  // namespace fastattn
