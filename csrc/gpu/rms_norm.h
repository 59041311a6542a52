// Residual and RMSNorm of a row by one block, in the order of row_sum.
//
// A packet is 8 bytes. Thread t of 1024 / (elements of a packet) has packets t, t + threads, t + 2 threads, ...: these are
// the elements of its own lanes of row_sum, ascending, so the chains of the lanes run in its registers. Then the lanes
// meet in shared memory, and every warp halves them for itself.
#pragma once

#include "values.h"

namespace detinfer {
namespace gpu {

static constexpr int kMostHidden = 16384;
static constexpr int kMostFused = 8192;  // elements of a row that is normalised by the kernel that reduces it

struct NormArgs {
  const char* residual;  // this and all that follow: aligned to 16 bytes
  const char* weight;    // hidden elements of T, or of fp32 if weight_fp32; null: no weight
  char* residual_out;
  char* out;
  int64_t rows;
  int32_t hidden;  // elements, a multiple of 8
  int32_t weight_mode, residual_mode;
  bool weight_fp32;
  float eps;
};

static __device__ __forceinline__ Pack<2> load_packet(const char* at) { return *reinterpret_cast<const Pack<2>*>(at); }

template <class T> static constexpr int kNormThreads = kRowLanes / (2 * T::kPerWord);  // of a block

// kWide: the weight may be fp32 beside 16-bit rows.
template <class T, int kMost, bool kWide> class RowNorm {
 public:
  static constexpr int kHold = kMost / kRowLanes;  // packets of a row that a thread has
  static constexpr int kElements = 2 * T::kPerWord;  // of a packet
  static constexpr int kThreads = kNormThreads<T>;

  // All threads of a block of kThreads call every function, once a row, in this order. lanes: in shared memory.
  __device__ RowNorm(const NormArgs& args, float (&lanes)[kRowLanes])
      : args_(args), lanes_(lanes), packets_(args.hidden / kElements) {
    const float ones[2] = {1.0f, 1.0f};
    const uint32_t one = T::put(reinterpret_cast<const float(&)[T::kPerWord]>(ones));
    const bool given = args.weight != nullptr && !(kWide && args.weight_fp32 && T::kPerWord != 1);
#pragma unroll
    for (int k = 0; k < kHold; k++) {
      weight_[k] = Pack<2>{{one, one}};  // without a weight: a product with 1 changes nothing
      if (given && has(k)) weight_[k] = load_packet(args.weight + packet(k) * 8);
    }
  }
  __device__ __forceinline__ int packet(int k) const { return static_cast<int>(threadIdx.x) + k * kThreads; }
  __device__ __forceinline__ bool has(int k) const { return packet(k) < packets_; }
  __device__ __forceinline__ int packets() const { return packets_; }
  __device__ __forceinline__ int64_t place(int64_t row, int k) const { return (row * packets_ + packet(k)) * 8; }

  __device__ __forceinline__ void load_residual(int64_t row) {
#pragma unroll
    for (int k = 0; k < kHold; k++)
      if (has(k)) residual_[k] = load_packet(args_.residual + place(row, k));
  }

  // Takes in packet k of the reduced row, rounded to T, and stores residual_out.
  __device__ __forceinline__ void add(int64_t row, int k, const Pack<2>& sum) {
    Pack<2> out;
#pragma unroll
    for (int w = 0; w < 2; w++) {
      float total[T::kPerWord];
#pragma unroll
      for (int i = 0; i < T::kPerWord; i++) total[i] = add_rn(T::get(sum.word[w], i), T::get(residual_[k].word[w], i));
      out.word[w] = T::put(total);
#pragma unroll
      for (int i = 0; i < T::kPerWord; i++)
        h_[k][w * T::kPerWord + i] = args_.residual_mode == kRounded ? T::get(out.word[w], i) : total[i];
    }
    *reinterpret_cast<Pack<2>*>(args_.residual_out + place(row, k)) = out;
  }

  // 1 / sqrt(mean of squares + eps).
  __device__ __forceinline__ float inverse_root_of_row() const {
    float sum[kElements];
#pragma unroll
    for (int e = 0; e < kElements; e++) sum[e] = -0.0f;
#pragma unroll
    for (int k = 0; k < kHold; k++)
      if (has(k)) {
#pragma unroll
        for (int e = 0; e < kElements; e++) sum[e] = fma_rn(h_[k][e], h_[k][e], sum[e]);
      }
    __syncthreads();  // the row before has been read
#pragma unroll
    for (int e = 0; e < kElements; e++) lanes_[threadIdx.x * kElements + e] = sum[e];
    __syncthreads();
    // Thread j of a warp: lanes 4 j, ..., 4 j + 3 of each 128. By 512, 256 and 128, then by 64 to 4 between threads.
    const int j = static_cast<int>(threadIdx.x & 31u);
    float lane[8][4];
#pragma unroll
    for (int m = 0; m < 8; m++) {
      const float4 four = *reinterpret_cast<const float4*>(lanes_ + 128 * m + 4 * j);
      lane[m][0] = four.x;
      lane[m][1] = four.y;
      lane[m][2] = four.z;
      lane[m][3] = four.w;
    }
#pragma unroll
    for (int half = 4; half >= 1; half /= 2)
#pragma unroll
      for (int m = 0; m < half; m++)
#pragma unroll
        for (int i = 0; i < 4; i++) lane[m][i] = add_rn(lane[m][i], lane[m + half][i]);
#pragma unroll
    for (int mask = 16; mask >= 1; mask /= 2)
#pragma unroll
      for (int i = 0; i < 4; i++) lane[0][i] = add_rn(lane[0][i], from_lane_xor(lane[0][i], mask));
    const float total = add_rn(add_rn(lane[0][0], lane[0][2]), add_rn(lane[0][1], lane[0][3]));
    return inverse_root(total, args_.hidden, args_.eps);
  }

  // Stores the normalised row. One stream of instructions for every weight mode of order.h: the code is run once, and
  // fetching it costs more than the selects.
  __device__ __forceinline__ void put(int64_t row, float r, bool good) const {
    const bool llama = args_.weight != nullptr && args_.weight_mode == kLlama;
    const bool gemma = args_.weight != nullptr && args_.weight_mode == kGemma;
#pragma unroll
    for (int k = 0; k < kHold; k++) {
      if (!has(k)) continue;
      Pack<2> out;
#pragma unroll
      for (int w = 0; w < 2; w++) {
        float v[T::kPerWord];
#pragma unroll
        for (int i = 0; i < T::kPerWord; i++) {
          const float weight = weight_at(k, w, i), scaled = mul_rn(h_[k][w * T::kPerWord + i], r);
          v[i] = mul_rn(llama ? rounded<T>(scaled) : scaled, gemma ? add_rn(1.0f, weight) : weight);
        }
        out.word[w] = T::put(v);
      }
      *reinterpret_cast<Pack<2>*>(args_.out + place(row, k)) = good ? out : poison<2>();
    }
  }

 private:
  __device__ __forceinline__ float weight_at(int k, int w, int i) const {
    if constexpr (kWide && T::kPerWord != 1)
      if (args_.weight_fp32 && args_.weight != nullptr)
        return reinterpret_cast<const float*>(args_.weight)[packet(k) * kElements + w * T::kPerWord + i];
    return T::get(weight_[k].word[w], i);
  }

  const NormArgs& args_;
  float (&lanes_)[kRowLanes];
  const int packets_;
  Pack<2> weight_[kHold], residual_[kHold];
  float h_[kHold][kElements];
};

}  // namespace gpu
}  // namespace detinfer
