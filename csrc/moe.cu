// Mixture-of-experts layers on NVIDIA GPUs: moe_gpu.h has the order. No call waits for the device or allocates.
#include <cstdio>
#include <cstring>

#include "gpu/moe_tile.h"

namespace detinfer {
namespace gpu {
namespace {

thread_local char sentence[256] = "";

int refuse(Status status, const char* why) {
  std::strncpy(sentence, why, sizeof(sentence) - 1);
  return status;
}

int checked(Code code, const char* doing) {
  if (code == kNoError) return kOk;
  std::snprintf(sentence, sizeof sentence, "moe: %s: %s", doing, sentence_of(code));
  return kNotSupported;
}

// ---------------------------------------------------------------------------------------------- which expert has which

constexpr int kMostExperts = 1024;

// One block, a thread for each expert. Within an expert assignments come in any order: each is a row of its own.
__global__ void __launch_bounds__(kMostExperts) group(DETINFER_PARAMETER GpuMoeGroup p) {
  __shared__ int counts[kMostExperts], before[kMostExperts], tiles[kMostExperts];
  const int e = threadIdx.x;
  counts[e] = 0;
  __syncthreads();
  for (int64_t a = e; a < p.assignments; a += kMostExperts) {
    const int64_t expert = p.chosen[a];
    if (expert >= 0 && expert < p.experts) atomicAdd(&counts[expert], 1);
  }
  __syncthreads();
  const int count = counts[e], cut = (count + p.tile_rows - 1) / p.tile_rows;
  before[e] = count, tiles[e] = cut;
  __syncthreads();
  for (int apart = 1; apart < kMostExperts; apart *= 2) {
    const int more = e >= apart ? before[e - apart] : 0, more_tiles = e >= apart ? tiles[e - apart] : 0;
    __syncthreads();
    before[e] += more, tiles[e] += more_tiles;
    __syncthreads();
  }
  const int first = before[e] - count, first_tile = tiles[e] - cut;
  counts[e] = first;  // from now on: where the expert's next assignment goes
  if (e == kMostExperts - 1) p.tiles[0] = tiles[e];
  for (int i = 0; i < cut; i++) {
    int32_t* const tile = p.tiles + 1 + 3 * (first_tile + i);
    tile[0] = e, tile[1] = first + i * p.tile_rows;
    tile[2] = i + 1 < cut ? tile[1] + p.tile_rows : first + count;
  }
  __syncthreads();
  for (int64_t a = e; a < p.assignments; a += kMostExperts) {
    const int64_t expert = p.chosen[a];
    if (expert >= 0 && expert < p.experts) p.order[atomicAdd(&counts[expert], 1)] = static_cast<int32_t>(a);
  }
}

// ---------------------------------------------------------------------------------------------- products

// One warp for 16 columns of one assignment; operands come straight from memory, the other 7 columns are +0.
template <class T> __global__ void reference(const __grid_constant__ GpuMoeProduct p) {
  const int lane = threadIdx.x, pair = lane % 4 * 2;
  const int64_t n0 = static_cast<int64_t>(blockIdx.x) * 16, a = blockIdx.y;
  const int64_t expert = p.chosen == nullptr ? 0 : p.chosen[a];
  const uint16_t* const x = static_cast<const uint16_t*>(p.x) + a / p.places * p.x_row;
  const uint16_t* const w = static_cast<const uint16_t*>(p.w) + expert * p.w_expert;
  const auto weight = [&](int64_t n, int64_t k) -> uint32_t { return n < p.n && k < p.k ? w[n * p.w_n + k * p.w_k] : 0; };
  const auto token = [&](int64_t k) -> uint32_t { return lane / 4 == 0 && k < p.k ? x[k] : 0; };
  float sums[4] = {};
  for (int64_t k = 0; k < p.k; k += 16) {
    uint32_t from_w[4];
    for (int i = 0; i < 4; i++) {
      const int64_t n = n0 + lane / 4 + i % 2 * 8, at = k + pair + i / 2 * 8;
      from_w[i] = weight(n, at) | weight(n, at + 1) << 16;
    }
    const int64_t at = k + pair;
    multiply_add<T>(sums, from_w, token(at) | token(at + 1) << 16, token(at + 8) | token(at + 9) << 16);
  }
  for (int i = 0; i < 4; i++) {
    const int64_t n = n0 + sum_row(lane, i);
    if (sum_column(lane, i) != 0 || n >= p.n) continue;
    float sum = sums[i];
    if (p.bias != nullptr) sum = __fadd_rn(sum, element<T>(p.bias, expert * p.bias_expert + n));
    const float both[2] = {sum, sum};
    if (p.unrounded != 0) static_cast<uint32_t*>(p.out)[a * p.n + n] = to_float32(sum);
    else static_cast<uint16_t*>(p.out)[a * p.n + n] = static_cast<uint16_t>(T::put(both));
  }
}

template <class T, int XT, int WT, int XW, int WW, int S, bool kAcross> int launch_tile(const GpuMoeProduct& p, Stream stream) {
  using Shape = MoeShape<XT, WT, XW, WW, S>;
  const auto kernel = moe_tile<T, XT, WT, XW, WW, S, kAcross>;
  static const Code ready = load_kernel(kernel, Shape::kSharedBytes);
  if (ready != kNoError) return checked(ready, "loading a kernel");
  const int64_t across = (p.n + WT - 1) / WT, most = p.tiles != nullptr ? p.most_tiles : (p.assignments + XT - 1) / XT;
  if (across > 65535) return refuse(kBadArgument, "moe: an expert has more columns than a grid");
  kernel<<<dim3(static_cast<unsigned>(most), static_cast<unsigned>(across)), Shape::kThreads, Shape::kSharedBytes, stream>>>(p);
  return checked(last_error(), "launching a product");
}

template <class T, bool kAcross> int run_tile(const GpuMoeProduct& p, Stream stream) {
  switch (p.tile_rows) {
    case 16: return launch_tile<T, 16, 64, 1, 4, 6, kAcross>(p, stream);
    case 32: return launch_tile<T, 32, 64, 2, 2, 5, kAcross>(p, stream);
    case 64: return launch_tile<T, 64, 128, 2, 4, 4, kAcross>(p, stream);
    case 128: return launch_tile<T, 128, 128, 2, 4, 3, kAcross>(p, stream);
    default: return refuse(kBadArgument, "moe: a tile has 16, 32, 64 or 128 rows");
  }
}

template <class T> int product(const GpuMoeProduct& p, Stream stream) {
  if (p.assignments == 0 || p.n == 0) return kOk;
  if (p.path == static_cast<int32_t>(GpuMoePath::kReference)) {
    if (p.assignments > 65535) return refuse(kBadArgument, "moe: more than 65,535 assignments in one call of the plain path");
    const dim3 blocks(static_cast<unsigned>((p.n + 15) / 16), static_cast<unsigned>(p.assignments));
    reference<T><<<blocks, 32, 0, stream>>>(p);
    return checked(last_error(), "launching the plain product");
  }
  return p.w_n == 1 && p.w_k != 1 ? run_tile<T, true>(p, stream) : run_tile<T, false>(p, stream);
}

// ---------------------------------------------------------------------------------------------- joining experts

template <class T, class W, int kWide> __global__ void combine(DETINFER_PARAMETER GpuMoeCombine p) {
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * kWide;
  if (at >= p.tokens * p.width) return;
  const int64_t token = at / p.width, column = at - token * p.width;
  float acc[kWide];
  for (int64_t r = 0; r < p.places; r++) {
    const int64_t a = token * p.places + r, expert = p.chosen[a];
    const bool here = expert >= 0 && expert < p.experts;
    const float weight = element<W>(p.weights, a);
    const Pack<kWide> e = *reinterpret_cast<const Pack<kWide>*>(p.outputs + a * p.width + column);
#pragma unroll
    for (int i = 0; i < kWide; i++) {
      const float term = here ? mul_rn(weight, __uint_as_float(e.word[i])) : __uint_as_float(0x7fffffffu);
      acc[i] = r == 0 ? term : add_rn(acc[i], term);
    }
  }
  if (p.shared != nullptr)
#pragma unroll
    for (int i = 0; i < kWide; i++) acc[i] = add_rn(acc[i], p.shared[at + i]);
#pragma unroll
  for (int i = 0; i < kWide; i += T::kPerWord) {
    float both[T::kPerWord];
#pragma unroll
    for (int j = 0; j < T::kPerWord; j++) both[j] = acc[i + (kWide == 1 ? 0 : j)];
    const uint32_t word = T::put(both);
    if constexpr (T::kPerWord == 1) static_cast<uint32_t*>(p.out)[at + i] = word;
    else if constexpr (kWide == 1) static_cast<uint16_t*>(p.out)[at] = static_cast<uint16_t>(word);
    else *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(p.out) + at + i) = word;
  }
}

template <class T, class W> int run_combine(const GpuMoeCombine& p, Stream stream) {
  const bool four = p.width % 4 == 0;
  const int64_t threads = p.tokens * p.width / (four ? 4 : 1);
  if (threads == 0) return kOk;
  const unsigned blocks = static_cast<unsigned>((threads + 255) / 256);
  if (four) combine<T, W, 4><<<blocks, 256, 0, stream>>>(p);
  else combine<T, W, 1><<<blocks, 256, 0, stream>>>(p);
  return checked(last_error(), "launching the sum over places");
}

template <class T> int with_weights(const GpuMoeCombine& p, Stream stream) {
  if (p.weight_dtype == kFloat32) return run_combine<T, Float32>(p, stream);
  if (p.weight_dtype == kBFloat16) return run_combine<T, BFloat16>(p, stream);
  if (p.weight_dtype == kFloat16) return run_combine<T, Float16>(p, stream);
  return refuse(kBadArgument, "moe: weights are fp32, bf16 or fp16");
}

// ---------------------------------------------------------------------------------------------- choosing experts

// Greater for what comes first: the value's place among all values, then the lower index. 0 is nothing.
template <class T> __device__ uint64_t rank_of(const void* x, int64_t at, int index, bool largest) {
  const float value = element<T>(x, at);
  const uint32_t bits = value == 0.0f ? 0u : __float_as_uint(value);
  uint32_t place = value != value ? 0xffffffffu : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  if (!largest) place = ~place;
  return static_cast<uint64_t>(place) << 32 | ~static_cast<uint32_t>(index);
}

// A warp for a row of at most 32 * kEach elements.
template <class T, int kEach> __global__ void top_k(DETINFER_PARAMETER GpuMoeTopK p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (row >= p.rows) return;
  uint64_t left[kEach];
#pragma unroll
  for (int i = 0; i < kEach; i++) {
    const int index = i * 32 + lane;
    left[i] = index < p.n ? rank_of<T>(p.x, row * p.row_stride + index, index, p.largest != 0) : 0;
  }
  for (int place = 0; place < p.count; place++) {
    uint64_t best = 0;
#pragma unroll
    for (int i = 0; i < kEach; i++) best = left[i] > best ? left[i] : best;
#pragma unroll
    for (int apart = 16; apart > 0; apart /= 2) {
      const uint64_t other = __shfl_xor_sync(0xffffffffu, best, apart);
      best = other > best ? other : best;
    }
#pragma unroll
    for (int i = 0; i < kEach; i++) left[i] = left[i] == best ? 0 : left[i];
    if (lane != 0) continue;
    const uint32_t index = ~static_cast<uint32_t>(best);
    const int64_t from = row * p.row_stride + index, to = row * p.count + place;
    p.indices[to] = index;
    if constexpr (T::kBytes == 4) static_cast<uint32_t*>(p.values)[to] = static_cast<const uint32_t*>(p.x)[from];
    else static_cast<uint16_t*>(p.values)[to] = static_cast<const uint16_t*>(p.x)[from];
  }
}

template <class T> int run_top_k(const GpuMoeTopK& p, Stream stream) {
  const unsigned blocks = static_cast<unsigned>((p.rows + 3) / 4);
  if (p.rows == 0 || p.count == 0) return kOk;
  if (p.n <= 128) top_k<T, 4><<<blocks, 128, 0, stream>>>(p);
  else if (p.n <= 512) top_k<T, 16><<<blocks, 128, 0, stream>>>(p);
  else top_k<T, 32><<<blocks, 128, 0, stream>>>(p);
  return checked(last_error(), "launching top-k");
}

}  // namespace
}  // namespace gpu
}  // namespace detinfer

using namespace detinfer;

DETINFER_EXPORT const char* detinfer_gpu_moe_error() { return gpu::sentence; }
DETINFER_EXPORT int detinfer_gpu_moe_size() {
  return static_cast<int>(sizeof(GpuMoeGroup) + sizeof(GpuMoeProduct) + sizeof(GpuMoeCombine) + sizeof(GpuMoeTopK));
}

DETINFER_EXPORT int detinfer_gpu_moe_group(const GpuMoeGroup* args, void* stream) {
  if (args == nullptr || args->experts < 0 || args->experts > gpu::kMostExperts || args->tile_rows < 1 ||
      args->assignments < 0 || args->assignments > 0x7fffffff)
    return gpu::refuse(kBadArgument, "moe: at most 1,024 experts and 2^31 - 1 assignments");
  gpu::group<<<1, gpu::kMostExperts, 0, static_cast<gpu::Stream>(stream)>>>(*args);
  return gpu::checked(gpu::last_error(), "launching the sort by expert");
}

DETINFER_EXPORT int detinfer_gpu_moe_product(const GpuMoeProduct* args, void* stream) {
  if (args == nullptr || args->assignments < 0 || args->assignments > 0x7fffffff || args->n < 0 || args->k < 0 || args->places < 1)
    return gpu::refuse(kBadArgument, "moe: a size is out of range");
  const gpu::Stream on = static_cast<gpu::Stream>(stream);
  if (args->dtype == kBFloat16) return gpu::product<gpu::BFloat16>(*args, on);
  if (args->dtype == kFloat16) return gpu::product<gpu::Float16>(*args, on);
  return gpu::refuse(kBadArgument, "moe: products on the matrix unit are for bf16 and fp16");
}

DETINFER_EXPORT int detinfer_gpu_moe_combine(const GpuMoeCombine* args, void* stream) {
  if (args == nullptr || args->tokens < 0 || args->places < 1 || args->width < 0)
    return gpu::refuse(kBadArgument, "moe: a size is out of range");
  const gpu::Stream on = static_cast<gpu::Stream>(stream);
  if (args->dtype == kFloat32) return gpu::with_weights<gpu::Float32>(*args, on);
  if (args->dtype == kBFloat16) return gpu::with_weights<gpu::BFloat16>(*args, on);
  if (args->dtype == kFloat16) return gpu::with_weights<gpu::Float16>(*args, on);
  return gpu::refuse(kBadArgument, "moe: results are fp32, bf16 or fp16");
}

DETINFER_EXPORT int detinfer_gpu_moe_top_k(const GpuMoeTopK* args, void* stream) {
  if (args == nullptr || args->n < 1 || args->n > 1024 || args->count < 0 || args->count > args->n || args->rows < 0)
    return gpu::refuse(kBadArgument, "moe: top-k takes rows of 1 to 1,024 elements");
  const gpu::Stream on = static_cast<gpu::Stream>(stream);
  if (args->dtype == kFloat32) return gpu::run_top_k<gpu::Float32>(*args, on);
  if (args->dtype == kBFloat16) return gpu::run_top_k<gpu::BFloat16>(*args, on);
  if (args->dtype == kFloat16) return gpu::run_top_k<gpu::Float16>(*args, on);
  return gpu::refuse(kBadArgument, "moe: top-k is for fp32, bf16 and fp16");
}
