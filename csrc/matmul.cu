// The matmul family on NVIDIA GPUs: matmul_gpu.h has the order. NVIDIA alone: AMD's matrix units have other steps of k.
#include <cuda.h>

#include <cstdio>
#include <cstring>
#include <type_traits>

#include "gpu/matmul_skinny.h"

namespace detinfer {
namespace gpu {
namespace {

thread_local char sentence[256] = "";

int refuse(Status status, const char* why) {
  std::strncpy(sentence, why, sizeof(sentence) - 1);
  return status;
}

int checked(Code code, const char* doing) {
  if (code == kNoError) return kOk;
  std::snprintf(sentence, sizeof sentence, "matmul: %s: %s", doing, sentence_of(code));
  return kNotSupported;
}

// Two elements that follow each other in k, as one word of an operand; past the end they are +0.
template <class T>
__device__ uint32_t word_at(const void* base, int64_t row, int64_t rows, int64_t row_stride, int64_t k, int64_t depth, int64_t k_stride) {
  const uint16_t* at = static_cast<const uint16_t*>(base) + row * row_stride + k * k_stride;
  const uint32_t low = row < rows && k < depth ? at[0] : 0;
  const uint32_t high = row < rows && k + 1 < depth ? at[k_stride] : 0;
  return low | high << 16;
}

// One warp for 16 weight rows and 8 tokens; its operands come straight from memory.
template <class T> __global__ void reference(const __grid_constant__ GpuMatmulArgs p) {
  const int lane = threadIdx.x, group = lane / 4, pair = lane % 4 * 2;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * 16, token = static_cast<int64_t>(blockIdx.y) * 8;
  float sums[4] = {};
  for (int64_t k = 0; k < p.k; k += 16) {
    uint32_t a[4], b[2];
    for (int i = 0; i < 4; i++)
      a[i] = word_at<T>(p.w, row + group + i % 2 * 8, p.n, p.w_n, k + pair + i / 2 * 8, p.k, p.w_k);
    for (int i = 0; i < 2; i++) b[i] = word_at<T>(p.x, token + group, p.m, p.x_m, k + pair + i * 8, p.k, p.x_k);
    multiply_add<T>(sums, a, b[0], b[1]);
  }
  for (int i = 0; i < 4; i++) {
    const int64_t r = row + sum_row(lane, i), t = token + sum_column(lane, i);
    if (r < p.n && t < p.m) store_sum<T>(p, t, r, sums[i]);
  }
}

template <class T> int run_reference(const GpuMatmulArgs& p, Stream stream) {
  const dim3 blocks(static_cast<unsigned>((p.n + 15) / 16), static_cast<unsigned>((p.m + 7) / 8));
  if ((p.m + 7) / 8 > 65535) return refuse(kBadArgument, "matmul: more than 524,280 rows of x in one call");
  reference<T><<<blocks, 32, 0, stream>>>(p);
  return checked(last_error(), "launching the reference kernel");
}

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                            const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver's own function: the library is linked to the runtime alone.
Encode encoder() {
  static const Encode found = [] {
    void* at = nullptr;
    cudaDriverEntryPointQueryResult answer;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &at, 12000, cudaEnableDefault, &answer) != cudaSuccess)
      at = nullptr;
    return reinterpret_cast<Encode>(at);
  }();
  return found;
}

// [rows][k] of 16-bit elements, taken in boxes of box_rows x 64.
template <class T> bool describe(CUtensorMap* map, const void* at, int64_t rows, int64_t k, int64_t row_stride, int box_rows) {
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(k), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(rows == 1 ? k * 2 : row_stride * 2)};
  const cuuint32_t box[2] = {kBoxColumns, static_cast<cuuint32_t>(box_rows)}, steps[2] = {1, 1};
  const CUtensorMapDataType type =
      std::is_same_v<T, Float16> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  return encoder() != nullptr &&
         encoder()(map, type, 2, const_cast<void*>(at), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                   CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                   CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

template <class T, int RW, int TW, int NT, int S, int KC> int launch_skinny(const GpuMatmulArgs& p, Stream stream) {
  using Shape = SkinnyShape<RW, TW, NT, S, KC>;
  const auto kernel = skinny<T, RW, TW, NT, S, KC>;
  static const Code ready = load_kernel(kernel, Shape::kSharedBytes);
  if (ready != kNoError) return checked(ready, "loading the kernel for few rows");
  CUtensorMap weights, tokens;
  if (!describe<T>(&weights, p.w, p.n, p.k, p.w_n, Shape::kRows) || !describe<T>(&tokens, p.x, p.m, p.k, p.x_m, Shape::kTokens))
    return refuse(kNotSupported, "matmul: the driver describes no tensor of this shape and alignment to the memory accelerator");
  const unsigned blocks = static_cast<unsigned>((p.n + Shape::kRows - 1) / Shape::kRows);
  kernel<<<blocks, Shape::kThreads, Shape::kSharedBytes, stream>>>(weights, tokens, p);
  return checked(last_error(), "launching the kernel for few rows");
}

// The shape of a block: measured on an H200 (docs/reference/benchmarks.md). No choice changes a bit.
template <class T> int run_skinny(const GpuMatmulArgs& p, Stream stream) {
  const auto aligned = [](const void* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; };
  if (p.m > kSkinnyRows || p.x_k != 1 || p.w_k != 1 || (p.m > 1 && p.x_m % 8 != 0) || (p.n > 1 && p.w_n % 8 != 0) ||
      p.k % 8 != 0 || !aligned(p.x) || !aligned(p.w))
    return refuse(kNotSupported, "matmul: the kernel for few rows takes at most 64 rows, with k contiguous and rows on "
                                 "16-byte boundaries; the reference path takes any");
  static const int major = [] {
    int device = 0, found = 0;
    return cudaGetDevice(&device) == cudaSuccess &&
                   cudaDeviceGetAttribute(&found, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess
               ? found
               : 0;
  }();
  if (major < 9) return refuse(kNotSupported, "matmul: the kernel for few rows needs compute capability 9.0 or newer");
  static const int sms = [] { int count = 0; return processors(&count) == kNoError ? count : 132; }();
  const int64_t tiles = (p.n + 15) / 16;
  if (tiles <= sms) {  // every warp's chain of k is the limit: as many blocks as there are
    if (p.m <= 16) return launch_skinny<T, 1, 2, 1, 3, 512>(p, stream);
    if (p.m <= 32) return launch_skinny<T, 1, 2, 2, 4, 512>(p, stream);
    return launch_skinny<T, 1, 4, 2, 2, 512>(p, stream);
  }
  const bool many = tiles >= 3 * sms;
  if (p.m <= 8) return launch_skinny<T, 2, 1, 1, 4, 256>(p, stream);
  if (p.m <= 16) return many ? launch_skinny<T, 4, 2, 1, 3, 256>(p, stream) : launch_skinny<T, 2, 2, 1, 5, 256>(p, stream);
  if (p.m <= 32) return many ? launch_skinny<T, 4, 2, 2, 3, 256>(p, stream) : launch_skinny<T, 2, 2, 2, 3, 512>(p, stream);
  return launch_skinny<T, 2, 4, 2, 4, 256>(p, stream);
}

template <class T> int run(const GpuMatmulArgs& p, Stream stream) {
  if (p.m == 0 || p.n == 0) return kOk;
  if (p.path == static_cast<int32_t>(GpuMatmulPath::kSkinny) && p.k > 0) return run_skinny<T>(p, stream);
  return run_reference<T>(p, stream);
}

}  // namespace
}  // namespace gpu
}  // namespace detinfer

using namespace detinfer;

DETINFER_EXPORT const char* detinfer_gpu_matmul_error() { return gpu::sentence; }
DETINFER_EXPORT int detinfer_gpu_matmul_size() { return static_cast<int>(sizeof(GpuMatmulArgs)); }

DETINFER_EXPORT int detinfer_gpu_matmul(const GpuMatmulArgs* args, void* stream) {
  if (args == nullptr) return gpu::refuse(kBadArgument, "matmul: no arguments were given");
  if (args->m < 0 || args->n < 0 || args->k < 0) return gpu::refuse(kBadArgument, "matmul: a size is negative");
  const gpu::Stream on = static_cast<gpu::Stream>(stream);
  if (args->dtype == kBFloat16) return gpu::run<gpu::BFloat16>(*args, on);
  if (args->dtype == kFloat16) return gpu::run<gpu::Float16>(*args, on);
  return gpu::refuse(kBadArgument, "matmul: the matrix unit's path is for bf16 and fp16");
}
