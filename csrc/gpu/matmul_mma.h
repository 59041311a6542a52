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

// Element `at` of a tensor of T's storage type.
template <class T> static __device__ __forceinline__ float element(const void* base, int64_t at) {
  if constexpr (T::kBytes == 4) return static_cast<const float*>(base)[at];
  else return T::get(static_cast<const uint16_t*>(base)[at], 0);
}

// alpha, then beta * c, as they are rounded before the last rounding.
template <class T>
static __device__ __forceinline__ float finish_sum(const GpuMatmulArgs& p, int64_t batch, int64_t m, int64_t n, float sum) {
  if (p.alpha != 1.0f) sum = __fmul_rn(sum, p.alpha);
  if (p.c != nullptr) {
    float added = element<T>(p.c, batch * p.c_b + m * p.c_m + n * p.c_n);
    if (p.beta != 1.0f) added = __fmul_rn(p.beta, added);
    sum = __fadd_rn(sum, added);
  }
  return sum;
}

template <class T>
static __device__ __forceinline__ void store_sum(const GpuMatmulArgs& p, int64_t batch, int64_t m, int64_t n, float sum) {
  sum = finish_sum<T>(p, batch, m, n, sum);
  const int64_t at = batch * p.out_b + m * p.out_m + n * p.out_n;
  if constexpr (T::kBytes == 4) {
    const float one[1] = {sum};
    static_cast<uint32_t*>(p.out)[at] = T::put(one);
  } else {
    const float pair[2] = {sum, sum};
    static_cast<uint16_t*>(p.out)[at] = static_cast<uint16_t>(T::put(pair));
  }
}

// --- copies from global to shared memory that run on their own ---

static __device__ __forceinline__ void copy_16(uint32_t to, const void* from, bool here) {  // zeros where it is not here
  const int bytes = here ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
static __device__ __forceinline__ void copy_4(uint32_t to, const void* from, bool here) {
  const int bytes = here ? 4 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
static __device__ __forceinline__ void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kOpen> static __device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kOpen) : "memory");
}

}  // namespace gpu
}  // namespace detinfer
