// fp32 on the FMA units where both operands suit the tensor memory accelerator: the chains of matmul_fp32.h, fed without
// the threads' help. A block has XT rows of x and WT columns of the result, a thread RX x RW of them; WL lanes of a warp
// lie side by side over columns and the others over rows, so that what a thread loads serves its neighbours too.
//
// A stage is KB boxes of 32 of k; a warp of its own asks for a stage as soon as all have read what it held before. A thread
// walks a box in pieces of V of k and loads D - 1 pieces ahead.
#pragma once

#include "matmul_tma.h"

namespace detinfer {
namespace gpu {

template <int XT, int WT, int RX, int RW, int WL, int KB, int S> struct StreamShape {
  static constexpr int kLanesX = 32 / WL, kWarpsX = XT / (RX * kLanesX), kWarpsW = WT / (RW * WL);
  static constexpr int kWarps = kWarpsX * kWarpsW, kThreads = (kWarps + 1) * 32, kK = KB * 32;
  static constexpr int kRowsX = XT < 8 ? 8 : XT;  // a box begins where the swizzle does
  static constexpr int kStage = (kRowsX + WT) * KB * kBoxRowBytes, kFilled = (XT + WT) * KB * kBoxRowBytes;
  static constexpr int kSharedBytes = kStage * S + 1024;
  static_assert(kWarpsX * RX * kLanesX == XT && kWarpsW * RW * WL == WT && WL % 8 == 0, "warps cover the block");
  static_assert(kSharedBytes <= 227 * 1024, "a block has 227 KiB of shared memory");
};

template <int V> struct alignas(4 * V) Piece {
  float k[V];
};

template <int XT, int WT, int RX, int RW, int WL, int KB, int S, int V, int D>
__global__ void __launch_bounds__(StreamShape<XT, WT, RX, RW, WL, KB, S>::kThreads)
    stream_fp32(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap w_map,
                const __grid_constant__ GpuMatmulArgs p) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  using Shape = StreamShape<XT, WT, RX, RW, WL, KB, S>;
  constexpr int kLanesX = Shape::kLanesX;
  extern __shared__ char raw[];
  __shared__ __align__(8) uint64_t full[S], empty[S];
  char* const stages = raw + ((1024 - (shared_address(raw) & 1023)) & 1023);
  const uint32_t base = shared_address(stages);
  const int64_t x_tiles = (p.m + XT - 1) / XT;
  const int x_row = static_cast<int>(blockIdx.x % x_tiles) * XT, w_row = static_cast<int>(blockIdx.x / x_tiles) * WT;
  const int chunks = static_cast<int>((p.k + Shape::kK - 1) / Shape::kK);
  const auto ask = [&](int c) {
    const int s = c % S;
    const uint32_t arrived = shared_address(&full[s]), stage = base + s * Shape::kStage;
    barrier_expect(arrived, Shape::kFilled);
#pragma unroll
    for (int i = 0; i < KB; i++) {
      copy_box(stage + i * Shape::kRowsX * kBoxRowBytes, &x_map, c * Shape::kK + i * 32, x_row, arrived);
      copy_box(stage + (KB * Shape::kRowsX + i * WT) * kBoxRowBytes, &w_map, c * Shape::kK + i * 32, w_row, arrived);
    }
  };
  if (threadIdx.x == 0) {
    for (int s = 0; s < S; s++) {
      barrier_init(shared_address(&full[s]), 1);
      barrier_init(shared_address(&empty[s]), Shape::kWarps);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, x_lane = lane / WL, w_lane = lane % WL;
  if (warp == Shape::kWarps) {
    for (int c = 0; lane == 0 && c < chunks; c++) {
      if (c >= S) barrier_wait(shared_address(&empty[c % S]), (c / S - 1) & 1);
      ask(c);
    }
    return;
  }
  const int x_at = warp % Shape::kWarpsX * RX * kLanesX + x_lane, w_at = warp / Shape::kWarpsX * RW * WL + w_lane;
  const auto wait_for = [&](int c) { barrier_wait(shared_address(&full[c % S]), (c / S) & 1); };
  // From the k-th of the box on: row x_at + i * kLanesX, and column w_at + j * WL.
  const auto x_here = [&](int box, int i, int k) {
    const int row = x_at + i * kLanesX;
    const char* const at = stages + box / KB % S * Shape::kStage + box % KB * Shape::kRowsX * kBoxRowBytes;
    return at + row * kBoxRowBytes + ((k / 4 ^ (row & 7)) << 4) + k % 4 * 4;
  };
  const auto w_here = [&](int box, int j, int k) {
    const char* const at = stages + box / KB % S * Shape::kStage + (KB * Shape::kRowsX + box % KB * WT) * kBoxRowBytes;
    return at + (w_at + j * WL) * kBoxRowBytes + ((k / 4 ^ (w_at & 7)) << 4) + k % 4 * 4;
  };
  float sums[RX][RW] = {};
  Piece<V> a[D][RX], b[D][RW];
  const auto fetch = [&](int slot, int box, int t) {
#pragma unroll
    for (int i = 0; i < RX; i++) a[slot][i] = *reinterpret_cast<const Piece<V>*>(x_here(box, i, t * V));
#pragma unroll
    for (int j = 0; j < RW; j++) b[slot][j] = *reinterpret_cast<const Piece<V>*>(w_here(box, j, t * V));
  };
  constexpr int kPieces = 32 / V;
  const int boxes = static_cast<int>(p.k / 32);
  wait_for(0);
  if (boxes > 0) {
#pragma unroll
    for (int t = 0; t < D - 1; t++) fetch(t, 0, t);
  }
#pragma unroll 1
  for (int box = 0; box < boxes; box++) {
    if (D == 1 && box % KB == 0) wait_for(box / KB);
#pragma unroll
    for (int t = 0; t < kPieces; t++) {
      const int ahead = t + D - 1;
      if (ahead < kPieces) {
        fetch(ahead % D, box, ahead);
      } else if (box + 1 < boxes) {
        if (ahead == kPieces && (box + 1) % KB == 0) wait_for((box + 1) / KB);
        fetch(ahead % D, box + 1, ahead - kPieces);
      }
#pragma unroll
      for (int k = 0; k < V; k++)
#pragma unroll
        for (int j = 0; j < RW; j++)
#pragma unroll
          for (int i = 0; i < RX; i++) sums[i][j] = __fmaf_rn(a[t % D][i].k[k], b[t % D][j].k[k], sums[i][j]);
    }
    if ((box + 1) % KB == 0) {
      __syncwarp();
      if (lane == 0) barrier_arrive(shared_address(&empty[box / KB % S]));
    }
  }
  const int left = static_cast<int>(p.k % 32);
  if (left > 0 && boxes % KB == 0 && boxes > 0) wait_for(boxes / KB);
  for (int k = 0; k < left; k++)  // no term past the end: +0 * +0 would turn a sum of -0 into +0
#pragma unroll
    for (int j = 0; j < RW; j++)
#pragma unroll
      for (int i = 0; i < RX; i++)
        sums[i][j] = __fmaf_rn(*reinterpret_cast<const float*>(x_here(boxes, i, k)),
                               *reinterpret_cast<const float*>(w_here(boxes, j, k)), sums[i][j]);
#pragma unroll
  for (int i = 0; i < RX; i++)
#pragma unroll
    for (int j = 0; j < RW; j++) {
      const int64_t m = x_row + x_at + i * kLanesX, n = w_row + w_at + j * WL;
      if (m < p.m && n < p.n) store_sum<Float32>(p, 0, m, n, sums[i][j]);
    }
#endif
}

}  // namespace gpu
}  // namespace detinfer
