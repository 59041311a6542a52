// Few rows of x times a weight matrix that is read once. A block has 16 weight rows for each of RW warps; TW warps share
// them, each for NT tiles of 8 tokens. One thread asks the tensor memory accelerator for chunks of KC columns of both
// operands, S chunks ahead; the warps walk k in ascending steps of 16.
//
// The weights are the 16-row side of the instruction and the tokens its 8-column side: an output is one accumulator
// whatever stands beside it, so neither the number of tokens nor the block's shape changes a bit. Past the end of k the
// chunks are filled with zeros, whose products change no sum that began at +0.
#pragma once

#include "matmul_mma.h"
#include "matmul_tma.h"

namespace detinfer {
namespace gpu {

constexpr int kBoxColumns = kBoxRowBytes / 2;

template <int RW, int TW, int NT, int S, int KC> struct SkinnyShape {
  static constexpr int kRows = RW * 16, kTokens = TW * NT * 8, kBoxes = KC / kBoxColumns;
  static constexpr int kStage = (kRows + kTokens) * KC * 2;
  static constexpr int kThreads = (RW * TW + 1) * 32;
  static constexpr int kSharedBytes = kStage * S + 1024;  // the swizzle counts from a multiple of 1024
  static_assert(kSharedBytes <= 227 * 1024, "a block has 227 KiB of shared memory");
  static_assert(kTokens * (kRows + 1) * 4 <= kStage * S, "the sums are handed over in the same memory");
};

template <class T, int RW, int TW, int NT, int S, int KC>
__global__ void __launch_bounds__(SkinnyShape<RW, TW, NT, S, KC>::kThreads)
    skinny(const __grid_constant__ CUtensorMap weights, const __grid_constant__ CUtensorMap tokens,
           const __grid_constant__ GpuMatmulArgs p) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900  // the memory accelerator came with sm_90; matmul.cu asks before it launches
  using Shape = SkinnyShape<RW, TW, NT, S, KC>;
  constexpr int kRows = Shape::kRows, kTokens = Shape::kTokens, kBoxes = Shape::kBoxes;
  extern __shared__ char raw[];
  __shared__ __align__(8) uint64_t full[S], empty[S];
  char* const stages = raw + ((1024 - (shared_address(raw) & 1023)) & 1023);
  const uint32_t base = shared_address(stages);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first_row = blockIdx.x * kRows, first_token = blockIdx.y * kTokens;
  const int chunks = static_cast<int>((p.k + KC - 1) / KC);
  if (threadIdx.x == 0) {
    for (int s = 0; s < S; s++) {
      barrier_init(shared_address(&full[s]), 1);
      barrier_init(shared_address(&empty[s]), RW * TW);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  float sums[NT][4] = {};
  const int row_warp = warp % RW, token_warp = warp / RW;
  if (warp == RW * TW) {
    if (lane == 0) {
      for (int c = 0; c < chunks; c++) {
        const int s = c % S;
        if (c >= S) barrier_wait(shared_address(&empty[s]), (c / S - 1) & 1);
        const uint32_t arrived = shared_address(&full[s]), stage = base + s * Shape::kStage;
        barrier_expect(arrived, Shape::kStage);
#pragma unroll
        for (int i = 0; i < kBoxes; i++) {
          const int k = c * KC + i * kBoxColumns;
          copy_box(stage + i * kRows * kBoxRowBytes, &weights, k, first_row, arrived);
          copy_box(stage + (kBoxes * kRows + i * kTokens) * kBoxRowBytes, &tokens, k, first_token, arrived);
        }
      }
    }
  } else {
    // Row r of a box keeps its 16-byte piece q at place q ^ (r & 7).
    const int swizzle = lane & 7;
    const uint32_t a_at = base + (row_warp * 16 + (lane & 15)) * kBoxRowBytes;
    const uint32_t b_at = base + (kBoxes * kRows + token_warp * NT * 8 + (lane & 7)) * kBoxRowBytes;
    constexpr int kSteps = KC / 32;
    static_assert(kSteps % 2 == 0, "a chunk begins with the first of the two buffers");
    uint32_t low[2][4], high[2][4], other[2][NT][4];  // k to k + 15, k + 16 to k + 31; the next 32 are on their way
    const auto load = [&](int i, int stage, int step) {
      const uint32_t a_box = a_at + stage * Shape::kStage + step / 2 * kRows * kBoxRowBytes;
      const uint32_t b_box = b_at + stage * Shape::kStage + step / 2 * kTokens * kBoxRowBytes;
      const int piece = (step & 1) * 4;
      load_matrices(low[i], a_box + (((piece + (lane >> 4)) ^ swizzle) << 4));
      load_matrices(high[i], a_box + (((piece + 2 + (lane >> 4)) ^ swizzle) << 4));
#pragma unroll
      for (int t = 0; t < NT; t++)
        load_matrices(other[i][t], b_box + t * 8 * kBoxRowBytes + (((piece + (lane >> 3)) ^ swizzle) << 4));
    };
    barrier_wait(shared_address(&full[0]), 0);
    load(0, 0, 0);
    for (int c = 0; c < chunks; c++) {
      const int s = c % S;
#pragma unroll
      for (int step = 0; step < kSteps; step++) {
        const int i = step & 1;
        if (step + 1 < kSteps) {
          load(1 - i, s, step + 1);
        } else if (c + 1 < chunks) {  // the next chunk's first pieces, before the last products of this one
          const int next = (c + 1) % S;
          barrier_wait(shared_address(&full[next]), ((c + 1) / S) & 1);
          load(1 - i, next, 0);
        }
#pragma unroll
        for (int t = 0; t < NT; t++) multiply_add<T>(sums[t], low[i], other[i][t][0], other[i][t][1]);
#pragma unroll
        for (int t = 0; t < NT; t++) multiply_add<T>(sums[t], high[i], other[i][t][2], other[i][t][3]);
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(shared_address(&empty[s]));
    }
  }
  __syncthreads();  // every chunk was read: the memory is free for the sums, [token][row]
  float* const handed = reinterpret_cast<float*>(stages);
  if (warp < RW * TW) {
#pragma unroll
    for (int t = 0; t < NT; t++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        handed[((token_warp * NT + t) * 8 + sum_column(lane, i)) * (kRows + 1) + row_warp * 16 + sum_row(lane, i)] = sums[t][i];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kTokens * kRows; i += Shape::kThreads) {
    const int token = i / kRows, row = i % kRows;
    if (first_token + token < p.m && first_row + row < p.n)
      store_sum<T>(p, 0, first_token + token, first_row + row, handed[token * (kRows + 1) + row]);
  }
#endif
}

}  // namespace gpu
}  // namespace detinfer
