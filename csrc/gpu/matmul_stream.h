// fp32 on the FMA units where both operands suit the tensor memory accelerator: the chains of matmul_fp32.h, fed without
// the threads' help. A block has XT rows of x and WT columns of the result, a thread RX x RW of them; WL lanes of a warp
// lie side by side over columns and the others over rows, so that what a thread loads serves its neighbours too.
//
// A stage is KB boxes of 32 of k; one thread asks for a stage as soon as all have read what it held before. A thread walks a
// box in pieces of V of k and loads D - 1 pieces ahead; at D = 1 the compiler is left to order loads. Which is the faster
// differs by shape, as does all else here; no choice changes a bit.
#pragma once

#include "matmul_tma.h"

namespace detinfer {
namespace gpu {

template <int XT, int WT, int RX, int RW, int WL, int KB, int S> struct StreamShape {
  static constexpr int kLanesX = 32 / WL, kWarpsX = XT / (RX * kLanesX), kWarpsW = WT / (RW * WL);
  static constexpr int kThreads = kWarpsX * kWarpsW * 32, kK = KB * 32;
  static constexpr int kRowsX = XT < 8 ? 8 : XT;  // a box begins where the swizzle does
  static constexpr int kStage = (kRowsX + WT) * KB * kBoxRowBytes, kFilled = (XT + WT) * KB * kBoxRowBytes;
  static constexpr int kSharedBytes = kStage * S + 1024;
  static_assert(kWarpsX * RX * kLanesX == XT && kWarpsW * RW * WL == WT && WL % 8 == 0, "warps cover the block");
  static_assert(kSharedBytes <= 227 * 1024, "a block has 227 KiB of shared memory");
};

template <int V> struct alignas(4 * V) Piece {
  float k[V];
};

template <int XT, int WT, int RX, int RW, int WL, int KB, int S, int V, int D, int kBlocks>
__global__ void __launch_bounds__(StreamShape<XT, WT, RX, RW, WL, KB, S>::kThreads, kBlocks)
    stream_fp32(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap w_map,
                const __grid_constant__ GpuMatmulArgs p) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  using Shape = StreamShape<XT, WT, RX, RW, WL, KB, S>;
  constexpr int kLanesX = Shape::kLanesX;
  extern __shared__ char raw[];
  __shared__ __align__(8) uint64_t full[S];
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
    for (int s = 0; s < S; s++) barrier_init(shared_address(&full[s]), 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    for (int c = 0; c < S && c < chunks; c++) ask(c);
  }
  __syncthreads();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, x_lane = lane / WL, w_lane = lane % WL;
  const int x_at = warp % Shape::kWarpsX * RX * kLanesX + x_lane, w_at = warp / Shape::kWarpsX * RW * WL + w_lane;
  float sums[RX][RW] = {};
  for (int c = 0; c < chunks; c++) {
    const int s = c % S;
    barrier_wait(shared_address(&full[s]), (c / S) & 1);
    const char* const xs = stages + s * Shape::kStage;
    const char* const ws = xs + KB * Shape::kRowsX * kBoxRowBytes;
    // From the k-th of box `box` on: row x_at + i * kLanesX, and column w_at + j * WL.
    const auto x_here = [&](int box, int i, int k) {
      const int row = x_at + i * kLanesX;
      return xs + (box * Shape::kRowsX + row) * kBoxRowBytes + ((k / 4 ^ (row & 7)) << 4) + k % 4 * 4;
    };
    const auto w_here = [&](int box, int j, int k) {
      return ws + (box * WT + w_at + j * WL) * kBoxRowBytes + ((k / 4 ^ (w_at & 7)) << 4) + k % 4 * 4;
    };
    const int64_t left = p.k - static_cast<int64_t>(c) * Shape::kK;
    if (left >= Shape::kK) {
      if constexpr (D == 1) {
#pragma unroll 1
        for (int box = 0; box < KB; box++) {
#pragma unroll
          for (int t = 0; t < 32 / V; t++) {
            Piece<V> a[RX];
#pragma unroll
            for (int i = 0; i < RX; i++) a[i] = *reinterpret_cast<const Piece<V>*>(x_here(box, i, t * V));
#pragma unroll
            for (int j = 0; j < RW; j++) {
              const Piece<V> b = *reinterpret_cast<const Piece<V>*>(w_here(box, j, t * V));
#pragma unroll
              for (int k = 0; k < V; k++)
#pragma unroll
                for (int i = 0; i < RX; i++) sums[i][j] = __fmaf_rn(a[i].k[k], b.k[k], sums[i][j]);
            }
          }
        }
      } else {
        Piece<V> a[D][RX], b[D][RW];
        const auto fetch = [&](int slot, int box, int t) {
#pragma unroll
          for (int i = 0; i < RX; i++) a[slot][i] = *reinterpret_cast<const Piece<V>*>(x_here(box, i, t * V));
#pragma unroll
          for (int j = 0; j < RW; j++) b[slot][j] = *reinterpret_cast<const Piece<V>*>(w_here(box, j, t * V));
        };
        constexpr int kPieces = 32 / V;
#pragma unroll
        for (int t = 0; t < D - 1; t++) fetch(t, 0, t);
#pragma unroll 1
        for (int box = 0; box < KB; box++) {
#pragma unroll
          for (int t = 0; t < kPieces; t++) {
            const int ahead = t + D - 1;
            if (ahead < kPieces) fetch(ahead % D, box, ahead);
            else if (box + 1 < KB) fetch(ahead % D, box + 1, ahead - kPieces);
#pragma unroll
            for (int k = 0; k < V; k++)
#pragma unroll
              for (int j = 0; j < RW; j++)
#pragma unroll
                for (int i = 0; i < RX; i++) sums[i][j] = __fmaf_rn(a[t % D][i].k[k], b[t % D][j].k[k], sums[i][j]);
          }
        }
      }
    } else {  // no term past the end: +0 * +0 would turn a sum of -0 into +0
      for (int k = 0; k < left; k++)
#pragma unroll
        for (int j = 0; j < RW; j++)
#pragma unroll
          for (int i = 0; i < RX; i++)
            sums[i][j] = __fmaf_rn(*reinterpret_cast<const float*>(x_here(k / 32, i, k % 32)),
                                   *reinterpret_cast<const float*>(w_here(k / 32, j, k % 32)), sums[i][j]);
    }
    __syncthreads();
    if (threadIdx.x == 0 && c + S < chunks) ask(c + S);
  }
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
