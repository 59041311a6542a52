// fp32 on NVIDIA GPUs: the plain kernel and the choice of a block's shape. gpu/matmul_fp32.h has the fast one.
#include "gpu/matmul_fp32.h"
#include "gpu/matmul_launch.h"

namespace detinfer {
namespace gpu {
namespace {

// A thread for each output.
__global__ void reference_fp32(const __grid_constant__ GpuMatmulArgs p) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x, batch = blockIdx.z;
  if (n >= p.n) return;
  for (int64_t m = blockIdx.y; m < p.m; m += gridDim.y) {
    const float* const x = static_cast<const float*>(p.x) + batch * p.x_b + m * p.x_m;
    const float* const w = static_cast<const float*>(p.w) + batch * p.w_b + n * p.w_n;
    float sum = 0.0f;
    for (int64_t k = 0; k < p.k; k++) sum = __fmaf_rn(x[k * p.x_k], w[k * p.w_k], sum);
    store_sum<Float32>(p, batch, m, n, sum);
  }
}

template <int XT, int WT, int RX, int RW, int KC, int S> int launch_fp32(const GpuMatmulArgs& p, Stream stream) {
  using Shape = Fp32Shape<XT, WT, RX, RW, KC, S>;
  const auto kernel = fp32_tile<XT, WT, RX, RW, KC, S>;
  static const Code ready = load_kernel(kernel, Shape::kSharedBytes);
  if (ready != kNoError) return checked_matmul(ready, "loading the kernel for fp32");
  const int64_t blocks = (p.m + XT - 1) / XT * ((p.n + WT - 1) / WT);
  if (blocks > 0x7fffffff) return refuse_matmul(kBadArgument, "matmul: the result is too large for one call");
  return in_batches(p, 4, dim3(static_cast<unsigned>(blocks)), [&](const GpuMatmulArgs& part, dim3 grid) {
    kernel<<<grid, Shape::kThreads, Shape::kSharedBytes, stream>>>(part);
  });
}

}  // namespace

int run_fp32(const GpuMatmulArgs& p, Stream stream) {
  if (p.path == static_cast<int32_t>(GpuMatmulPath::kReference)) {
    const dim3 blocks(static_cast<unsigned>((p.n + 31) / 32), static_cast<unsigned>(p.m < 65535 ? p.m : 65535));
    return in_batches(p, 4, blocks, [&](const GpuMatmulArgs& part, dim3 grid) { reference_fp32<<<grid, 32, 0, stream>>>(part); });
  }
  static const int sms = [] { int count = 0; return processors(&count) == kNoError ? count : 132; }();
  int variant = p.variant;
  if (variant < 0) {
    const auto fills = [&](int64_t rows, int64_t columns) {
      return (p.m + rows - 1) / rows * ((p.n + columns - 1) / columns) * p.batch >= sms;
    };
    if (p.m == 1) variant = 0;
    else if (p.m == 2) variant = 1;
    else if (p.m <= 4) variant = 2;
    else if (p.m <= 8) variant = 3;
    else if (p.m <= 16) variant = 4;
    else if (p.m <= 32 || !fills(64, 32)) variant = 5;
    else if (!fills(64, 64)) variant = 6;
    else variant = fills(128, 128) ? 8 : 7;
  }
  switch (variant) {
    case 0: return launch_fp32<1, 32, 1, 1, 128, 4>(p, stream);
    case 1: return launch_fp32<2, 32, 2, 1, 128, 4>(p, stream);
    case 2: return launch_fp32<4, 32, 2, 1, 128, 4>(p, stream);
    case 3: return launch_fp32<8, 32, 2, 1, 64, 6>(p, stream);
    case 4: return launch_fp32<16, 32, 4, 1, 64, 5>(p, stream);
    case 5: return launch_fp32<32, 32, 4, 2, 32, 6>(p, stream);
    case 6: return launch_fp32<64, 32, 8, 2, 32, 5>(p, stream);
    case 7: return launch_fp32<64, 64, 8, 4, 16, 5>(p, stream);
    case 8: return launch_fp32<128, 128, 8, 8, 16, 4>(p, stream);
    case 9: return launch_fp32<128, 64, 8, 8, 16, 4>(p, stream);
    case 10: return launch_fp32<1, 16, 1, 1, 256, 4>(p, stream);
    case 11: return launch_fp32<8, 16, 1, 1, 128, 4>(p, stream);
  }
  return refuse_matmul(kBadArgument, "matmul: the kernel for fp32 has no such variant");
}

}  // namespace gpu
}  // namespace detinfer
