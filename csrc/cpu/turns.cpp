#include "cpu/turns.h"

#include <thread>

namespace fastattn {
namespace {

constexpr int kSpins = 1000;  // some microseconds: then somebody else may need this core to get on

}  // namespace

void wait_for_turn(const int32_t* turn, int32_t mine) {
  for (int spins = 0; __atomic_load_n(turn, __ATOMIC_ACQUIRE) != mine; ++spins)
    if (spins >= kSpins) std::this_thread::yield();
}

void pass_turn(int32_t* turn) { __atomic_fetch_add(turn, 1, __ATOMIC_RELEASE); }

}  // namespace fastattn
