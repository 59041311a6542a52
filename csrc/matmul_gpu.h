// Arguments of the matmul family on NVIDIA GPUs: out[m, n] = sum_k x[m, k] * w[n, k], plus a bias.
//
// bf16 and fp16 on the matrix unit: one fp32 accumulator for each output, k ascending in the steps of 16 of its own
// instruction, from +0; then the bias, an fp32 addition; one rounding. Every path gives the bits of the reference path.
#pragma once
#include <cstdint>

namespace detinfer {

enum class GpuMatmulPath : int32_t {
  kReference = 0,  // any strides, any number of rows: plain and slow
  kSkinny,         // at most kSkinnyRows rows of x; k contiguous, 16-byte aligned rows: weights stream through once
};

static constexpr int64_t kSkinnyRows = 64;

struct GpuMatmulArgs {
  int32_t dtype;  // DType: kBFloat16 or kFloat16
  int32_t path;   // GpuMatmulPath
  int64_t m, n, k;
  int64_t x_m, x_k, w_n, w_k, bias_n, out_m, out_n;  // strides in elements
  const void* x;
  const void* w;
  const void* bias;  // n elements of `dtype`, or null
  void* out;
};

}  // namespace detinfer
