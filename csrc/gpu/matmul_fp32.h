// fp32 on the FMA units: each output is one chain of FMAs, k ascending from +0: the bits of the CPU's kernel. A block has
// XT rows of x and WT columns of the result; a thread has RX x RW of them, so that an element in shared memory serves
// several chains. KC of k are one chunk, S chunks on their way.
#pragma once

#include "matmul_mma.h"

namespace detinfer {
namespace gpu {

template <int XT, int WT, int RX, int RW, int KC, int S> struct Fp32Shape {
  static constexpr int kThreads = (XT / RX) * (WT / RW);
  static constexpr int kRow = KC + 4;  // floats: 8 rows one after the other lie in different banks
  static constexpr int kStage = (XT + WT) * kRow * 4;
  static constexpr int kSharedBytes = kStage * S;
  static_assert(kSharedBytes <= 227 * 1024, "a block has 227 KiB of shared memory");
};

// R rows from `row`, KC of k from k0.
template <int R, int KC, int kThreads>
static __device__ __forceinline__ void load_fp32(const float* from, int64_t rows, int64_t depth, int64_t row_stride,
                                                 int64_t k_stride, bool vectors, int64_t row, int64_t k0, uint32_t to) {
  constexpr int kRow = KC + 4;
  if (vectors) {
#pragma unroll
    for (int i = threadIdx.x; i < R * (KC / 4); i += kThreads) {
      const int r = i / (KC / 4), k = i % (KC / 4) * 4;
      const bool here = row + r < rows && k0 + k < depth;
      copy_16(to + (r * kRow + k) * 4, from + (here ? (row + r) * row_stride + k0 + k : 0), here);
    }
    return;
  }
  const bool along_k = k_stride <= row_stride;
  for (int i = threadIdx.x; i < R * KC; i += kThreads) {
    const int r = along_k ? i / KC : i % R, k = along_k ? i % KC : i / R;
    const bool here = row + r < rows && k0 + k < depth;
    copy_4(to + (r * kRow + k) * 4, from + (here ? (row + r) * row_stride + (k0 + k) * k_stride : 0), here);
  }
}

template <int XT, int WT, int RX, int RW, int KC, int S>
__global__ void __launch_bounds__(Fp32Shape<XT, WT, RX, RW, KC, S>::kThreads) fp32_tile(const __grid_constant__ GpuMatmulArgs p) {
  using Shape = Fp32Shape<XT, WT, RX, RW, KC, S>;
  constexpr int kRow = Shape::kRow, kXThreads = XT / RX, kWThreads = WT / RW;
  extern __shared__ __align__(128) char memory[];
  const uint32_t base = shared_address(memory);
  const int64_t x_tiles = (p.m + XT - 1) / XT;
  const int64_t x_row = blockIdx.x % x_tiles * XT, w_row = blockIdx.x / x_tiles * WT, batch = blockIdx.z;
  const float* const x = static_cast<const float*>(p.x) + batch * p.x_b;
  const float* const w = static_cast<const float*>(p.w) + batch * p.w_b;
  const auto aligned = [&](const void* at, int64_t row_stride, int64_t k_stride, int64_t rows) {
    return k_stride == 1 && p.k % 4 == 0 && (rows == 1 || row_stride % 4 == 0) && reinterpret_cast<uintptr_t>(at) % 16 == 0;
  };
  const bool x_vectors = aligned(x, p.x_m, p.x_k, p.m), w_vectors = aligned(w, p.w_n, p.w_k, p.n);
  const int chunks = static_cast<int>((p.k + KC - 1) / KC);
  const auto load = [&](int c) {
    const uint32_t at = base + c % S * Shape::kStage;
    const int64_t k0 = static_cast<int64_t>(c) * KC;
    load_fp32<XT, KC, Shape::kThreads>(x, p.m, p.k, p.x_m, p.x_k, x_vectors, x_row, k0, at);
    load_fp32<WT, KC, Shape::kThreads>(w, p.n, p.k, p.w_n, p.w_k, w_vectors, w_row, k0, at + XT * kRow * 4);
  };
  // A thread's rows are kXThreads apart, its columns kWThreads: a warp's accesses then fall into different banks. Lanes go
  // over columns first, in eights where there are so many, so that both operands are shared inside a warp.
  constexpr int kAcross = kWThreads >= 8 && kXThreads >= 4 ? 8 : kWThreads;
  const int inner = threadIdx.x % (kAcross * kXThreads), outer = threadIdx.x / (kAcross * kXThreads);
  const int x_at = inner / kAcross, w_at = outer * kAcross + inner % kAcross;
  float sums[RX][RW] = {};
  for (int c = 0; c < S - 1; c++) {
    if (c < chunks) load(c);
    close_copies();
  }
  for (int c = 0; c < chunks; c++) {
    wait_copies<S - 2>();
    __syncthreads();
    if (c + S - 1 < chunks) load(c + S - 1);
    close_copies();
    const float* const stage = reinterpret_cast<const float*>(memory + c % S * Shape::kStage);
    const float* const xs = stage + x_at * kRow;
    const float* const ws = stage + (XT + w_at) * kRow;
    const int64_t left = p.k - static_cast<int64_t>(c) * KC;
    if (left >= KC) {
#pragma unroll(KC <= 16 ? KC / 4 : 4)
      for (int k = 0; k < KC; k += 4) {
        float4 a[RX];
#pragma unroll
        for (int i = 0; i < RX; i++) a[i] = *reinterpret_cast<const float4*>(xs + i * kXThreads * kRow + k);
#pragma unroll
        for (int j = 0; j < RW; j++) {
          const float4 b = *reinterpret_cast<const float4*>(ws + j * kWThreads * kRow + k);
#pragma unroll
          for (int i = 0; i < RX; i++) sums[i][j] = __fmaf_rn(a[i].x, b.x, sums[i][j]);
#pragma unroll
          for (int i = 0; i < RX; i++) sums[i][j] = __fmaf_rn(a[i].y, b.y, sums[i][j]);
#pragma unroll
          for (int i = 0; i < RX; i++) sums[i][j] = __fmaf_rn(a[i].z, b.z, sums[i][j]);
#pragma unroll
          for (int i = 0; i < RX; i++) sums[i][j] = __fmaf_rn(a[i].w, b.w, sums[i][j]);
        }
      }
    } else {  // no term past the end: +0 * +0 would turn a sum of -0 into +0
      for (int k = 0; k < left; k++)
#pragma unroll
        for (int j = 0; j < RW; j++)
#pragma unroll
          for (int i = 0; i < RX; i++)
            sums[i][j] = __fmaf_rn(xs[i * kXThreads * kRow + k], ws[j * kWThreads * kRow + k], sums[i][j]);
    }
  }
#pragma unroll
  for (int i = 0; i < RX; i++)
#pragma unroll
    for (int j = 0; j < RW; j++) {
      const int64_t m = x_row + x_at + i * kXThreads, n = w_row + w_at + j * kWThreads;
      if (m < p.m && n < p.n) store_sum<Float32>(p, batch, m, n, sums[i][j]);
    }
}

}  // namespace gpu
}  // namespace detinfer
