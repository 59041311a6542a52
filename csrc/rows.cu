// The rows family on GPUs: its entry, sums, means and extremes. rows_norm.cu and rows_softmax.cu have the others.
#include <cstdio>
#include <cstring>

#include "gpu/rows_reduce.h"
#include "gpu/rows_shapes.h"

namespace detinfer {
namespace gpu {
namespace {

thread_local char rows_sentence[256] = "";

template <class Shape> int run_rows(const GpuRowsArgs& p, Stream stream) {
  const int blocks = blocks_for<Shape>(p.rows);
  if (blocks < 0) return refuse_rows(kBadArgument, kTooManyRows);
  return launched(launch(reduce_rows<Shape>, blocks, Shape::kThreads, 0, stream, false, p));
}

template <class T> struct Reduction {
  static int on(const GpuRowsArgs& p, Stream stream) {
    constexpr int kPack = 16 / T::kBytes;
    if (p.inner > 1) {
      const int64_t blocks = p.rows / p.inner * ((p.inner + kColumns - 1) / kColumns);
      if (blocks > 0x7fffffff) return refuse_rows(kBadArgument, "rows: more than 68,719,476,704 columns in one call");
      return launched(launch(reduce_columns<T>, static_cast<int>(blocks), kColumns * kStrands, 0, stream, false, p));
    }
    if (!rows_are_aligned(p)) {
      if (p.n <= 1024) return run_rows<RowShape<T, 32, 1, kPack, 0, false>>(p, stream);
      return run_rows<RowShape<T, 32, 16, 2, 0, false>>(p, stream);
    }
    if (p.n <= 1024) return run_rows<RowShape<T, 32, 1, kPack, 0, true>>(p, stream);
    if (p.rows > 264) return run_rows<RowShape<T, 32, 4, kPack, 0, true>>(p, stream);
    return run_rows<RowShape<T, 32, 16, 2, 0, true>>(p, stream);
  }
};

}  // namespace

int refuse_rows(Status status, const char* why) {
  std::strncpy(rows_sentence, why, sizeof(rows_sentence) - 1);
  return status;
}

int launched(Code code) {
  if (code == kNoError) return kOk;
  std::snprintf(rows_sentence, sizeof rows_sentence, "rows: launching a kernel: %s", sentence_of(code));
  return kNotSupported;
}

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
  if (p.dtype < kFloat32 || p.dtype > kFloat16) return gpu::refuse_rows(kBadArgument, "rows: no such dtype");
  if (p.rows < 0 || p.n < 0 || (p.rows > 0 && p.inner < 1)) return gpu::refuse_rows(kBadArgument, "rows: a size is negative");
  if (p.inner > 1 && p.op > kMin) return gpu::refuse_rows(kBadArgument, "rows: this operation runs along contiguous rows");
  if (p.out_dtype != p.dtype && p.out_dtype != kFloat32)
    return gpu::refuse_rows(kBadArgument, "rows: the output's dtype is neither the input's nor fp32");
  if (p.weight_dtype != p.dtype && p.weight_dtype != kFloat32)
    return gpu::refuse_rows(kBadArgument, "rows: the weight's dtype is neither the input's nor fp32");
  if (p.n == 0 && (p.op == kMax || p.op == kMin)) return gpu::refuse_rows(kBadArgument, "rows: no elements to choose from");
  if (p.rows == 0 || (p.n == 0 && p.op > kMin)) return kOk;
  if (p.op == kSoftmax || p.op == kLogSoftmax) return gpu::run_softmax(p, on);
  if (p.op == kRmsNorm || p.op == kLayerNorm) return gpu::run_norm(p, on);
  return gpu::by_dtype<gpu::Reduction>(p, on);
}
