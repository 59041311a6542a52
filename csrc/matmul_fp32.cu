// fp32 on NVIDIA GPUs: the plain kernel and the shapes of block. gpu/matmul_stream.h, gpu/matmul_chains.h and
// gpu/matmul_fp32.h have the fast ones.
#include <type_traits>

#include "gpu/matmul_chains.h"
#include "gpu/matmul_fp32.h"
#include "gpu/matmul_launch.h"
#include "gpu/matmul_stream.h"

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
  static std::atomic<uint64_t> loaded{0};
  const Code ready = load_here(loaded, kernel, Shape::kSharedBytes);
  if (ready != kNoError) return checked_matmul(ready, "loading the kernel for fp32");
  const int64_t blocks = (p.m + XT - 1) / XT * ((p.n + WT - 1) / WT);
  if (blocks > 0x7fffffff) return refuse_matmul(kBadArgument, "matmul: the result is too large for one call");
  return in_batches(p, 4, dim3(static_cast<unsigned>(blocks)), [&](const GpuMatmulArgs& part, dim3 grid) {
    kernel<<<grid, Shape::kThreads, Shape::kSharedBytes, stream>>>(part);
  });
}

template <int XT, int WT, int RX, int RW, int WL, int KB, int S, int V, int D, int kBlocks>
int launch_stream(const GpuMatmulArgs& p, Stream stream) {
  using Shape = StreamShape<XT, WT, RX, RW, WL, KB, S>;
  const auto kernel = stream_fp32<XT, WT, RX, RW, WL, KB, S, V, D, kBlocks>;
  static std::atomic<uint64_t> loaded{0};
  const Code ready = load_here(loaded, kernel, Shape::kSharedBytes);
  if (ready != kNoError) return checked_matmul(ready, "loading the kernel for aligned fp32");
  CUtensorMap x, w;
  if (!describe<Float32>(&x, p.x, p.m, p.k, p.x_m, XT) || !describe<Float32>(&w, p.w, p.n, p.k, p.w_n, WT))
    return refuse_matmul(kNotSupported, "matmul: the driver describes no tensor of this shape and alignment to the memory accelerator");
  const int64_t blocks = (p.m + XT - 1) / XT * ((p.n + WT - 1) / WT);
  if (blocks > 0x7fffffff) return refuse_matmul(kBadArgument, "matmul: the result is too large for one call");
  kernel<<<static_cast<unsigned>(blocks), Shape::kThreads, Shape::kSharedBytes, stream>>>(x, w, p);
  return checked_matmul(last_error(), "launching the kernel for aligned fp32");
}

template <int XT, int WT, int RX, int RW, int KB, int S, int U, int D, int kBlocks>
int launch_chains(const GpuMatmulArgs& p, Stream stream) {
  using Shape = ChainShape<XT, WT, RX, RW, KB, S>;
  const auto kernel = chains_fp32<XT, WT, RX, RW, KB, S, U, D, kBlocks>;
  static std::atomic<uint64_t> loaded{0};
  const Code ready = load_here(loaded, kernel, Shape::kSharedBytes);
  if (ready != kNoError) return checked_matmul(ready, "loading the kernel for chains in fp32");
  CUtensorMap x, w;
  if (!describe_boxes(&x, p.x, p.m, p.k, p.x_m, Shape::kRowsX, KB) || !describe_boxes(&w, p.w, p.n, p.k, p.w_n, WT, KB))
    return refuse_matmul(kNotSupported, "matmul: the driver describes no tensor of this shape and alignment to the memory accelerator");
  const int64_t blocks = (p.m + XT - 1) / XT * ((p.n + WT - 1) / WT);
  if (blocks > 0x7fffffff) return refuse_matmul(kBadArgument, "matmul: the result is too large for one call");
  kernel<<<static_cast<unsigned>(blocks), Shape::kThreads, Shape::kSharedBytes, stream>>>(x, w, p);
  return checked_matmul(last_error(), "launching the kernel for chains in fp32");
}

int run_stream(const GpuMatmulArgs& p, Stream stream) {
  if (!accelerates(p, 4))
    return refuse_matmul(kNotSupported, "matmul: the kernel for aligned fp32 takes no batches, k contiguous and rows on 16-byte "
                                        "boundaries, compute capability 9 or 10; the tile path takes any");
  switch (p.variant) {  // rows of x x columns of the result of a block; detinfer/ops/matmul_blocks.py chooses
    case 0: return launch_stream<1, 32, 1, 1, 32, 4, 5, 4, 1, 1>(p, stream);
    case 1: return launch_stream<2, 32, 2, 1, 32, 4, 5, 4, 1, 1>(p, stream);
    case 2: return launch_stream<4, 32, 2, 1, 32, 4, 5, 4, 4, 1>(p, stream);
    case 3: return launch_stream<8, 32, 4, 1, 32, 4, 5, 4, 1, 1>(p, stream);
    case 4: return launch_stream<16, 32, 4, 2, 16, 4, 4, 4, 2, 1>(p, stream);
    case 5: return launch_stream<16, 16, 4, 1, 16, 4, 5, 4, 1, 2>(p, stream);
    case 6: return launch_stream<16, 24, 2, 3, 8, 4, 5, 4, 2, 1>(p, stream);
    case 7: return launch_stream<32, 32, 4, 4, 8, 2, 5, 4, 2, 1>(p, stream);
    case 8: return launch_stream<32, 24, 4, 3, 8, 2, 5, 4, 2, 1>(p, stream);
    case 9: return launch_stream<64, 32, 8, 2, 16, 2, 4, 4, 1, 2>(p, stream);
    case 10: return launch_stream<64, 40, 4, 5, 8, 2, 3, 4, 2, 1>(p, stream);
    case 11: return launch_stream<64, 64, 8, 4, 16, 1, 4, 4, 1, 3>(p, stream);
    case 12: return launch_stream<128, 40, 8, 5, 8, 1, 5, 2, 2, 1>(p, stream);
    case 13: return launch_stream<128, 128, 8, 8, 8, 1, 6, 4, 1, 1>(p, stream);
    case 14: return launch_chains<4, 8, 1, 1, 8, 6, 64, 4, 2>(p, stream);
    case 15: return launch_chains<4, 32, 1, 4, 4, 5, 32, 2, 2>(p, stream);
    case 16: return launch_chains<16, 24, 2, 3, 4, 5, 32, 2, 2>(p, stream);
    case 17: return launch_chains<32, 24, 2, 3, 4, 3, 32, 2, 2>(p, stream);
    case 18: return launch_chains<32, 32, 2, 4, 4, 3, 32, 2, 2>(p, stream);
    case 19: return launch_chains<32, 40, 2, 5, 4, 3, 32, 2, 2>(p, stream);
    case 20: return launch_chains<32, 64, 4, 4, 2, 4, 16, 2, 2>(p, stream);
    case 21: return launch_chains<64, 40, 4, 5, 2, 4, 16, 2, 2>(p, stream);
    case 22: return launch_chains<64, 64, 4, 8, 2, 3, 8, 2, 2>(p, stream);
    case 23: return launch_chains<64, 80, 8, 5, 2, 3, 8, 2, 2>(p, stream);
    case 24: return launch_chains<128, 64, 8, 8, 2, 4, 8, 2, 1>(p, stream);
    case 25: return launch_chains<128, 80, 8, 5, 2, 4, 8, 2, 1>(p, stream);
    case 26: return launch_chains<128, 128, 8, 8, 2, 3, 8, 2, 1>(p, stream);
    case 27: return launch_chains<128, 160, 8, 10, 2, 3, 4, 2, 1>(p, stream);
  }
  return refuse_matmul(kBadArgument, "matmul: the kernel for aligned fp32 has no such variant");
}

}  // namespace

int run_fp32(const GpuMatmulArgs& p, Stream stream) {
  if (p.path == static_cast<int32_t>(GpuMatmulPath::kReference)) {
    const dim3 blocks(static_cast<unsigned>((p.n + 31) / 32), static_cast<unsigned>(p.m < 65535 ? p.m : 65535));
    return in_batches(p, 4, blocks, [&](const GpuMatmulArgs& part, dim3 grid) { reference_fp32<<<grid, 32, 0, stream>>>(part); });
  }
  if (p.path == static_cast<int32_t>(GpuMatmulPath::kStream)) return run_stream(p, stream);
  static const int sms = [] { int count = 0; return processors(&count) == kNoError ? count : 132; }();
  int variant = p.variant;
  if (variant < 0) {
    const auto fills = [&](int64_t rows, int64_t columns) {
      return (p.m + rows - 1) / rows * ((p.n + columns - 1) / columns) * p.batch >= sms;
    };
    variant = p.m <= 16 ? 0 : !fills(64, 64) ? 1 : !fills(128, 128) ? 2 : 3;
  }
  switch (variant) {
    case 0: return launch_fp32<16, 32, 4, 1, 64, 5>(p, stream);
    case 1: return launch_fp32<64, 32, 8, 2, 32, 5>(p, stream);
    case 2: return launch_fp32<64, 64, 8, 4, 16, 5>(p, stream);
    case 3: return launch_fp32<128, 128, 8, 8, 16, 4>(p, stream);
  }
  return refuse_matmul(kBadArgument, "matmul: the kernel for fp32 has no such variant");
}

}  // namespace gpu
}  // namespace detinfer
