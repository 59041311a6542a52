// Products of many experts in one launch: a block has XT assignments of one expert and WT columns, XW x WW warps.
//
// The rows of x are taken where they lie, by their assignment. As in matmul_tile.h both operands pass through shared memory
// in chunks of 64 of k, S chunks deep, and an output is one accumulator whatever stands beside it. Weights that are
// contiguous along their columns (kAcross) lie in shared memory as they do in memory and are turned on the way to registers.
#pragma once

#include "../moe_gpu.h"
#include "matmul_tile.h"

namespace detinfer {
namespace gpu {

static __device__ __forceinline__ void load_turned(uint32_t (&words)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3]) : "r"(at) : "memory");
}

// 64 of k from k0 and WT columns from n0 of weights whose columns are contiguous; what lies outside is +0.
template <int WT, int kThreads>
static __device__ __forceinline__ void load_across(const TileSource& from, int64_t n0, int64_t k0, uint32_t to, char* memory) {
  constexpr int kPieces = WT / 8;
  static_assert(kPieces >= 8, "a row of shared memory has 128 bytes or more");
  for (int i = threadIdx.x; i < kTileK * kPieces; i += kThreads) {
    const int row = i / kPieces, piece = i % kPieces;
    const int64_t k = k0 + row, n = n0 + piece * 8;
    const int at = row * WT * 2 + ((piece ^ (row & 7)) << 4);
    if (from.vectors) {
      const bool here = k < from.depth && n < from.rows;
      copy_16(to + at, from.base + (here ? k * from.k_stride + n : 0), here);
      continue;
    }
    alignas(16) uint16_t values[8];
#pragma unroll
    for (int j = 0; j < 8; j++)
      values[j] = k < from.depth && n + j < from.rows ? from.base[k * from.k_stride + (n + j) * from.row_stride] : 0;
    *reinterpret_cast<uint4*>(memory + at) = *reinterpret_cast<const uint4*>(values);
  }
}

// The rows of x of the block's assignments, 64 of k from k0; a row of -1 is +0.
template <int XT, int kThreads>
static __device__ __forceinline__ void load_rows(const GpuMoeProduct& p, const int (&rows)[XT], bool vectors, int64_t k0,
                                                 uint32_t to, char* memory) {
  const uint16_t* const x = static_cast<const uint16_t*>(p.x);
  for (int i = threadIdx.x; i < XT * 8; i += kThreads) {
    const int r = i / 8, piece = i % 8, row = rows[r];
    const int64_t k = k0 + piece * 8;
    const int at = r * 128 + ((piece ^ (r & 7)) << 4);
    if (vectors) {
      const bool here = row >= 0 && k < p.k;
      copy_16(to + at, x + (here ? row * p.x_row + k : 0), here);
      continue;
    }
    alignas(16) uint16_t values[8];
#pragma unroll
    for (int j = 0; j < 8; j++) values[j] = row >= 0 && k + j < p.k ? x[row * p.x_row + k + j] : 0;
    *reinterpret_cast<uint4*>(memory + at) = *reinterpret_cast<const uint4*>(values);
  }
}

// The bias, and the store of columns n and n + 1 of an assignment.
template <class T>
static __device__ __forceinline__ void store_pair(const GpuMoeProduct& p, int64_t expert, int64_t a, int64_t n, float (&pair)[2]) {
  const int count = n + 1 < p.n ? 2 : 1;
  for (int e = 0; e < count; e++)
    if (p.bias != nullptr) pair[e] = __fadd_rn(pair[e], element<T>(p.bias, expert * p.bias_expert + n + e));
  const int64_t at = a * p.n + n;
  if (p.unrounded != 0) {
    float* const out = static_cast<float*>(p.out) + at;
    if (p.n % 2 == 0) *reinterpret_cast<uint2*>(out) = make_uint2(to_float32(pair[0]), to_float32(pair[1]));
    else for (int e = 0; e < count; e++) reinterpret_cast<uint32_t*>(out)[e] = to_float32(pair[e]);
    return;
  }
  uint16_t* const out = static_cast<uint16_t*>(p.out) + at;
  const uint32_t word = T::put(pair);
  if (p.n % 2 == 0) *reinterpret_cast<uint32_t*>(out) = word;
  else for (int e = 0; e < count; e++) out[e] = static_cast<uint16_t>(word >> 16 * e);
}

template <int XT, int WT, int XW, int WW, int S> struct MoeShape {
  static constexpr int kThreads = XW * WW * 32, kStage = (XT + WT) * kTileK * 2, kSharedBytes = kStage * S;
  static_assert(XT / XW % 16 == 0 && WT / WW % 16 == 0 && kSharedBytes <= 227 * 1024, "whole instructions, one block at least");
};

template <class T, int XT, int WT, int XW, int WW, int S, bool kAcross>
__global__ void __launch_bounds__(MoeShape<XT, WT, XW, WW, S>::kThreads) moe_tile(const __grid_constant__ GpuMoeProduct p) {
  using Shape = MoeShape<XT, WT, XW, WW, S>;
  constexpr int kX = XT / XW / 16, kW = WT / WW / 8;
  extern __shared__ __align__(128) char memory[];
  __shared__ int assignments[XT], rows[XT];
  int64_t expert = 0, first = static_cast<int64_t>(blockIdx.x) * XT, end = p.assignments;
  if (p.tiles != nullptr) {
    if (static_cast<int>(blockIdx.x) >= p.tiles[0]) return;
    const int32_t* const tile = p.tiles + 1 + 3 * blockIdx.x;
    expert = tile[0], first = tile[1], end = tile[2];
  }
  for (int i = threadIdx.x; i < XT; i += Shape::kThreads) {
    const bool here = first + i < end;
    const int a = !here ? -1 : p.order != nullptr ? p.order[first + i] : static_cast<int>(first + i);
    assignments[i] = a;
    rows[i] = here ? static_cast<int>(a / p.places) : -1;
  }
  __syncthreads();
  const uint32_t base = shared_address(memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t n0 = static_cast<int64_t>(blockIdx.y) * WT;
  const uint16_t* const w = static_cast<const uint16_t*>(p.w) + expert * p.w_expert;
  const bool x_vectors = p.k % 8 == 0 && p.x_row % 8 == 0 && reinterpret_cast<uintptr_t>(p.x) % 16 == 0;
  const bool w_aligned = reinterpret_cast<uintptr_t>(w) % 16 == 0 && (kAcross ? p.w_k : p.w_n) % 8 == 0;
  const bool w_vectors = w_aligned && (kAcross ? p.w_n == 1 && p.n % 8 == 0 : p.w_k == 1 && p.k % 8 == 0);
  const TileSource from{w, p.n, p.k, p.w_n, p.w_k, w_vectors};
  const int chunks = static_cast<int>((p.k + kTileK - 1) / kTileK);
  const auto load = [&](int c) {
    const int at = c % S * Shape::kStage;
    const int64_t k0 = static_cast<int64_t>(c) * kTileK;
    load_rows<XT, Shape::kThreads>(p, rows, x_vectors, k0, base + at, memory + at);
    if constexpr (kAcross) load_across<WT, Shape::kThreads>(from, n0, k0, base + at + XT * 128, memory + at + XT * 128);
    else load_tile<WT, Shape::kThreads>(from, n0, k0, base + at + XT * 128, memory + at + XT * 128);
  };
  float sums[kX][kW][4] = {};
  for (int c = 0; c < S - 1; c++) {
    if (c < chunks) load(c);
    close_copies();
  }
  const int x_at = warp % XW * (XT / XW), w_at = warp / XW * (WT / WW);
  for (int c = 0; c < chunks; c++) {
    wait_copies<S - 2>();
    __syncthreads();  // chunk c is here, and chunk c - 1 was read by all
    if (c + S - 1 < chunks) load(c + S - 1);
    close_copies();
    const uint32_t stage = base + c % S * Shape::kStage, weights = stage + XT * 128;
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
        if constexpr (kAcross) {
          const int r = step * 16 + (lane & 7) + (lane >> 3 & 1) * 8, piece = (w_at + j * 16) / 8 + (lane >> 4);
          load_turned(b[j], weights + r * WT * 2 + ((piece ^ (r & 7)) << 4));
        } else {
          const int r = w_at + j * 16 + (lane & 7) + (lane >> 4) * 8, piece = step * 2 + (lane >> 3 & 1);
          load_matrices(b[j], weights + r * 128 + ((piece ^ (r & 7)) << 4));
        }
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
    for (int half = 0; half < 2; half++) {
      const int a = assignments[x_at + i * 16 + lane / 4 + half * 8];
      if (a < 0) continue;
#pragma unroll
      for (int j = 0; j < kW; j++) {
        const int64_t n = n0 + w_at + j * 8 + lane % 4 * 2;
        float pair[2] = {sums[i][j][half * 2], sums[i][j][half * 2 + 1]};
        if (n < p.n) store_pair<T>(p, expert, a, n, pair);
      }
    }
}

}  // namespace gpu
}  // namespace detinfer
