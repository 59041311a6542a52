// Arguments of the matmul family: out[m, n] = alpha * sum_k a[m, k] * b[k, n] + beta * c[m, n], in batches.
//
// The sum is one chain of FMAs in fp32, k ascending, from +0; then alpha (a multiplication, if it is not 1), then
// beta * c (a multiplication, then an addition), then one rounding to the dtype; a NaN is stored canonical.
#pragma once
#include <cstdint>

namespace detinfer {

enum MatmulPath : int32_t {
  kPathAuto = 0,  // by a timing of both instructions at first use
  kPathFma = 1,   // operands widened to fp32, FMA
  kPathDot = 2,   // bf16 on CPUs with AVX512-BF16: vdpbf16ps where its bits are those of the FMA chain
};

constexpr int kMatmulBatchDims = 6;

// Sizes, and strides counted in elements; any stride is allowed, 0 broadcasts. The caller may keep a plan and use it
// for many calls, from many threads.
struct MatmulPlan {
  int32_t dtype;
  int32_t path;
  int32_t batch_dims;
  float alpha;
  float beta;
  int64_t m, n, k;
  int64_t a_m, a_k;
  int64_t b_k, b_n;
  int64_t c_m, c_n;
  int64_t out_m, out_n;
  int64_t batch[kMatmulBatchDims];
  int64_t a_batch[kMatmulBatchDims];
  int64_t b_batch[kMatmulBatchDims];
  int64_t c_batch[kMatmulBatchDims];
  int64_t out_batch[kMatmulBatchDims];
};

struct MatmulArgs {
  const MatmulPlan* plan;
  const void* a;
  const void* b;
  const void* c;  // null: nothing is added
  void* out;
};

}  // namespace detinfer
