// The machine as the kernels see it: every instruction that C++ has no word for. The only inline PTX of the project.
//
// Names and meanings follow the PTX ISA. Shared memory is addressed by 32-bit shared addresses, never by pointers. With
// another compiler than nvcc this header is its twin: the emulator in tests/simt, which runs the same kernels on a CPU.
#pragma once

#include <cstdint>

#include "params.h"

namespace fastattn {
namespace {

template <class T>
constexpr bool is_bf16 = false;
template <>
constexpr bool is_bf16<bf16_t> = true;

struct alignas(8) Float2 {
  float x, y;
};

}  // namespace
}  // namespace fastattn

#ifndef __CUDACC__
#include "ptx_emulated.h"
#else

#define FASTATTN_DEVICE __device__ __forceinline__
#define FASTATTN_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define FASTATTN_GRID_CONSTANT const __grid_constant__

namespace fastattn {
namespace {

FASTATTN_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
FASTATTN_DEVICE int block_index_x() { return static_cast<int>(blockIdx.x); }
FASTATTN_DEVICE int block_index_y() { return static_cast<int>(blockIdx.y); }
FASTATTN_DEVICE void block_barrier() { __syncthreads(); }
FASTATTN_DEVICE void warp_barrier() { __syncwarp(); }

// The block's dynamic shared memory; 128-byte aligned.
FASTATTN_DEVICE uint32_t shared_base() {
  extern __shared__ __align__(128) unsigned char memory[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(memory));
}

template <class V>
FASTATTN_DEVICE V shuffle_xor(V value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

template <class V>
FASTATTN_DEVICE V shuffle_from(V value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}

// Four 8x8 matrices of 16-bit elements: lane 8 m + r brings the address of row r of matrix m, 16 bytes.
FASTATTN_DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

FASTATTN_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// c (16, 8) += a (16, 16) b (16, 8), fp32 accumulators.
template <class T>
FASTATTN_DEVICE void mma_16816(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (!is_bf16<T>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 16 bytes from global to shared memory, asynchronously and past L1; zeros instead where `wanted` is false.
FASTATTN_DEVICE void cp_async16(uint32_t target, const void* source, bool wanted) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(wanted ? 16 : 0)
               : "memory");
}
FASTATTN_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// All but the youngest `pending` groups of this thread have landed.
template <int pending>
FASTATTN_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

FASTATTN_DEVICE void load_shared16(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
FASTATTN_DEVICE void store_shared4(uint32_t address, uint32_t value) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

FASTATTN_DEVICE void store_shared8(uint32_t address, uint64_t value) {
  asm volatile("st.shared.u64 [%0], %1;" ::"r"(address), "l"(value) : "memory");
}
FASTATTN_DEVICE uint32_t load_shared4(uint32_t address) {
  uint32_t value;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}
FASTATTN_DEVICE uint64_t load_shared8(uint32_t address) {
  uint64_t value;
  asm volatile("ld.shared.u64 %0, [%1];" : "=l"(value) : "r"(address) : "memory");
  return value;
}
// Adds atomically; returns what was there.
FASTATTN_DEVICE uint32_t add_shared4(uint32_t address, uint32_t value) {
  uint32_t before;
  asm volatile("atom.shared.add.u32 %0, [%1], %2;" : "=r"(before) : "r"(address), "r"(value) : "memory");
  return before;
}

FASTATTN_DEVICE Float2 load_shared_pair(uint32_t address) {
  Float2 pair;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(pair.x), "=f"(pair.y) : "r"(address) : "memory");
  return pair;
}
FASTATTN_DEVICE void store_shared_pair(uint32_t address, Float2 pair) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(pair.x), "f"(pair.y) : "memory");
}

template <class V>
FASTATTN_DEVICE V load_global(const V* pointer) {
  return *pointer;
}
template <class V>
FASTATTN_DEVICE void store_global(V* pointer, V value) {
  *pointer = value;
}
FASTATTN_DEVICE void store_global16(void* pointer, const uint32_t (&r)[4]) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(pointer), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

// Two floats to two 16-bit floats, the first in the low half.
template <class T>
FASTATTN_DEVICE uint32_t pack2(float low, float high) {
  uint32_t packed;
  if constexpr (is_bf16<T>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

FASTATTN_DEVICE float float_of_bits(uint32_t bits) { return __uint_as_float(bits); }
FASTATTN_DEVICE uint32_t bits_of_float(float x) { return __float_as_uint(x); }
FASTATTN_DEVICE float to_float(float x) { return x; }
FASTATTN_DEVICE float to_float(bf16_t x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
FASTATTN_DEVICE float to_float(f16_t x) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
}

FASTATTN_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FASTATTN_DEVICE float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FASTATTN_DEVICE float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FASTATTN_DEVICE float maximum(float a, float b) { return fmaxf(a, b); }
FASTATTN_DEVICE float absolute(float a) { return fabsf(a); }
FASTATTN_DEVICE int leading_zeros(uint64_t x) { return __clzll(static_cast<long long>(x)); }
FASTATTN_DEVICE double logarithm(double x) { return log(x); }
FASTATTN_DEVICE float fused_multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }

inline const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

struct Launch {
  unsigned blocks_x, blocks_y;
  int shared_bytes;
  cudaStream_t stream;
};

// The kernel's own error, or 0. Safe under stream capture: nothing here synchronises or allocates.
template <class Params>
int launch_kernel(void (*kernel)(Params), int threads, const Launch& at, const Params& params) {
  if (at.shared_bytes > 48 << 10) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, at.shared_bytes);
    if (error != cudaSuccess) return static_cast<int>(error);
  }
  void* arguments[] = {const_cast<Params*>(&params)};
  return static_cast<int>(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(at.blocks_x, at.blocks_y),
                                           dim3(static_cast<unsigned>(threads)), arguments,
                                           static_cast<size_t>(at.shared_bytes), at.stream));
}

}  // namespace
}  // namespace fastattn
#endif
