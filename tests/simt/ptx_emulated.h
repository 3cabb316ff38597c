// The twin of csrc/cuda/ptx.h: the same names, executed on the CPU with the fragment layouts of the PTX ISA.
#pragma once

#include <algorithm>
#include <cmath>

#include "banks.h"
#include "hopper.h"
#include "params.h"

#define FASTATTN_DEVICE inline
#define FASTATTN_KERNEL(threads, blocks) inline void
#define FASTATTN_GRID_CONSTANT const

namespace fastattn {
namespace {

// ---------------------------------------------------------------- threads
inline int thread_index() { return simt::machine.current->thread; }
inline int block_index_x() { return static_cast<int>(simt::machine.block_index.x); }
inline int block_index_y() { return static_cast<int>(simt::machine.block_index.y); }
inline uint32_t shared_base() { return simt::shared.base; }

inline int compute_capability() { return simt::machine.compute_capability; }

inline void block_barrier(simt::Site site = simt::here()) {
  simt::machine.barrier(site);
  simt::perhaps_land();
}
inline void warp_barrier(simt::Site site = simt::here()) {
  const simt::Token token = simt::machine.warp().barriers[simt::machine.warp().generation % 2];
  simt::happens_before.release(token);
  simt::machine.collective(site, [](simt::Warp& warp) {
    ++warp.epoch;
    simt::Fiber* lanes = &simt::machine.fibers[static_cast<size_t>(&warp - simt::machine.warps.data()) * 32];
    std::vector<uint32_t> known;
    for (int lane = 0; lane < 32; ++lane) lanes[lane].publish(known);
    for (int lane = 0; lane < 32; ++lane) lanes[lane].learn(known);
  });
  simt::happens_before.acquire(token);
}

template <class V>
V shuffle_from(V value, int lane, simt::Site site = simt::here()) {
  simt::Warp& warp = simt::machine.warp();
  memcpy(warp.in[simt::machine.lane()], &value, sizeof value);
  simt::machine.collective(site, [](simt::Warp& w) { memcpy(w.out, w.in, sizeof w.in); });
  memcpy(&value, warp.out[lane], sizeof value);
  return value;
}
template <class V>
V shuffle_xor(V value, int mask, simt::Site site = simt::here()) {
  return shuffle_from(value, simt::machine.lane() ^ mask, site);
}

// ---------------------------------------------------------------- numbers
inline float float_of_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t bits_of_float(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
inline float to_float(float x) { return x; }
inline float to_float(bf16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float wide;
  memcpy(&wide, &bits, 4);
  return wide;
}
struct HalfTable {
  float value[1 << 16];
  HalfTable() {
    for (uint32_t i = 0; i < 1 << 16; ++i) {
      const uint16_t bits = static_cast<uint16_t>(i);
      _Float16 half;
      memcpy(&half, &bits, 2);
      value[i] = static_cast<float>(half);
    }
  }
};
inline float to_float(f16_t x) {
  static const HalfTable table;
  return table.value[x.bits];
}

template <class T>
uint16_t narrow(float x) {
  uint16_t bits;
  if constexpr (is_bf16<T>) {
    uint32_t wide;
    memcpy(&wide, &x, 4);
    bits = x != x ? 0x7fff : static_cast<uint16_t>((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
  } else {
    const _Float16 half = static_cast<_Float16>(x);
    memcpy(&bits, &half, 2);
  }
  return bits;
}
template <class T>
uint32_t pack2(float low, float high) {
  return narrow<T>(low) | static_cast<uint32_t>(narrow<T>(high)) << 16;
}

inline float flush(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x; }
inline float exp2_approx(float x) { return flush(std::exp2(flush(x))); }
inline float log2_approx(float x) { return flush(std::log2(flush(x))); }
inline float reciprocal_approx(float x) { return flush(1 / flush(x)); }
inline float maximum(float a, float b) { return std::fmax(a, b); }
inline float absolute(float a) { return std::fabs(a); }
inline int leading_zeros(uint64_t x) { return __builtin_clzll(x); }
inline double logarithm(double x) { return std::log(x); }
inline float fused_multiply_add(float a, float b, float c) { return std::fma(a, b, c); }

// ---------------------------------------------------------------- shared memory
SIMT_ACCESS void load_shared16(uint32_t (&r)[4], uint32_t address, simt::Site site = simt::here()) {
  simt::banks.access(site, address, 16);
  simt::shared.read(address, r, 16, site);
}
SIMT_ACCESS void store_shared4(uint32_t address, uint32_t value, simt::Site site = simt::here()) {
  simt::banks.access(site, address, 4);
  simt::shared.write(address, &value, 4, site);
}
SIMT_ACCESS Float2 load_shared_pair(uint32_t address, simt::Site site = simt::here()) {
  Float2 pair;
  simt::banks.access(site, address, 8);
  simt::shared.read(address, &pair, 8, site);
  return pair;
}
SIMT_ACCESS void store_shared_pair(uint32_t address, Float2 pair, simt::Site site = simt::here()) {
  simt::banks.access(site, address, 8);
  simt::shared.write(address, &pair, 8, site);
}

SIMT_ACCESS void store_shared8(uint32_t address, uint64_t value, simt::Site site = simt::here()) {
  simt::banks.access(site, address, 8);
  simt::shared.write(address, &value, 8, site);
}
SIMT_ACCESS uint32_t load_shared4(uint32_t address, simt::Site site = simt::here()) {
  uint32_t value;
  simt::banks.access(site, address, 4);
  simt::shared.read(address, &value, 4, site);
  return value;
}
SIMT_ACCESS uint64_t load_shared8(uint32_t address, simt::Site site = simt::here()) {
  uint64_t value;
  simt::banks.access(site, address, 8);
  simt::shared.read(address, &value, 8, site);
  return value;
}
// Where atomics go depends on data: their bank conflicts are not counted.
SIMT_ACCESS uint32_t add_shared4(uint32_t address, uint32_t value, simt::Site site = simt::here()) {
  return simt::shared.add(address, value, site);
}

template <bool kTrans>
void exchange_matrices(simt::Warp& warp) {
  uint32_t rows[32];
  for (int lane = 0; lane < 32; ++lane) memcpy(&rows[lane], warp.in[lane] + 16, 4);
  for (int m = 0; m < 4; ++m) simt::banks.phase(warp.site, rows + 8 * m, 8, 16);
  for (int lane = 0; lane < 32; ++lane)
    for (int m = 0; m < 4; ++m)
      for (int e = 0; e < 2; ++e) {
        const int row = kTrans ? lane % 4 * 2 + e : lane / 4, column = kTrans ? lane / 4 : lane % 4 * 2 + e;
        memcpy(warp.out[lane] + 4 * m + 2 * e, warp.in[8 * m + row] + 2 * column, 2);
      }
}
template <bool kTrans>
SIMT_ACCESS void load_matrices(uint32_t (&r)[4], uint32_t address, simt::Site site) {
  simt::Warp& warp = simt::machine.warp();
  const int lane = simt::machine.lane();
  simt::shared.read(address, warp.in[lane], 16, site);
  memcpy(warp.in[lane] + 16, &address, 4);
  simt::machine.collective(site, exchange_matrices<kTrans>);
  memcpy(r, warp.out[lane], 16);
}
SIMT_ACCESS void ldmatrix_x4(uint32_t (&r)[4], uint32_t address, simt::Site site = simt::here()) {
  load_matrices<false>(r, address, site);
}
SIMT_ACCESS void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address, simt::Site site = simt::here()) {
  load_matrices<true>(r, address, site);
}

// ---------------------------------------------------------------- tensor cores
template <class T>
void multiply_fragments(simt::Warp& warp) {
  float a[16][16], b[16][8], c[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    T ha[8], hb[4];
    float hc[4];
    memcpy(hc, warp.in[lane], 16);
    memcpy(ha, warp.in[lane] + 16, 16);
    memcpy(hb, warp.in[lane] + 32, 8);
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int i = 0; i < 8; ++i) a[group + i / 2 % 2 * 8][pair + i / 4 * 8 + i % 2] = to_float(ha[i]);
    for (int i = 0; i < 4; ++i) b[pair + i / 2 * 8 + i % 2][group] = to_float(hb[i]);
    for (int i = 0; i < 4; ++i) c[group + i / 2 * 8][pair + i % 2] = hc[i];
  }
  for (int m = 0; m < 16; ++m) {
    float sum[8] = {};
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < 8; ++n) sum[n] += a[m][k] * b[k][n];
    for (int n = 0; n < 8; ++n) c[m][n] += sum[n];
  }
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) memcpy(warp.out[lane] + 4 * i, &c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2], 4);
  ++simt::machine.mmas;
}
template <class T>
void mma_16816(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, simt::Site site = simt::here()) {
  simt::Warp& warp = simt::machine.warp();
  const int lane = simt::machine.lane();
  const uint32_t b[2] = {b0, b1};
  memcpy(warp.in[lane], c, 16);
  memcpy(warp.in[lane] + 16, a, 16);
  memcpy(warp.in[lane] + 32, b, 8);
  simt::machine.collective(site, multiply_fragments<T>);
  memcpy(c, warp.out[lane], 16);
}

// ---------------------------------------------------------------- asynchronous copies
inline void cp_async16(uint32_t target, const void* source, bool wanted, simt::Site site = simt::here()) {
  simt::perhaps_land();
  simt::banks.access(site, target, 16);
  simt::shared.begin_copy(target, site);
  simt::Copy copy{target, source, wanted ? 16u : 0u, false, site, simt::happens_before.moment()};
  if (simt::machine.landing == simt::Landing::at_issue) simt::land(copy);
  simt::machine.current->copies.push_back(copy);
  ++simt::machine.current->ungrouped;
}
inline void cp_async_commit() {
  simt::machine.current->groups.push_back(simt::machine.current->ungrouped);
  simt::machine.current->ungrouped = 0;
}
template <int pending>
void cp_async_wait() {
  simt::Fiber& me = *simt::machine.current;
  while (me.groups.size() > pending) {
    simt::land_oldest(me, me.groups[0]);
    me.groups.erase(me.groups.begin());
  }
}
inline void cp_async_wait_all() {
  simt::Fiber& me = *simt::machine.current;
  simt::arrivals.land_all_of(me.thread);
  simt::land_oldest(me, me.copies.size());
  me.groups.clear();
  me.ungrouped = 0;
}

// ---------------------------------------------------------------- global memory
template <class V>
SIMT_ACCESS V load_global(const V* pointer, simt::Site site = simt::here()) {
  V value;
  memset(&value, 0xFF, sizeof value);
  if (!simt::global.read(pointer, sizeof value, site)) return value;
  simt::happens_before.read(pointer, sizeof value);
  memcpy(&value, pointer, sizeof value);
  return value;
}
template <class V>
SIMT_ACCESS void store_global(V* pointer, V value, simt::Site site = simt::here()) {
  if (!simt::global.write(pointer, sizeof value, site)) return;
  simt::happens_before.write(pointer, sizeof value);
  memcpy(pointer, &value, sizeof value);
}
SIMT_ACCESS void store_global16(void* pointer, const uint32_t (&r)[4], simt::Site site = simt::here()) {
  if (!simt::global.write(pointer, 16, site)) return;
  simt::happens_before.write(pointer, 16);
  memcpy(pointer, r, 16);
}

}  // namespace
}  // namespace fastattn
#include "ptx_hopper_emulated.h"
namespace fastattn {
namespace {

// ---------------------------------------------------------------- launches
inline const char* error_text(int error) { return error == 1 ? "invalid argument" : "emulated error"; }

struct Launch {
  unsigned blocks_x, blocks_y;
  int shared_bytes;
  void* stream;
};

template <class Params>
int launch_kernel(void (*kernel)(Params), int threads, const Launch& at, const Params& params) {
  simt::global.begin_launch();
  simt::shared.begin_launch();
  simt::banks.begin_launch(reinterpret_cast<const void*>(kernel));
  simt::machine.launch(
      {at.blocks_x, at.blocks_y, 1}, threads, [&] { kernel(params); },
      [&] {
        simt::shared.reset(static_cast<size_t>(at.shared_bytes));
        simt::banks.reset_block();
        simt::begin_block();
      },
      [] { simt::end_block(); });
  return 0;
}

}  // namespace
}  // namespace fastattn
