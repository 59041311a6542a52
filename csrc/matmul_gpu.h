// Arguments of the matmul family on NVIDIA GPUs: out[m, n] = alpha * sum_k x[m, k] * w[n, k] + beta * c[m, n], in batches.
//
// bf16 and fp16 on the matrix unit: one fp32 accumulator for each output, k ascending in the steps of 16 of its own
// instruction, from +0. fp32 on the FMA units: one chain of FMAs, k ascending, from +0. Then alpha (a multiplication, if it
// is not 1), then beta * c (a multiplication, if beta is not 1, and an addition), then one rounding. Every path gives the
// bits of the reference path.
#pragma once
#include <cstdint>

namespace detinfer {

enum class GpuMatmulPath : int32_t {
  kReference = 0,  // plain and slow
  kSkinny,         // few rows of x; k contiguous, 16-byte aligned rows: weights stream through once
  kTile,           // any number of rows, any strides
  kStream,         // fp32, k contiguous, 16-byte aligned rows: through the tensor memory accelerator
};

struct GpuMatmulArgs {
  int32_t dtype;    // DType: kFloat32, kBFloat16 or kFloat16
  int32_t path;     // GpuMatmulPath
  int32_t variant;  // the shape of a block, or -1: by a rule (kStream has none). No choice changes a bit.
  float alpha, beta;
  int32_t reserved;
  int64_t batch, m, n, k;
  // Strides in elements. w_n is from one column of the result to the next.
  int64_t x_b, x_m, x_k, w_b, w_n, w_k, c_b, c_m, c_n, out_b, out_m, out_n;
  const void* x;
  const void* w;
  const void* c;  // of `dtype`, or null: nothing is added
  void* out;
};

}  // namespace detinfer
