// Residual and RMSNorm of a row in the order of row_sum, which has 1024 lanes: element e of a row is in lane e mod 1024,
// and a lap of the row is 1024 elements, one for each lane.
//
// A warp has a chunk of a lap: 32 packs of E elements in eight groups of four, the groups 128 lanes apart, so that when
// lanes are halved the lanes of the eight meet first (by 512, 256, 128), inside the warp. What is left of all chunks is
// lanes 0 to 127. Every warp adds those up for itself, so nothing has to come back. Which blocks, warps and threads have
// which chunks and laps is speed alone: gpu/shared_row.h has few rows in mind, gpu/own_row.h many.
#pragma once

#include "values.h"

namespace detinfer {
namespace gpu {

static constexpr int kMostHidden = 16384;
static constexpr int kMostFused = 8192;  // elements of a row that is normalised by the kernel that reduces it
static constexpr int kLeftLanes = 128;   // of row_sum, where the blocks of a row meet

struct NormArgs {
  const char* residual;  // this and all that follow: aligned to 16 bytes
  const char* weight;    // hidden elements of T, or of fp32 if weight_fp32; null: no weight
  char* residual_out;
  char* out;
  int64_t rows;
  int32_t hidden;  // elements, a multiple of 8
  int32_t width;   // elements that the mean is over: squares of zeros behind them leave row_sum as it is
  int32_t weight_mode, residual_mode;
  int32_t blocks;  // of a row: 1, 2, 4 or 8, neighbours, launched as a group
  bool weight_fp32;
  float eps;
};

// Floats that lie side by side in shared memory.
template <int E> struct alignas(E >= 4 ? 16 : 8) Floats {
  float at[E];
};

// Where a warp's packs lie in a lap: kElements of a pack, kChunks of a lap.
template <class T, int kWords> struct Lap {
  static constexpr int kElements = kWords * T::kPerWord;
  static constexpr int kPacks = kRowLanes / kElements, kChunks = kPacks / 32;
  static constexpr int kPackedBytes = 4 * kWords, kBytes = kPacks * kPackedBytes;
  // The pack of thread `lane` of the warp that has `chunk`.
  static __device__ __forceinline__ int pack(int chunk, int lane) { return ((lane / 4) * kChunks + chunk) * 4 + lane % 4; }

  // The lanes of a chunk after those halvings that stay inside it: thread j and j + 4 hold the same, E of 4 E lanes.
  static __device__ __forceinline__ void halve(float (&sum)[kElements]) {
#pragma unroll
    for (int mask = 16; mask >= 4; mask /= 2)
#pragma unroll
      for (int e = 0; e < kElements; e++) sum[e] = add_rn(sum[e], from_lane_xor(sum[e], mask));
  }
  // Which of lanes 0 to 127 the first of those is.
  static __device__ __forceinline__ int left(int chunk, int lane) { return (chunk * 4 + lane % 4) * kElements; }
};

// Lanes 0 to 127 halved down to one, by each warp.
static __device__ __forceinline__ float sum_of_left(const float (&lanes)[kLeftLanes]) {
  const float* mine = lanes + 4 * (threadIdx.x % 4);
  const auto four = [&](int m) { return *reinterpret_cast<const Floats<4>*>(mine + 16 * m); };
  const auto both = [](const Floats<4>& a, const Floats<4>& b) {
    return Floats<4>{
        {add_rn(a.at[0], b.at[0]), add_rn(a.at[1], b.at[1]), add_rn(a.at[2], b.at[2]), add_rn(a.at[3], b.at[3])}};
  };
  const auto half = [&](int m) { return both(both(four(m), four(m + 4)), both(four(m + 2), four(m + 6))); };
  Floats<4> sum = both(half(0), half(1));
#pragma unroll
  for (int mask = 2; mask >= 1; mask /= 2)
#pragma unroll
    for (int i = 0; i < 4; i++) sum.at[i] = add_rn(sum.at[i], from_lane_xor(sum.at[i], mask));
  return add_rn(add_rn(sum.at[0], sum.at[2]), add_rn(sum.at[1], sum.at[3]));
}

// A word of the sum and of the residual: what residual_out stores, and in h what is normalised.
template <class T>
static __device__ __forceinline__ uint32_t add_word(uint32_t sum, uint32_t residual, bool rounds, float (&h)[T::kPerWord]) {
  float total[T::kPerWord];
#pragma unroll
  for (int i = 0; i < T::kPerWord; i++) total[i] = add_rn(T::get(sum, i), T::get(residual, i));
  const uint32_t out = T::put(total);
#pragma unroll
  for (int i = 0; i < T::kPerWord; i++) h[i] = rounds ? T::get(out, i) : total[i];
  return out;
}

// A word of the normalised row. One stream of instructions for every weight mode of order.h: in a small call the code is
// run once, and fetching it costs more than the selects.
template <class T> class NormWord {
 public:
  __device__ explicit NormWord(const NormArgs& args)
      : llama_(args.weight != nullptr && args.weight_mode == kLlama),
        gemma_(args.weight != nullptr && args.weight_mode == kGemma) {}
  __device__ __forceinline__ uint32_t operator()(const float* h, float r, const float (&weight)[T::kPerWord]) const {
    float scaled[T::kPerWord], v[T::kPerWord];
#pragma unroll
    for (int i = 0; i < T::kPerWord; i++) scaled[i] = mul_rn(h[i], r);
    const uint32_t rounded = T::put(scaled);
#pragma unroll
    for (int i = 0; i < T::kPerWord; i++)
      v[i] = mul_rn(llama_ ? T::get(rounded, i) : scaled[i], gemma_ ? add_rn(1.0f, weight[i]) : weight[i]);
    return T::put(v);
  }

 private:
  const bool llama_, gemma_;
};

// A word of ones: the weight where none is given. A product with 1 changes nothing.
template <class T> static __device__ __forceinline__ uint32_t word_of_ones() {
  const float ones[2] = {1.0f, 1.0f};
  return T::put(reinterpret_cast<const float(&)[T::kPerWord]>(ones));
}

}  // namespace gpu
}  // namespace detinfer
