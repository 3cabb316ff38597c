#include "cpu/scratch.h"

#include <memory>
#include <new>

namespace fastattn {
namespace {

constexpr std::align_val_t kAlignment{64};

struct Free {
  void operator()(void* data) const { ::operator delete(data, kAlignment); }
};

struct Buffer {
  std::unique_ptr<void, Free> data;
  size_t size = 0;
};

thread_local Buffer buffers[static_cast<int>(ScratchSlot::kCount)];

}  // namespace

void* thread_scratch(ScratchSlot slot, size_t bytes) {
  Buffer& buffer = buffers[static_cast<int>(slot)];
  if (buffer.size < bytes) {
    buffer.data.reset();
    buffer.size = 0;
    buffer.data.reset(::operator new(bytes, kAlignment));
    buffer.size = bytes;
  }
  return buffer.data.get();
}

}  // namespace fastattn
