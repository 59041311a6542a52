// Host side of the matmul family: what its two files share.
#pragma once

#include <atomic>

#include "../matmul_gpu.h"
#include "../platform.h"

namespace detinfer {
namespace gpu {

static constexpr int64_t kSkinnyRows = 512;

int refuse_matmul(Status status, const char* why);
int checked_matmul(Code code, const char* doing);
int run_fp32(const GpuMatmulArgs& p, Stream stream);

// Loads a kernel once for each device: how much shared memory it may take is set for one device at a time.
template <class Kernel> static inline Code load_here(std::atomic<uint64_t>& loaded, Kernel kernel, int shared_bytes) {
  int device = 0;
  const Code found = cudaGetDevice(&device);
  if (found != kNoError) return found;
  const uint64_t bit = uint64_t{1} << (device % 64);
  if ((loaded.load(std::memory_order_acquire) & bit) != 0 && device < 64) return kNoError;
  const Code code = load_kernel(kernel, shared_bytes);
  if (code == kNoError) loaded.fetch_or(bit, std::memory_order_release);
  return code;
}

// launch(arguments, grid) for at most 65,535 products at a time: the most that a grid has in its third dimension.
template <class Launch> static inline int in_batches(const GpuMatmulArgs& p, int element, dim3 grid, const Launch& launch) {
  constexpr int64_t kMost = 65535;
  for (int64_t first = 0; first < p.batch; first += kMost) {
    GpuMatmulArgs part = p;
    part.batch = p.batch - first < kMost ? p.batch - first : kMost;
    part.x = static_cast<const char*>(p.x) + first * p.x_b * element;
    part.w = static_cast<const char*>(p.w) + first * p.w_b * element;
    if (p.c != nullptr) part.c = static_cast<const char*>(p.c) + first * p.c_b * element;
    part.out = static_cast<char*>(p.out) + first * p.out_b * element;
    grid.z = static_cast<unsigned>(part.batch);
    launch(part, grid);
  }
  return checked_matmul(last_error(), "launching a kernel");
}

}  // namespace gpu
}  // namespace detinfer
