// Arguments of the rows family: one result, or one row of results, for each row of n elements.
#pragma once
#include <cstdint>

#include "order.h"

namespace detinfer {

// detinfer/ops/rows.py has the same numbers.
enum RowsOp : int32_t { kSum = 0, kMean, kMax, kMin, kSoftmax, kLogSoftmax, kRmsNorm, kLayerNorm };

struct RowsArgs {
  int32_t op;             // RowsOp
  int32_t dtype;          // DType of x, residual and residual_out
  int32_t out_dtype;      // `dtype` or fp32
  int32_t weight_dtype;   // DType of weight and bias
  int32_t stat_dtype;     // DType of mean and rstd
  int32_t weight_mode;    // WeightMode
  int32_t residual_mode;  // ResidualMode
  int64_t rows, n;
  // Sum, mean, max and min reduce x of shape [rows / inner, n, inner] over n; all others have inner = 1. Every tensor is
  // contiguous.
  int64_t inner;
  const void* x;
  const void* residual;  // null: no residual
  const void* weight;    // n elements, or null: factor 1
  const void* bias;      // n elements, or null
  void* out;             // sum, mean, max, min: one element a row; else n elements a row
  void* residual_out;    // with residual: n elements a row
  void* mean;            // layer norm: one element a row, or null
  void* rstd;            // both norms: one element a row, or null
  double eps;            // rounded to fp32 before use
};

}  // namespace detinfer
