// Arguments of the rows family on a GPU: as rows.h, but rows of x and of the residual may lie apart.
#pragma once
#include <cstdint>

#include "rows.h"

namespace detinfer {

struct GpuRowsArgs {
  int32_t op;             // RowsOp
  int32_t dtype;          // DType of x, residual and residual_out
  int32_t out_dtype;      // `dtype` or fp32; norms: `dtype`
  int32_t weight_dtype;   // DType of weight and bias
  int32_t weight_mode;    // WeightMode
  int32_t residual_mode;  // ResidualMode
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
