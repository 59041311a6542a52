// Arguments of the rows family on a GPU: as rows.h, but rows of x and of the residual may lie apart.
#pragma once
#include <cstdint>

#include "rows.h"

namespace detinfer {

// Which threads take a row: a matter of speed alone, measured on an H200 (docs/reference/benchmarks.md). All but the first
// three want rows that start on 16-byte boundaries and end there. A row of at most 16384 elements is read once, but by the
// shapes called any.
enum class GpuRowsShape : int32_t {
  kChosen = 0,   // by the sizes
  kAnyWarp,      // a warp, up to 1024 elements, any alignment
  kAnyBlock,     // 16 warps, any length and alignment
  kPartOfWarp,   // up to 128 elements: 16 bytes of each thread
  kFewThreads,   // up to 128: 32 bytes of each thread
  kWarp,         // up to 1024
  kBlock1024,    // 4 warps, 16 bytes a load, up to so many elements
  kBlock2048,
  kBlock4096,
  kBlock8192,
  kManyThreads,  // softmax and log_softmax: 16 warps, up to 8192
  kBlock16384,   // 8 warps
  kStream,       // 4 warps, any length
  kStreamWide,   // 16 warps, any length
  kCluster,      // softmax and log_softmax on NVIDIA: 8 blocks, up to 262144
};

struct GpuRowsArgs {
  int32_t op;             // RowsOp
  int32_t dtype;          // DType of x, residual and residual_out
  int32_t out_dtype;      // `dtype` or fp32; norms: `dtype`
  int32_t weight_dtype;   // DType of weight and bias
  int32_t weight_mode;    // WeightMode
  int32_t residual_mode;  // ResidualMode
  int32_t shape;          // GpuRowsShape
  int64_t rows, n;
  // Sum, mean, max and min reduce x of shape [rows / inner, n, inner], contiguous, over n; all others have inner = 1.
  int64_t inner;
  int64_t x_row, residual_row;  // elements from a row to the next, where inner is 1; a row itself is contiguous
  const void* x;
  const void* residual;  // null: no residual
  const void* weight;    // n elements, or null: factor 1
  const void* bias;      // n elements, or null
  void* out;             // contiguous; sum, mean, max, min: one element a row; else n elements a row
  void* residual_out;    // with residual: n elements a row
  void* mean;            // layer norm: one fp32 a row, or null
  void* rstd;            // both norms: one fp32 a row, or null
  double eps;            // rounded to fp32 before use
};

}  // namespace detinfer
