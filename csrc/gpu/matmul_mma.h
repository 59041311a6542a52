// The matrix instruction m16n8k16, where its operands and sums lie in a warp, and what is done with a finished sum.
#pragma once

#include "../matmul_gpu.h"
#include "values.h"

namespace detinfer {
namespace gpu {

// Four 8 x 8 matrices of 16-bit elements: lane l gives the address of row l % 8 of matrix l / 8.
static __device__ __forceinline__ void load_matrices(uint32_t (&words)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3]) : "r"(at) : "memory");
}

// sums[16 rows of a][8 columns of b] += the products over 16 k.
template <class T>
static __device__ __forceinline__ void multiply_add(float (&sums)[4], const uint32_t (&a)[4], uint32_t b_low, uint32_t b_high) {
  if constexpr (std::is_same_v<T, Float16>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_low), "r"(b_high));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_low), "r"(b_high));
}

// Row of a and column of b of a lane's i-th sum.
static __device__ __forceinline__ int sum_row(int lane, int i) { return lane / 4 + i / 2 * 8; }
static __device__ __forceinline__ int sum_column(int lane, int i) { return lane % 4 * 2 + i % 2; }

// The bias, one rounding, the store.
template <class T>
static __device__ __forceinline__ void store_sum(const GpuMatmulArgs& p, int64_t token, int64_t row, float sum) {
  if (p.bias != nullptr) sum = __fadd_rn(sum, T::get(static_cast<const uint16_t*>(p.bias)[row * p.bias_n], 0));
  const float pair[2] = {sum, sum};
  static_cast<uint16_t*>(p.out)[token * p.out_m + row * p.out_n] = static_cast<uint16_t>(T::put(pair));
}

}  // namespace gpu
}  // namespace detinfer
