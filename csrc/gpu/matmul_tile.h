// Any number of rows of x, any strides, in batches: a block has XT rows of x and WT columns of the result, XW x WW warps.
//
// Both operands pass through shared memory in chunks of 64 of k, `kTileStages` chunks deep, each row of 128 bytes with its
// 16-byte pieces swizzled. An output is one accumulator, whatever stands beside it.
#pragma once

#include "matmul_mma.h"

namespace detinfer {
namespace gpu {

constexpr int kTileK = 64, kTileStages = 3;

// One operand as a block sees it: rows of k.
struct TileSource {
  const uint16_t* base;
  int64_t rows, depth, row_stride, k_stride;
  bool vectors;  // k contiguous, rows on 16-byte boundaries: copied without passing through registers
};

// R rows from `row`, 64 of k from k0, to shared memory; what lies outside is +0.
template <int R, int kThreads>
static __device__ __forceinline__ void load_tile(const TileSource& from, int64_t row, int64_t k0, uint32_t to, char* memory) {
  if (from.vectors) {
#pragma unroll
    for (int i = threadIdx.x; i < R * 8; i += kThreads) {
      const int r = i / 8, piece = i % 8;
      const bool here = row + r < from.rows && k0 + piece * 8 < from.depth;
      const uint16_t* at = from.base + (here ? (row + r) * from.row_stride + k0 + piece * 8 : 0);
      copy_16(to + r * 128 + ((piece ^ (r & 7)) << 4), at, here);
    }
    return;
  }
  const bool along_k = from.k_stride <= from.row_stride;  // neighbours in memory to neighbouring threads
  for (int i = threadIdx.x; i < R * 8; i += kThreads) {
    const int r = along_k ? i / 8 : i % R, piece = along_k ? i % 8 : i / R;
    alignas(16) uint16_t values[8];
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const int64_t k = k0 + piece * 8 + j;
      values[j] = row + r < from.rows && k < from.depth ? from.base[(row + r) * from.row_stride + k * from.k_stride] : 0;
    }
    *reinterpret_cast<uint4*>(memory + r * 128 + ((piece ^ (r & 7)) << 4)) = *reinterpret_cast<const uint4*>(values);
  }
}

template <int XT, int WT, int XW, int WW> struct TileShape {
  static constexpr int kThreads = XW * WW * 32;
  static constexpr int kStage = (XT + WT) * kTileK * 2;
  static constexpr int kSharedBytes = kStage * kTileStages;
  static_assert(XT / XW % 16 == 0 && WT / WW % 16 == 0, "a warp has whole instructions");
};

template <class T, int XT, int WT, int XW, int WW>
__global__ void __launch_bounds__(TileShape<XT, WT, XW, WW>::kThreads) tile(const __grid_constant__ GpuMatmulArgs p) {
  using Shape = TileShape<XT, WT, XW, WW>;
  constexpr int kX = XT / XW / 16, kW = WT / WW / 8;  // instructions of a warp each way
  extern __shared__ __align__(128) char memory[];
  const uint32_t base = shared_address(memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t x_tiles = (p.m + XT - 1) / XT;
  const int64_t x_row = blockIdx.x % x_tiles * XT, w_row = blockIdx.x / x_tiles * WT, batch = blockIdx.z;
  const auto aligned = [](const void* at, int64_t row_stride, int64_t k_stride, int64_t depth, int64_t rows) {
    return k_stride == 1 && depth % 8 == 0 && (rows == 1 || row_stride % 8 == 0) && reinterpret_cast<uintptr_t>(at) % 16 == 0;
  };
  const uint16_t* const x = static_cast<const uint16_t*>(p.x) + batch * p.x_b;
  const uint16_t* const w = static_cast<const uint16_t*>(p.w) + batch * p.w_b;
  const TileSource from_x{x, p.m, p.k, p.x_m, p.x_k, aligned(x, p.x_m, p.x_k, p.k, p.m)};
  const TileSource from_w{w, p.n, p.k, p.w_n, p.w_k, aligned(w, p.w_n, p.w_k, p.k, p.n)};
  const int chunks = static_cast<int>((p.k + kTileK - 1) / kTileK);
  const auto load = [&](int c) {
    const int at = c % kTileStages * Shape::kStage;
    load_tile<XT, Shape::kThreads>(from_x, x_row, static_cast<int64_t>(c) * kTileK, base + at, memory + at);
    load_tile<WT, Shape::kThreads>(from_w, w_row, static_cast<int64_t>(c) * kTileK, base + at + XT * 128, memory + at + XT * 128);
  };
  float sums[kX][kW][4] = {};
  for (int c = 0; c < kTileStages - 1; c++) {
    if (c < chunks) load(c);
    close_copies();
  }
  const int x_at = warp % XW * (XT / XW), w_at = XT + warp / XW * (WT / WW);
  for (int c = 0; c < chunks; c++) {
    wait_copies<kTileStages - 2>();
    __syncthreads();  // chunk c is here, and chunk c - 1 was read by all
    if (c + kTileStages - 1 < chunks) load(c + kTileStages - 1);
    close_copies();
    const uint32_t stage = base + c % kTileStages * Shape::kStage;
#pragma unroll
    for (int step = 0; step < kTileK / 16; step++) {
      uint32_t a[kX][4], b[kW / 2][4];
#pragma unroll
      for (int i = 0; i < kX; i++) {
        const int r = x_at + i * 16 + (lane & 15), piece = step * 2 + (lane >> 4);
        load_matrices(a[i], stage + r * 128 + ((piece ^ (r & 7)) << 4));
      }
#pragma unroll
      for (int j = 0; j < kW / 2; j++) {
        const int r = w_at + j * 16 + (lane & 7) + (lane >> 4) * 8, piece = step * 2 + (lane >> 3 & 1);
        load_matrices(b[j], stage + r * 128 + ((piece ^ (r & 7)) << 4));
      }
#pragma unroll
      for (int i = 0; i < kX; i++)
#pragma unroll
        for (int j = 0; j < kW; j++) multiply_add<T>(sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    }
  }
#pragma unroll
  for (int i = 0; i < kX; i++)
#pragma unroll
    for (int j = 0; j < kW; j++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int64_t m = x_row + x_at + i * 16 + lane / 4 + half * 8, n = w_row + w_at - XT + j * 8 + lane % 4 * 2;
        const float pair[2] = {sums[i][j][half * 2], sums[i][j][half * 2 + 1]};
        if (m >= p.m || n >= p.n) continue;
        if (n + 1 < p.n && p.out_n == 1 && (p.out_m % 2 | p.out_b % 2) == 0 && reinterpret_cast<uintptr_t>(p.out) % 4 == 0) {
          const float done[2] = {finish_sum<T>(p, batch, m, n, pair[0]), finish_sum<T>(p, batch, m, n + 1, pair[1])};
          *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(p.out) + batch * p.out_b + m * p.out_m + n) = T::put(done);
        } else {
          store_sum<T>(p, batch, m, n, pair[0]);
          if (n + 1 < p.n) store_sum<T>(p, batch, m, n + 1, pair[1]);
        }
      }
}

}  // namespace gpu
}  // namespace detinfer
