// fp32 on the FMA units, as in matmul_stream.h, for blocks whose chains must not wait: XT rows of x and WT columns of the
// result, RX x RW of them a thread's. A stage is KB boxes of 32 of k, which one copy for each operand brings; a warp of its
// own asks for it. A thread loads D - 1 pieces of 4 of k ahead, over the end of a stage too; U pieces are a turn of the loop.
//
// Shared memory hands a warp one register in a cycle, and two where lanes l and l ^ 1, or l and l ^ 2, ask for the same
// everywhere (NVIDIA, forums.developer.nvidia.com/t/unexpected-shared-memory-bank-conflict/77228): so the lowest bit of a lane
// tells rows apart and the next one columns. No choice here changes a bit.
#pragma once

#include "matmul_tma.h"

namespace detinfer {
namespace gpu {

template <int XT, int WT, int RX, int RW, int KB, int S> struct ChainShape {
  static constexpr int kWarpsX = XT / (RX * 4), kWarpsW = WT / (RW * 8), kWarps = kWarpsX * kWarpsW;  // 4 x 8 lanes
  static constexpr bool kFeeder = kWarps < 8;  // a ninth warp would cost the others registers
  static constexpr int kThreads = (kWarps + kFeeder) * 32;
  static constexpr int kRowsX = XT < 8 ? 8 : XT;  // a box begins where the swizzle does
  static constexpr int kBoxX = kRowsX * kBoxRowBytes, kBoxW = WT * kBoxRowBytes, kStage = (kBoxX + kBoxW) * KB;
  static constexpr int kApartX = 4 * kWarpsX;  // rows of a thread; all are swizzled alike
  static constexpr int kSharedBytes = (kStage + 16) * S + 1024;
  static_assert(kWarpsX * RX * 4 == XT && kWarpsW * RW * 8 == WT, "warps cover the block");
  static_assert(kRowsX % 8 == 0 && (RX == 1 || kApartX % 8 == 0), "the swizzle has a period of 8 rows");
  static_assert(kSharedBytes <= 227 * 1024, "a block has 227 KiB of shared memory");
};

template <int XT, int WT, int RX, int RW, int KB, int S, int U, int D, int kBlocks>
__global__ void __launch_bounds__(ChainShape<XT, WT, RX, RW, KB, S>::kThreads, kBlocks)
    chains_fp32(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap w_map,
                const __grid_constant__ GpuMatmulArgs p) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  using Shape = ChainShape<XT, WT, RX, RW, KB, S>;
  constexpr int kPieces = 8;  // of a box
  static_assert((kPieces % U == 0 || U % kPieces == 0) && KB * kPieces % U == 0, "turns fill a stage");
  static_assert(D >= 2 && U % D == 0, "a turn begins with the first of the pieces that a thread holds");
  extern __shared__ char raw[];
  char* const stages = raw + ((1024 - (shared_address(raw) & 1023)) & 1023);
  const uint32_t base = shared_address(stages), full = base + S * Shape::kStage, empty = full + S * 8;
  const int64_t x_tiles = (p.m + XT - 1) / XT;
  const int x_row = static_cast<int>(blockIdx.x % x_tiles) * XT, w_row = static_cast<int>(blockIdx.x / x_tiles) * WT;
  const int boxes = static_cast<int>(p.k / 32), chunks = (boxes + KB - 1) / KB, lane = threadIdx.x % 32;
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);  // tells the compiler that a warp branches as one
  if (threadIdx.x == 0) {
    for (int s = 0; s < S; s++) {
      barrier_init(full + s * 8, 1);
      barrier_init(empty + s * 8, Shape::kWarps);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  const auto ask = [&](int c) {  // once all have read what is there
    const uint32_t arrived = full + c % S * 8, stage = base + c % S * Shape::kStage;
    if (c >= S) barrier_wait(empty + c % S * 8, (c / S - 1) & 1);
    barrier_expect(arrived, Shape::kStage);
    copy_boxes(stage, &x_map, x_row, c * KB, arrived);
    copy_boxes(stage + KB * Shape::kBoxX, &w_map, w_row, c * KB, arrived);
  };
  if constexpr (Shape::kFeeder) {
    if (warp == Shape::kWarps) {
      for (int c = 0; lane == 0 && c < chunks; c++) ask(c);
      return;
    }
  } else {
    for (int c = 0; threadIdx.x == 0 && c < S && c < chunks; c++) ask(c);
  }
  const int x_at = warp % Shape::kWarpsX * 4 + (lane & 1) + (lane >> 4) * 2;
  const int w_at = warp / Shape::kWarpsX * RW * 8 + (lane >> 1 & 7);
  const uint32_t x_swizzled = x_at * kBoxRowBytes + ((x_at & 7) << 4);
  const uint32_t w_swizzled = KB * Shape::kBoxX + w_at * kBoxRowBytes + ((w_at & 7) << 4);
  float sums[RX][RW] = {};
  float4 a[D][RX] = {}, b[D][RW] = {};  // what is not loaded yet adds +0 * +0 to +0, which is +0
  // The t-th piece from (xs, ws) on: rows x_at + i * kApartX, and columns w_at + j * 8.
  const auto fetch = [&](int slot, uint32_t xs, uint32_t ws, int t) {
    const uint32_t x_here = (xs ^ t % kPieces << 4) + t / kPieces * Shape::kBoxX;
    const uint32_t w_here = (ws ^ t % kPieces << 4) + t / kPieces * Shape::kBoxW;
#pragma unroll
    for (int i = 0; i < RX; i++) a[slot][i] = read_16(x_here + i * Shape::kApartX * kBoxRowBytes);
#pragma unroll
    for (int j = 0; j < RW; j++) b[slot][j] = read_16(w_here + j * 8 * kBoxRowBytes);
  };
  const auto chain = [&](const float4 (&x)[RX], const float4 (&w)[RW]) {
#pragma unroll
    for (int j = 0; j < RW; j++) {
#pragma unroll
      for (int i = 0; i < RX; i++) sums[i][j] = __fmaf_rn(x[i].x, w[j].x, sums[i][j]);
#pragma unroll
      for (int i = 0; i < RX; i++) sums[i][j] = __fmaf_rn(x[i].y, w[j].y, sums[i][j]);
#pragma unroll
      for (int i = 0; i < RX; i++) sums[i][j] = __fmaf_rn(x[i].z, w[j].z, sums[i][j]);
#pragma unroll
      for (int i = 0; i < RX; i++) sums[i][j] = __fmaf_rn(x[i].w, w[j].w, sums[i][j]);
    }
  };
  constexpr int kBoxes = U < kPieces ? 1 : U / kPieces;  // that a turn ends
  const int turns = U < kPieces ? boxes * (kPieces / U) : boxes / kBoxes;
  uint32_t x_box = base + x_swizzled, w_box = base + w_swizzled, first = 0;  // the box, and where in it a turn begins
  int s = 0, phase = 0, chunk = 0, box = 0;
  if (chunks > 0) barrier_wait(full, 0);
#pragma unroll 1
  for (int turn = 0; turn < turns; turn++) {
    const bool begins = box == 0 && first == 0;
    const uint32_t next_first = (first + U * 16) % kBoxRowBytes;
    const int next_box = box + (next_first == 0 ? kBoxes : 0);
    const int next_s = s + 1 == S ? 0 : s + 1, next_phase = next_s == 0 ? phase ^ 1 : phase;
    bool there = false;
#pragma unroll
    for (int t = 0; t < U; t++) {
      fetch(t % D, x_box ^ first, w_box ^ first, t);
      if (t == U - 1) there = barrier_done(full + next_s * 8, next_phase);  // asked before it has to be known
      chain(a[(t + 1) % D], b[(t + 1) % D]);
      if (t == D - 2) {  // all of the stage before was used
        __syncwarp();
        barrier_arrive_if(lane == 0 && begins && chunk > 0, empty + (s == 0 ? S - 1 : s - 1) * 8);
      }
    }
    if constexpr (!Shape::kFeeder)  // for a stage that the others have left as well by now
      if (threadIdx.x == 0 && begins && chunk >= 2 && chunk + S - 2 < chunks) ask(chunk + S - 2);
    const bool ends = next_box == KB;
    first = next_first;
    box = ends ? 0 : next_box;
    x_box = ends ? base + next_s * Shape::kStage + x_swizzled : x_box + (next_first == 0 ? kBoxes * Shape::kBoxX : 0);
    w_box = ends ? base + next_s * Shape::kStage + w_swizzled : w_box + (next_first == 0 ? kBoxes * Shape::kBoxW : 0);
    s = ends ? next_s : s, phase = ends ? next_phase : phase, chunk += ends;
    if (ends && !there && chunk < chunks) barrier_wait(full + s * 8, phase);
  }
#pragma unroll
  for (int t = 1; t < D; t++) chain(a[t], b[t]);
  if constexpr (kBoxes > 1) {
#pragma unroll 1
    for (int i = 0; i < boxes % kBoxes; i++)
#pragma unroll
      for (int t = 0; t < kPieces; t++) {
        fetch(0, x_box + i * Shape::kBoxX, w_box + i * Shape::kBoxW, t);
        chain(a[0], b[0]);
      }
  }
  const auto row = [&](int i) { return static_cast<int64_t>(x_row) + x_at + i * Shape::kApartX; };
  const auto column = [&](int j) { return static_cast<int64_t>(w_row) + w_at + j * 8; };
#pragma unroll 1
  for (int64_t k = static_cast<int64_t>(boxes) * 32; k < p.k; k++) {  // fewer than 32 are left, and read where they lie
#pragma unroll
    for (int i = 0; i < RX; i++) a[0][i].x = row(i) < p.m ? static_cast<const float*>(p.x)[row(i) * p.x_m + k] : 0.0f;
#pragma unroll
    for (int j = 0; j < RW; j++) b[0][j].x = column(j) < p.n ? static_cast<const float*>(p.w)[column(j) * p.w_n + k] : 0.0f;
#pragma unroll
    for (int j = 0; j < RW; j++)
#pragma unroll
      for (int i = 0; i < RX; i++) sums[i][j] = __fmaf_rn(a[0][i].x, b[0][j].x, sums[i][j]);
  }
#pragma unroll
  for (int i = 0; i < RX; i++)
#pragma unroll
    for (int j = 0; j < RW; j++)
      if (row(i) < p.m && column(j) < p.n) store_sum<Float32>(p, 0, row(i), column(j), sums[i][j]);
#endif
}

}  // namespace gpu
}  // namespace detinfer
