// The tensor memory accelerator: boxes of rows of 128 bytes into shared memory, and the barriers that say when they are there.
#pragma once

#include <cuda.h>

#include "matmul_mma.h"

namespace detinfer {
namespace gpu {

constexpr int kBoxRowBytes = 128;  // the widest box that the 128-byte swizzle takes: row r keeps its 16-byte piece q at q ^ (r & 7)

static __device__ __forceinline__ void barrier_init(uint32_t at, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(at), "r"(arrivals) : "memory");
}
static __device__ __forceinline__ void barrier_expect(uint32_t at, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
}
static __device__ __forceinline__ void barrier_arrive(uint32_t at) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(at) : "memory");
}
static __device__ __forceinline__ void barrier_wait(uint32_t at, int parity) {
  uint32_t done = 0;
  while (done == 0)
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done) : "r"(at), "r"(parity) : "memory");
}
static __device__ __forceinline__ bool barrier_done(uint32_t at, int parity) {  // does not wait
  uint32_t done;
  asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
               : "=r"(done) : "r"(at), "r"(parity) : "memory");
  return done != 0;
}
static __device__ __forceinline__ void barrier_arrive_if(bool here, uint32_t at) {  // without a branch
  asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %1, 0;\n@p mbarrier.arrive.shared.b64 _, [%0];\n}"
               ::"r"(at), "r"(static_cast<uint32_t>(here)) : "memory");
}
static __device__ __forceinline__ float4 read_16(uint32_t at) {
  float4 found;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(found.x), "=f"(found.y), "=f"(found.z), "=f"(found.w) : "r"(at) : "memory");
  return found;
}
// A box of 64 columns from (k, row); what lies outside the tensor arrives as zeros.
static __device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap* map, int k, int row, uint32_t barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
               ::"r"(to), "l"(map), "r"(k), "r"(row), "r"(barrier) : "memory");
}

// Boxes of 128 bytes of k from (row, box), one after the other, of a map by describe_boxes.
static __device__ __forceinline__ void copy_boxes(uint32_t to, const CUtensorMap* map, int row, int box, uint32_t barrier) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];"
               ::"r"(to), "l"(map), "r"(0), "r"(row), "r"(box), "r"(barrier) : "memory");
}

// --- host ---

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                            const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver's own function: the library is linked to the runtime alone.
static inline Encode encoder() {
  static const Encode found = [] {
    void* at = nullptr;
    cudaDriverEntryPointQueryResult answer;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &at, 12000, cudaEnableDefault, &answer) != cudaSuccess)
      at = nullptr;
    return reinterpret_cast<Encode>(at);
  }();
  return found;
}

// [rows][k] of elements of T, taken in boxes of box_rows x 128 bytes.
template <class T>
static inline bool describe(CUtensorMap* map, const void* at, int64_t rows, int64_t k, int64_t row_stride, int box_rows) {
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(k), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>((rows == 1 ? k : row_stride) * T::kBytes)};
  const cuuint32_t box[2] = {kBoxRowBytes / T::kBytes, static_cast<cuuint32_t>(box_rows)}, steps[2] = {1, 1};
  const CUtensorMapDataType type = std::is_same_v<T, Float32>   ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                   : std::is_same_v<T, Float16> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                                : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  return encoder() != nullptr &&
         encoder()(map, type, 2, const_cast<void*>(at), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                   CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                   CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// The same as [k / 32][rows][32] of fp32, taken in box_count boxes of box_rows x 128 bytes; what is left of k is not in it.
static inline bool describe_boxes(CUtensorMap* map, const void* at, int64_t rows, int64_t k, int64_t row_stride, int box_rows,
                                  int box_count) {
  const cuuint64_t sizes[3] = {32, static_cast<cuuint64_t>(rows), static_cast<cuuint64_t>(k < 32 ? 1 : k / 32)};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>((rows == 1 ? k : row_stride) * 4), kBoxRowBytes};
  const cuuint32_t box[3] = {32, static_cast<cuuint32_t>(box_rows), static_cast<cuuint32_t>(box_count)}, steps[3] = {1, 1, 1};
  return encoder() != nullptr &&
         encoder()(map, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 3, const_cast<void*>(at), sizes, strides, box, steps,
                   CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                   CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// Whether this device has it, and the shared memory that blocks here take (compute capability 9 and 10 do, 12 does not), and
// these operands suit it.
static inline bool accelerates(const GpuMatmulArgs& p, int64_t elements_of_16_bytes) {
  static const bool has = [] {
    int device = 0, major = 0, shared = 0;
    return cudaGetDevice(&device) == cudaSuccess &&
           cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major >= 9 &&
           cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == cudaSuccess && shared >= 227 << 10;
  }();
  const auto aligned = [](const void* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; };
  return has && p.batch == 1 && p.x_k == 1 && p.w_k == 1 && (p.m == 1 || p.x_m % elements_of_16_bytes == 0) &&
         (p.n == 1 || p.w_n % elements_of_16_bytes == 0) && p.k % elements_of_16_bytes == 0 && aligned(p.x) && aligned(p.w);
}

}  // namespace gpu
}  // namespace detinfer
