// Arguments of the elementwise family: out[i] = op(x[i]) or op(x[i], y[i]) over contiguous tensors of one dtype.
#pragma once
#include <cstdint>

namespace detinfer {

// detinfer/ops/elementwise.py has the same numbers.
enum ElementwiseOp : int32_t {
  kSilu = 0,
  kGelu,
  kGeluTanh,
  kSigmoid,
  kTanh,
  kExp,
  kExp2,
  kExpm1,
  kLog,
  kLog2,
  kLog10,
  kLog1p,
  kErf,
  kErfc,
  kSin,
  kCos,
  kRsqrt,
  kSqrt,
  kUnaryOps,        // those above have one operand and no parameter
  kSoftplus = 32,   // a = beta, b = threshold
  kPow,             // y null: the exponent is a; x null: the base is a
  kAddScaled,       // x + a * y: the product is rounded to fp32, then the sum; y null: x + a * b
  kMaximum,         // NaN wins, +0 > -0
  kMinimum,
};

struct ElementwiseArgs {
  int32_t op;     // ElementwiseOp
  int32_t dtype;  // DType of x, y and out
  int64_t count;
  const void* x;
  const void* y;
  void* out;
  double a, b;  // rounded to fp32 before use, by kPow then to `dtype`
};

}  // namespace detinfer
