// The rows family on GPUs: which shape of block takes a row of which length. No choice changes a bit: rows_row.h.
#include <cstdio>
#include <cstring>

#include "gpu/rows_norm.h"
#include "gpu/rows_reduce.h"
#include "gpu/rows_softmax.h"

namespace detinfer {
namespace gpu {
namespace {

thread_local char rows_sentence[256] = "";

int refuse_rows(Status status, const char* why) {
  std::strncpy(rows_sentence, why, sizeof(rows_sentence) - 1);
  return status;
}

int launched(Code code) {
  if (code == kNoError) return kOk;
  std::snprintf(rows_sentence, sizeof rows_sentence, "rows: launching a kernel: %s", sentence_of(code));
  return kNotSupported;
}

// Packs of `bytes` at this address and at every row's begin, with no rest at the end of a row.
bool fits(const void* at, int64_t row_elements, int64_t n, int element, int bytes, int pack) {
  return reinterpret_cast<uintptr_t>(at) % bytes == 0 && row_elements * element % bytes == 0 && n % pack == 0;
}

template <class Shape> int run_shape(const GpuRowsArgs& p, Stream stream) {
  using T = typename Shape::T;
  constexpr int kPack = Shape::kPack, kBytes = kPack * T::kBytes;
  const int64_t blocks = (p.rows + Shape::kRows - 1) / Shape::kRows;
  if (blocks > 0x7fffffff) return refuse_rows(kBadArgument, "rows: more than 2,147,483,647 rows in one call");
  const int grid = static_cast<int>(blocks);
  const bool x = fits(p.x, p.x_row, p.n, T::kBytes, kBytes, kPack);
  if (p.op == kRmsNorm || p.op == kLayerNorm) {
    const int weight_bytes = p.weight_dtype == kFloat32 ? 4 : 2, weight_pack = kBytes * weight_bytes / T::kBytes;
    const int weight_aligned = weight_pack < 16 ? weight_pack : 16;
    const Aligned aligned = {x, fits(p.residual, p.residual_row, p.n, T::kBytes, kBytes, kPack),
                             fits(p.weight, p.n, p.n, weight_bytes, weight_aligned, kPack) &&
                                 fits(p.bias, p.n, p.n, weight_bytes, weight_aligned, kPack),
                             fits(p.out, p.n, p.n, T::kBytes, kBytes, kPack) &&
                                 fits(p.residual_out, p.n, p.n, T::kBytes, kBytes, kPack)};
    if (p.op == kRmsNorm) return launched(launch(norm<Shape, false>, grid, Shape::kThreads, 0, stream, false, p, aligned));
    return launched(launch(norm<Shape, true>, grid, Shape::kThreads, 0, stream, false, p, aligned));
  }
  const int out_bytes = p.out_dtype == kFloat32 ? 4 : 2, out_pack = kPack * out_bytes < 16 ? kPack * out_bytes : 16;
  const bool out = fits(p.out, p.n, p.n, out_bytes, out_pack, kPack);
  if (p.op == kSoftmax) return launched(launch(softmax<Shape, false>, grid, Shape::kThreads, 0, stream, false, p, x, out));
  return launched(launch(softmax<Shape, true>, grid, Shape::kThreads, 0, stream, false, p, x, out));
}

template <class Shape> int run_reduction(const GpuRowsArgs& p, Stream stream) {
  using T = typename Shape::T;
  const int64_t blocks = (p.rows + Shape::kRows - 1) / Shape::kRows;
  if (blocks > 0x7fffffff) return refuse_rows(kBadArgument, "rows: more than 2,147,483,647 rows in one call");
  const bool aligned = fits(p.x, p.x_row, p.n, T::kBytes, Shape::kPack * T::kBytes, Shape::kPack);
  return launched(launch(reduce_rows<Shape>, static_cast<int>(blocks), Shape::kThreads, 0, stream, false, p, aligned));
}

template <class T> int run(const GpuRowsArgs& p, Stream stream) {
  constexpr int kPack = 16 / T::kBytes, kWarps = T::kBytes * 2;  // packs of 16 bytes; 1024 lanes in one round of a block
  constexpr bool kWide = T::kBytes == 4;
  if (p.op <= kMin) {
    if (p.inner > 1) {
      const int64_t blocks = p.rows / p.inner * ((p.inner + kColumns - 1) / kColumns);
      if (blocks > 0x7fffffff) return refuse_rows(kBadArgument, "rows: more than 68,719,476,704 columns in one call");
      return launched(launch(reduce_columns<T>, static_cast<int>(blocks), kColumns * kStrands, 0, stream, false, p));
    }
    if (p.n <= 1024) return run_reduction<RowShape<T, 32, 1, kPack, 0>>(p, stream);
    if (p.n <= 8192) return run_reduction<RowShape<T, 32, kWarps, kPack, 0>>(p, stream);
    return run_reduction<RowShape<T, 32, 16, 2, 0>>(p, stream);
  }
  if (p.n <= 128) return run_shape<RowShape<T, kWide ? 32 : 16, 1, kPack, 1>>(p, stream);
  if (p.n <= 1024) return run_shape<RowShape<T, 32, 1, kPack, 1024 / (32 * kPack)>>(p, stream);
  if (p.n <= 4096) return run_shape<RowShape<T, 32, kWarps, kPack, 4>>(p, stream);
  if (p.n <= 8192) return run_shape<RowShape<T, 32, kWarps, kPack, 8>>(p, stream);
  return run_shape<RowShape<T, 32, 16, 2, 0>>(p, stream);
}

}  // namespace
}  // namespace gpu
}  // namespace detinfer

using namespace detinfer;

DETINFER_EXPORT const char* detinfer_gpu_rows_error() { return gpu::rows_sentence; }
DETINFER_EXPORT int detinfer_gpu_rows_size() { return static_cast<int>(sizeof(GpuRowsArgs)); }

DETINFER_EXPORT int detinfer_gpu_rows(const GpuRowsArgs* args, void* stream) {
  if (args == nullptr) return gpu::refuse_rows(kBadArgument, "rows: no arguments were given");
  const GpuRowsArgs& p = *args;
  const gpu::Stream on = static_cast<gpu::Stream>(stream);
  if (p.op < kSum || p.op > kLayerNorm) return gpu::refuse_rows(kBadArgument, "rows: no such operation");
  if (p.rows < 0 || p.n < 0 || p.inner < 1) return gpu::refuse_rows(kBadArgument, "rows: a size is negative");
  if (p.inner > 1 && p.op > kMin) return gpu::refuse_rows(kBadArgument, "rows: this operation runs along contiguous rows");
  if (p.out_dtype != p.dtype && p.out_dtype != kFloat32)
    return gpu::refuse_rows(kBadArgument, "rows: the output's dtype is neither the input's nor fp32");
  if (p.weight_dtype != p.dtype && p.weight_dtype != kFloat32)
    return gpu::refuse_rows(kBadArgument, "rows: the weight's dtype is neither the input's nor fp32");
  if (p.n == 0 && (p.op == kMax || p.op == kMin)) return gpu::refuse_rows(kBadArgument, "rows: no elements to choose from");
  if (p.rows == 0 || (p.n == 0 && p.op > kMin)) return kOk;
  if (p.dtype == kFloat32) return gpu::run<gpu::Float32>(p, on);
  if (p.dtype == kBFloat16) return gpu::run<gpu::BFloat16>(p, on);
  if (p.dtype == kFloat16) return gpu::run<gpu::Float16>(p, on);
  return gpu::refuse_rows(kBadArgument, "rows: no such dtype");
}
