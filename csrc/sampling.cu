// Draws of tokens on GPUs: sampling.h has the function. A row is shared by 16 blocks; who is compared with whom first
// changes nothing.
#include "sampling.h"

#include <cstdio>
#include <cstring>

#include "gpu/rows_math.h"

namespace detinfer {
namespace gpu {
namespace {

constexpr int kDrawThreads = 256;
constexpr float kMargin = 1e-3f;  // far above the error of the fast logarithm and of rounding a score to fp32

thread_local char sampling_sentence[256] = "";

__device__ double score_of(float log_probability, uint64_t r) {
  const double u = mul_rn(add_rn(static_cast<double>(r), 0.5), 0x1p-52);
  return add_rn(static_cast<double>(log_probability), -log64(-log64(u)));
}

// The best of a split of a row. The noise -log(-log(u)) is at most -log(1 - u): where even that cannot win over what the
// warp has found, the exact score is not computed.
__global__ void __launch_bounds__(kDrawThreads) best_of_split(DETINFER_PARAMETER SamplingArgs p) {
  __shared__ Candidate found[kDrawThreads];
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t row = blockIdx.x / kSamplingSplits, split = blockIdx.x % kSamplingSplits;
  const int64_t each = (p.n + kSamplingSplits - 1) / kSamplingSplits, begin = split * each;
  const int64_t end = begin + each < p.n ? begin + each : p.n;
  const float* x = p.log_probabilities + row * p.n;
  const uint64_t seed = static_cast<uint64_t>(p.seeds[row]), position = static_cast<uint64_t>(p.positions[row]);
  Candidate best = nobody();
  bool nan = false;
  float floor = -__builtin_inff();
  for (int64_t base = begin; base < end; base += kDrawThreads) {
    const int64_t token = base + thread;
    const float value = token < end ? x[token] : -__builtin_inff();
    nan = nan || value != value;
    uint64_t r = 0;
    bool may = value > -__builtin_inff();
    if (may) {
      r = upper_52(philox(static_cast<uint32_t>(token), position, seed));
      const float rest = static_cast<float>((uint64_t{1} << 52) - r) * 0x1p-52f;
      may = value - __logf(rest) + kMargin >= floor;
    }
    if (every_lane(!may)) continue;
    if (may) {
      const Candidate one = {score_of(value, r), token};
      if (wins(one, best)) best = one;
    }
    floor = static_cast<float>(best.score);
    for (int mask = 16; mask >= 1; mask /= 2) floor = fmaxf(floor, from_lane_xor(floor, mask));
  }
  found[thread] = nan ? not_a_number() : best;
  __syncthreads();
  for (int half = kDrawThreads / 2; half >= 1; half /= 2) {
    if (thread < half && wins(found[thread + half], found[thread])) found[thread] = found[thread + half];
    __syncthreads();
  }
  if (thread == 0) static_cast<Candidate*>(p.workspace)[blockIdx.x] = found[0];
}

__global__ void best_of_row(DETINFER_PARAMETER SamplingArgs p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= p.rows) return;
  const Candidate* of = static_cast<const Candidate*>(p.workspace) + row * kSamplingSplits;
  Candidate best = of[0];
  for (int s = 1; s < kSamplingSplits; s++)
    if (wins(of[s], best)) best = of[s];
  p.out[row] = best.token;
}

int refuse_sampling(Status status, const char* why) {
  std::strncpy(sampling_sentence, why, sizeof(sampling_sentence) - 1);
  return status;
}

int run_sampling(const SamplingArgs& p, Stream stream) {
  if (p.rows < 0 || p.n < 0 || p.n > int64_t{1} << 32 || p.rows > 0x7fffffff / kSamplingSplits)
    return refuse_sampling(kBadArgument, "sampling: more than 134,217,727 rows or 4,294,967,296 tokens, or a negative size");
  if (p.rows == 0) return kOk;
  Code code = launch(best_of_split, static_cast<int>(p.rows * kSamplingSplits), kDrawThreads, 0, stream, false, p);
  if (code == kNoError) code = launch(best_of_row, static_cast<int>((p.rows + 127) / 128), 128, 0, stream, false, p);
  if (code == kNoError) return kOk;
  std::snprintf(sampling_sentence, sizeof sampling_sentence, "sampling: launching a kernel: %s", sentence_of(code));
  return kNotSupported;
}

}  // namespace
}  // namespace gpu
}  // namespace detinfer

using namespace detinfer;

DETINFER_EXPORT const char* detinfer_gpu_sampling_error() { return gpu::sampling_sentence; }
DETINFER_EXPORT int detinfer_gpu_sampling_size() { return static_cast<int>(sizeof(SamplingArgs)); }

DETINFER_EXPORT int detinfer_gpu_sampling(const SamplingArgs* args, void* stream) {
  if (args == nullptr) return gpu::refuse_sampling(kBadArgument, "sampling: no arguments were given");
  return gpu::run_sampling(*args, static_cast<gpu::Stream>(stream));
}
