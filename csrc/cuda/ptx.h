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

// Every copy of this thread has landed, grouped or not.
FASTATTN_DEVICE void cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

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

// ---------------------------------------------------------------- sm_90a
// Some of a block's threads meet: barrier `id`, 1 to 15, of `threads` threads.
FASTATTN_DEVICE void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// A barrier in 8 bytes of shared memory. Its phases have parity 0, 1, 0, ...; each ends with the last of its arrivals.
FASTATTN_DEVICE void mbarrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
FASTATTN_DEVICE void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives when every copy that this thread has issued has landed.
FASTATTN_DEVICE void mbarrier_arrive_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
// Until the phase of this parity has ended; the one before the first counts as ended.
FASTATTN_DEVICE void mbarrier_wait(uint32_t barrier, int parity) {
  uint32_t ended = 0;
  while (!ended)
    asm volatile(
        "{.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;}"
        : "=r"(ended)
        : "r"(barrier), "r"(parity)
        : "memory");
}

// What this thread wrote or saw written to shared memory, cp.async included, is there for wgmma and bulk copies too.
FASTATTN_DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// 16 n bytes from shared to global memory, asynchronously; in groups, as cp_async.
FASTATTN_DEVICE void bulk_store(void* target, uint32_t source, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(target), "r"(source), "r"(bytes)
               : "memory");
}
FASTATTN_DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// The sources of this thread's groups have been read.
FASTATTN_DEVICE void bulk_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// Registers a thread, from here on; all of a warpgroup ask for the same. 24 to 256, by eights.
template <int registers>
FASTATTN_DEVICE void give_registers_back() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers>
FASTATTN_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}

// A warpgroup's product runs from its issue to the wait for its group: until then its registers belong to it. The fence
// comes before the first product of a group; `pin` keeps the compiler from moving what goes on in those registers
// across.
FASTATTN_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
FASTATTN_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int pending>
FASTATTN_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}
template <int kTiles>
FASTATTN_DEVICE void pin(float (&c)[kTiles][4]) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
    asm volatile("" : "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])::"memory");
}
template <int kTiles>
FASTATTN_DEVICE void pin(uint32_t (&a)[kTiles][4]) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
    asm volatile("" : "+r"(a[i][0]), "+r"(a[i][1]), "+r"(a[i][2]), "+r"(a[i][3])::"memory");
}
// Of an address: a loop makes anew what is made of it, and keeps none of it in registers.
FASTATTN_DEVICE void pin(uint32_t& a) { asm volatile("" : "+r"(a)); }

#define FASTATTN_C4(i) "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])
#define FASTATTN_C32(i)                                                                                               \
  FASTATTN_C4(i), FASTATTN_C4(i + 1), FASTATTN_C4(i + 2), FASTATTN_C4(i + 3), FASTATTN_C4(i + 4), FASTATTN_C4(i + 5), \
      FASTATTN_C4(i + 6), FASTATTN_C4(i + 7)
#define FASTATTN_C64 FASTATTN_C32(0), FASTATTN_C32(8)
#define FASTATTN_D32                                                                                          \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
  "%23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FASTATTN_D64                                                                                                 \
  FASTATTN_D32                                                                                                       \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, " \
  "%54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
// shape, type, d and c: of the result; a, b, add, transposed: operands of the instruction by their text.
#define FASTATTN_WGMMA(shape, type, d, a, b, add, transposed)                                                    \
  "{.reg .pred p;\nsetp.ne.b32 p, " add ", 0;\nwgmma.mma_async.sync.aligned." shape ".f32." type "." type " {" d \
  "}, " a ", " b ", p, 1, 1, " transposed ";}"
#define FASTATTN_WGMMA_SHARED(shape, type, d, a, b, add, c) \
  asm volatile(FASTATTN_WGMMA(shape, type, d, a, b, add, "0, 0") : c : "l"(a_tile), "l"(b_tile), "r"(adds))
#define FASTATTN_WGMMA_REGISTERS(shape, type, d, left, b, add, c) \
  asm volatile(FASTATTN_WGMMA(shape, type, d, left, b, add, "1")  \
               : c                                                \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_tile), "r"(adds))

// c (64, n) = a (64, 16) b (16, n), or += where `add`; n = 8 kTiles. Of c each warp has its 16 rows, in mma_16816's
// layout. a and b: matrix descriptors (wgmma_operands.cuh) of rows of 16 neighbouring dimensions.
template <class T, int kTiles>
FASTATTN_DEVICE void wgmma_rows(float (&c)[kTiles][4], uint64_t a_tile, uint64_t b_tile, bool add) {
  static_assert(kTiles == 16);
  const int adds = add;
  if constexpr (is_bf16<T>)
    FASTATTN_WGMMA_SHARED("m64n128k16", "bf16", FASTATTN_D64, "%64", "%65", "%66", FASTATTN_C64);
  else
    FASTATTN_WGMMA_SHARED("m64n128k16", "f16", FASTATTN_D64, "%64", "%65", "%66", FASTATTN_C64);
}

// The same with a in registers, as mma_16816 wants it; b: 16 rows of n neighbouring dimensions.
template <class T, int kTiles>
FASTATTN_DEVICE void wgmma_columns(float (&c)[kTiles][4], const uint32_t (&a)[4], uint64_t b_tile, bool add) {
  static_assert(kTiles == 8 || kTiles == 16);
  const int adds = add;
  if constexpr (kTiles == 8 && is_bf16<T>)
    FASTATTN_WGMMA_REGISTERS("m64n64k16", "bf16", FASTATTN_D32, "{%32, %33, %34, %35}", "%36", "%37", FASTATTN_C32(0));
  else if constexpr (kTiles == 8)
    FASTATTN_WGMMA_REGISTERS("m64n64k16", "f16", FASTATTN_D32, "{%32, %33, %34, %35}", "%36", "%37", FASTATTN_C32(0));
  else if constexpr (is_bf16<T>)
    FASTATTN_WGMMA_REGISTERS("m64n128k16", "bf16", FASTATTN_D64, "{%64, %65, %66, %67}", "%68", "%69", FASTATTN_C64);
  else
    FASTATTN_WGMMA_REGISTERS("m64n128k16", "f16", FASTATTN_D64, "{%64, %65, %66, %67}", "%68", "%69", FASTATTN_C64);
}

#undef FASTATTN_WGMMA_REGISTERS
#undef FASTATTN_WGMMA_SHARED
#undef FASTATTN_WGMMA
#undef FASTATTN_D64
#undef FASTATTN_D32
#undef FASTATTN_C64
#undef FASTATTN_C32
#undef FASTATTN_C4

inline const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

// Of the current device, 90 for 9.0; 0 where there is none.
inline int compute_capability() {
  int device = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return 10 * major + minor;
}

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
