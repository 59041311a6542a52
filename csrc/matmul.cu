// The matmul family on NVIDIA GPUs: matmul_gpu.h has the order. NVIDIA alone: AMD's matrix units have other steps of k.
#include <cstdio>
#include <cstring>
#include <type_traits>

#include "gpu/matmul_launch.h"
#include "gpu/matmul_skinny.h"
#include "gpu/matmul_tile.h"

namespace detinfer {
namespace gpu {
namespace {

thread_local char sentence[256] = "";

// Two elements that follow each other in k, as one word of an operand; past the end they are +0.
__device__ uint32_t word_at(const void* base, int64_t row, int64_t rows, int64_t row_stride, int64_t k, int64_t depth, int64_t k_stride) {
  const uint16_t* at = static_cast<const uint16_t*>(base) + row * row_stride + k * k_stride;
  const uint32_t low = row < rows && k < depth ? at[0] : 0;
  const uint32_t high = row < rows && k + 1 < depth ? at[k_stride] : 0;
  return low | high << 16;
}

// One warp for 16 columns of the result and 8 rows; its operands come straight from memory.
template <class T> __global__ void reference(const __grid_constant__ GpuMatmulArgs p) {
  const int lane = threadIdx.x, group = lane / 4, pair = lane % 4 * 2;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * 16, token = static_cast<int64_t>(blockIdx.y) * 8, batch = blockIdx.z;
  const uint16_t* const x = static_cast<const uint16_t*>(p.x) + batch * p.x_b;
  const uint16_t* const w = static_cast<const uint16_t*>(p.w) + batch * p.w_b;
  float sums[4] = {};
  for (int64_t k = 0; k < p.k; k += 16) {
    uint32_t a[4], b[2];
    for (int i = 0; i < 4; i++)
      a[i] = word_at(w, row + group + i % 2 * 8, p.n, p.w_n, k + pair + i / 2 * 8, p.k, p.w_k);
    for (int i = 0; i < 2; i++) b[i] = word_at(x, token + group, p.m, p.x_m, k + pair + i * 8, p.k, p.x_k);
    multiply_add<T>(sums, a, b[0], b[1]);
  }
  for (int i = 0; i < 4; i++) {
    const int64_t n = row + sum_row(lane, i), m = token + sum_column(lane, i);
    if (n < p.n && m < p.m) store_sum<T>(p, batch, m, n, sums[i]);
  }
}

template <class T> int run_reference(const GpuMatmulArgs& p, Stream stream) {
  if ((p.m + 7) / 8 > 65535) return refuse_matmul(kBadArgument, "matmul: more than 524,280 rows of x in one call of the plain path");
  const dim3 blocks(static_cast<unsigned>((p.n + 15) / 16), static_cast<unsigned>((p.m + 7) / 8));
  return in_batches(p, 2, blocks, [&](const GpuMatmulArgs& part, dim3 grid) { reference<T><<<grid, 32, 0, stream>>>(part); });
}

template <class T, int RW, int TW, int NT, int S, int KC> int launch_skinny(const GpuMatmulArgs& p, Stream stream) {
  using Shape = SkinnyShape<RW, TW, NT, S, KC>;
  const auto kernel = skinny<T, RW, TW, NT, S, KC>;
  static std::atomic<uint64_t> loaded{0};
  const Code ready = load_here(loaded, kernel, Shape::kSharedBytes);
  if (ready != kNoError) return checked_matmul(ready, "loading the kernel for few rows");
  CUtensorMap weights, tokens;
  if (!describe<T>(&weights, p.w, p.n, p.k, p.w_n, Shape::kRows) || !describe<T>(&tokens, p.x, p.m, p.k, p.x_m, Shape::kTokens))
    return refuse_matmul(kNotSupported, "matmul: the driver describes no tensor of this shape and alignment to the memory accelerator");
  const dim3 blocks(static_cast<unsigned>((p.n + Shape::kRows - 1) / Shape::kRows),
                    static_cast<unsigned>((p.m + Shape::kTokens - 1) / Shape::kTokens));
  kernel<<<blocks, Shape::kThreads, Shape::kSharedBytes, stream>>>(weights, tokens, p);
  return checked_matmul(last_error(), "launching the kernel for few rows");
}

// The shape of a block: measured on an H200 (docs/reference/benchmarks.md). No choice changes a bit.
template <class T> int run_skinny(const GpuMatmulArgs& p, Stream stream) {
  if (p.m > kSkinnyRows || !accelerates(p, 8))
    return refuse_matmul(kNotSupported, "matmul: the kernel for few rows takes at most 512 rows, no batches, with k contiguous and "
                                        "rows on 16-byte boundaries, compute capability 9 or 10; the tile path takes any");
  static const int sms = [] { int count = 0; return processors(&count) == kNoError ? count : 132; }();
  const int64_t tiles = (p.n + 15) / 16;
  int variant = p.variant;
  if (variant < 0) {
    const bool few = tiles <= sms, many = tiles >= 3 * sms;  // few: a warp's chain of k is the limit
    if (p.m <= 8 || (few && p.m <= 16)) variant = 0;
    else if (p.m <= 16) variant = 4;
    else if (p.m <= 32 || (few && p.m <= 64)) variant = many ? 8 : 9;
    else variant = many || p.m > 64 ? 12 : 11;
  }
  switch (variant) {  // columns of the result x rows of a block
    case 0: return launch_skinny<T, 1, 1, 1, 4, 256>(p, stream);   // 16 x 8
    case 1: return launch_skinny<T, 1, 1, 1, 8, 128>(p, stream);   // 16 x 8
    case 2: return launch_skinny<T, 2, 1, 1, 4, 256>(p, stream);   // 32 x 8
    case 3: return launch_skinny<T, 2, 1, 1, 6, 256>(p, stream);   // 32 x 8
    case 4: return launch_skinny<T, 1, 2, 1, 4, 256>(p, stream);   // 16 x 16
    case 5: return launch_skinny<T, 1, 2, 1, 8, 128>(p, stream);   // 16 x 16
    case 6: return launch_skinny<T, 2, 2, 1, 5, 256>(p, stream);   // 32 x 16
    case 7: return launch_skinny<T, 1, 4, 1, 6, 128>(p, stream);   // 16 x 32
    case 8: return launch_skinny<T, 4, 2, 2, 3, 256>(p, stream);   // 64 x 32
    case 9: return launch_skinny<T, 2, 2, 2, 3, 512>(p, stream);   // 32 x 32
    case 10: return launch_skinny<T, 1, 8, 1, 6, 128>(p, stream);  // 16 x 64
    case 11: return launch_skinny<T, 2, 4, 2, 4, 256>(p, stream);  // 32 x 64
    case 12: return launch_skinny<T, 4, 4, 2, 4, 128>(p, stream);  // 64 x 64
  }
  return refuse_matmul(kBadArgument, "matmul: the kernel for few rows has no such variant");
}

template <class T, int XT, int WT, int XW, int WW> int launch_tile(const GpuMatmulArgs& p, Stream stream) {
  using Shape = TileShape<XT, WT, XW, WW>;
  const auto kernel = tile<T, XT, WT, XW, WW>;
  static std::atomic<uint64_t> loaded{0};
  const Code ready = load_here(loaded, kernel, Shape::kSharedBytes);
  if (ready != kNoError) return checked_matmul(ready, "loading the kernel for any strides");
  const int64_t blocks = (p.m + XT - 1) / XT * ((p.n + WT - 1) / WT);
  if (blocks > 0x7fffffff) return refuse_matmul(kBadArgument, "matmul: the result is too large for one call");
  return in_batches(p, 2, dim3(static_cast<unsigned>(blocks)), [&](const GpuMatmulArgs& part, dim3 grid) {
    kernel<<<grid, Shape::kThreads, Shape::kSharedBytes, stream>>>(part);
  });
}

template <class T> int run_tile(const GpuMatmulArgs& p, Stream stream) {
  static const int sms = [] { int count = 0; return processors(&count) == kNoError ? count : 132; }();
  int variant = p.variant;
  if (variant < 0) {
    const int64_t large = (p.m + 127) / 128 * ((p.n + 127) / 128) * p.batch;
    variant = p.m <= 16 ? 0 : large >= sms ? 2 : 1;
  }
  switch (variant) {
    case 0: return launch_tile<T, 16, 64, 1, 4>(p, stream);
    case 1: return launch_tile<T, 64, 64, 2, 2>(p, stream);
    case 2: return launch_tile<T, 128, 128, 2, 4>(p, stream);
  }
  return refuse_matmul(kBadArgument, "matmul: the kernel for any strides has no such variant");
}

template <class T> int run(const GpuMatmulArgs& p, Stream stream) {
  if (p.path == static_cast<int32_t>(GpuMatmulPath::kReference) || p.k == 0) return run_reference<T>(p, stream);
  if (p.path == static_cast<int32_t>(GpuMatmulPath::kSkinny)) return run_skinny<T>(p, stream);
  return run_tile<T>(p, stream);
}

}  // namespace

int refuse_matmul(Status status, const char* why) {
  std::strncpy(sentence, why, sizeof(sentence) - 1);
  return status;
}

int checked_matmul(Code code, const char* doing) {
  if (code == kNoError) return kOk;
  std::snprintf(sentence, sizeof sentence, "matmul: %s: %s", doing, sentence_of(code));
  return kNotSupported;
}

}  // namespace gpu
}  // namespace detinfer

using namespace detinfer;

DETINFER_EXPORT const char* detinfer_gpu_matmul_error() { return gpu::sentence; }
DETINFER_EXPORT int detinfer_gpu_matmul_size() { return static_cast<int>(sizeof(GpuMatmulArgs)); }

DETINFER_EXPORT int detinfer_gpu_matmul(const GpuMatmulArgs* args, void* stream) {
  if (args == nullptr) return gpu::refuse_matmul(kBadArgument, "matmul: no arguments were given");
  if (args->m < 0 || args->n < 0 || args->k < 0 || args->batch < 0) return gpu::refuse_matmul(kBadArgument, "matmul: a size is negative");
  if (args->m == 0 || args->n == 0 || args->batch == 0) return kOk;
  const gpu::Stream on = static_cast<gpu::Stream>(stream);
  if (args->dtype == kBFloat16) return gpu::run<gpu::BFloat16>(*args, on);
  if (args->dtype == kFloat16) return gpu::run<gpu::Float16>(*args, on);
  if (args->dtype == kFloat32) return gpu::run_fp32(*args, on);
  return gpu::refuse_matmul(kBadArgument, "matmul: the dtype is none of fp32, bf16 and fp16");
}
