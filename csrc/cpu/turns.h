// Threads that take turns: what lets several of them add to one place in an order that never changes.
#pragma once

#include <cstdint>

namespace fastattn {

// Waits until `turn` is `mine`, and sees what everyone before has written.
void wait_for_turn(const int32_t* turn, int32_t mine);

// Lets the next one go ahead.
void pass_turn(int32_t* turn);

}  // namespace fastattn
