// The twin of the sm_90a part of csrc/cuda/ptx.h. Part of ptx_emulated.h.
#pragma once

#include "hopper.h"

namespace fastattn {
namespace {

// ---------------------------------------------------------------- barriers and proxies
inline void named_barrier(int id, int threads, simt::Site site = simt::here()) {
  simt::barriers.meet(id, threads, site);
}
inline void mbarrier_init(uint32_t barrier, int arrivals, simt::Site site = simt::here()) {
  simt::barriers.init(barrier, arrivals, site);
}
inline void mbarrier_arrive(uint32_t barrier, simt::Site site = simt::here()) {
  simt::perhaps_land();
  simt::Barrier& at = simt::barriers.at(barrier, site);
  simt::machine.current->publish(at.arriving);
  simt::happens_before.release(at.token);
  at.arrive(site);
}
inline void mbarrier_arrive_copies(uint32_t barrier, simt::Site site = simt::here()) {
  simt::arrivals.add(simt::barriers.at(barrier, site), site);
}
inline void mbarrier_wait(uint32_t barrier, int parity, simt::Site site = simt::here()) {
  simt::perhaps_land();
  simt::barriers.wait(barrier, parity, site);
}
inline void fence_proxy_async() { simt::machine.current->proxy_fence = ++simt::machine.now; }

inline void bulk_store(void* target, uint32_t source, uint32_t bytes, simt::Site site = simt::here()) {
  simt::bulk_stores.add(target, source, bytes, site);
}
inline void bulk_commit() { simt::bulk_stores.commit(); }
inline void bulk_wait_read() { simt::bulk_stores.wait(); }

// Registers are the compiler's business: csrc/cuda/hopper_tiles.cuh adds them up.
template <int registers>
void give_registers_back() {
  static_assert(registers >= 24 && registers <= 256 && registers % 8 == 0);
}
template <int registers>
void take_registers() {
  static_assert(registers >= 24 && registers <= 256 && registers % 8 == 0);
}

// ---------------------------------------------------------------- products
inline void wgmma_fence() { simt::warpgroup().fence(); }
inline void wgmma_commit() { simt::warpgroup().commit(); }
template <int pending>
void wgmma_wait(simt::Site site = simt::here()) {
  simt::perhaps_land();
  simt::warpgroup().wait(pending, site);
}
template <class V, int kTiles>
void pin(V (&)[kTiles][4]) {}
inline void pin(uint32_t&) {}

// 8 elements of an operand in shared memory, from where the descriptor says that they lie.
template <class T>
void read_operand(float (&out)[8], uint32_t address, simt::Product& product, int group, uint32_t number) {
  T elements[8];
  simt::shared.read_by_proxy(address, elements, product.reader, product.site);
  simt::shared.mark_operand(address, group, number);
  if (simt::kJudged) product.operands.push_back(address);
  for (int i = 0; i < 8; ++i) out[i] = to_float(elements[i]);
}

// a (64, 16) from shared memory, K-major, or from the registers of four warps.
template <class T>
void gather_a(float (&a)[64][16], simt::Product& product, int group, uint32_t number) {
  const simt::Descriptor tile(product.a_tile);
  for (int row = 0; row < 64 && product.a_tile; ++row)
    for (int chunk = 0; chunk < 2; ++chunk) {
      float eight[8];
      read_operand<T>(eight, tile.of_row(row, chunk), product, group, number);
      for (int i = 0; i < 8; ++i) a[row][8 * chunk + i] = eight[i];
    }
  for (int thread = 0; thread < 128 && !product.a_tile; ++thread) {
    T elements[8];
    memcpy(elements, product.lanes[thread].a, 16);
    const int lane = thread % 32, row = thread / 32 * 16 + lane / 4, column = lane % 4 * 2;
    for (int i = 0; i < 8; ++i) a[row + i / 2 % 2 * 8][column + i / 4 * 8 + i % 2] = to_float(elements[i]);
  }
}

// b (16, n), in whichever order its chunks lie.
template <class T>
void gather_b(float (&b)[16][256], simt::Product& product, int group, uint32_t number) {
  const simt::Descriptor tile(product.b_tile);
  const int lines = product.b_is_columns ? 16 : 8 * product.tiles, chunks = product.b_is_columns ? product.tiles : 2;
  for (int chunk = 0; chunk < chunks; ++chunk)
    for (int line = 0; line < lines; ++line) {
      uint32_t phase[8];
      const auto address = [&](int l) { return product.b_is_columns ? tile.of_line(l, chunk) : tile.of_row(l, chunk); };
      for (int l = 0; l < 8 && line % 8 == 0; ++l) phase[l] = address(line + l);
      if (line % 8 == 0) simt::banks.phase(product.site, phase, 8, 16);
      float eight[8];
      read_operand<T>(eight, address(line), product, group, number);
      for (int i = 0; i < 8; ++i) (product.b_is_columns ? b[line][8 * chunk + i] : b[8 * chunk + i][line]) = eight[i];
    }
}

template <class T>
void multiply_product(simt::Product& product, int group, uint32_t number) {
  static float a[64][16], b[16][256], c[64][256];
  gather_a<T>(a, product, group, number);
  gather_b<T>(b, product, group, number);
  const int n = 8 * product.tiles;
  for (int row = 0; row < 64; ++row) {
    for (int i = 0; i < n; ++i) c[row][i] = 0;
    for (int k = 0; k < 16; ++k)
      for (int i = 0; i < n; ++i) c[row][i] += a[row][k] * b[k][i];
  }
  for (int thread = 0; thread < 128; ++thread) {
    std::vector<float>& value = product.lanes[thread].c->value;
    const int lane = thread % 32, row = thread / 32 * 16 + lane / 4, column = lane % 4 * 2;
    for (int i = 0; i < 4 * product.tiles; ++i) {
      const float sum = c[row + i / 2 % 2 * 8][i / 4 * 8 + column + i % 2];
      float& x = value[static_cast<size_t>(i)];
      x = product.add ? x + sum : sum;
    }
  }
  ++simt::machine.wgmmas;
}

template <class T, int kTiles>
void wgmma_rows(float (&c)[kTiles][4], uint64_t a_tile, uint64_t b_tile, bool add, simt::Site site = simt::here()) {
  simt::warpgroup().issue({a_tile, b_tile, kTiles, add, false, multiply_product<T>, site}, &c[0][0], nullptr);
}
template <class T, int kTiles>
void wgmma_columns(float (&c)[kTiles][4], const uint32_t (&a)[4], uint64_t b_tile, bool add,
                   simt::Site site = simt::here()) {
  simt::warpgroup().issue({0, b_tile, kTiles, add, true, multiply_product<T>, site}, &c[0][0], a);
}

}  // namespace
}  // namespace fastattn
