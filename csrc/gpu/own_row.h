// Rows of one small block each: for many rows, where every block of a processor is at another place of its row. A thread
// has the packs of one place in all laps, so that the chains of its lanes run as it takes them in. What it has to normalise
// waits in shared memory, where registers would keep blocks out.
#pragma once

#include "rms_norm.h"
#include "tiles.h"

namespace detinfer {
namespace gpu {

template <class T> using OwnLap = Lap<T, 4>;
template <class T> static constexpr int kOwnThreads = 32 * OwnLap<T>::kChunks;
static inline int own_row_bytes(int hidden) {  // of shared memory
  return (hidden + kRowLanes - 1) / kRowLanes * kRowLanes * static_cast<int>(sizeof(float));
}

// kWide: the weight is fp32, whatever the rows are.
template <class T, bool kWide> class OwnRow {
 public:
  using L = OwnLap<T>;
  using Packed = Pack<4>;
  static constexpr int kElements = L::kElements;

  // The first kOwnThreads of a block call every function, once a row, in this order; desk: null where there are no others.
  // row: own_row_bytes() of shared memory.
  __device__ OwnRow(const NormArgs& args, char* row, float (&lanes)[2][kLeftLanes], Desk* desk)
      : args_(args), lanes_(lanes), desk_(desk), row_(reinterpret_cast<Floats<4>*>(row) + threadIdx.x) {
    const int packs = args.hidden / kElements;
    column_ = L::pack(static_cast<int>(threadIdx.x) / 32, static_cast<int>(threadIdx.x) % 32);
    laps_ = column_ < packs ? (packs - column_ + L::kPacks - 1) / L::kPacks : 0;
  }
  // Bytes from a row's beginning.
  __device__ __forceinline__ int place(int lap) const { return column_ * L::kPackedBytes + lap * L::kBytes; }

  // Takes in the reduced row, rounded to T, U packs at a time, and stores residual_out. fetch(at) reads what there is at
  // byte `at` of the row; sum(fetched) is the pack. Returns the sum of squares; turn: 0, 1, 2, ..., row by row.
  template <int U, class Fetch, class Sum>
  __device__ __forceinline__ float take(int64_t row, uint32_t turn, const Fetch& fetch, const Sum& sum_of) {
    const int64_t begin = row * args_.hidden * T::kBytes;
    float sum[kElements];
#pragma unroll
    for (int e = 0; e < kElements; e++) sum[e] = -0.0f;
    for (int lap = 0; lap < laps_; lap += U) {
      decltype(fetch(0)) fetched[U];
      Packed residual[U];
#pragma unroll
      for (int u = 0; u < U; u++)
        if (lap + u < laps_) {
          fetched[u] = fetch(place(lap + u));
          residual[u] = *reinterpret_cast<const Packed*>(args_.residual + begin + place(lap + u));
        }
#pragma unroll
      for (int u = 0; u < U; u++)
        if (lap + u < laps_) {
          const Packed x = sum_of(fetched[u]);
          Packed out;
          float h[4][T::kPerWord];
#pragma unroll
          for (int w = 0; w < 4; w++)
            out.word[w] = add_word<T>(x.word[w], residual[u].word[w], args_.residual_mode == kRounded, h[w]);
          *reinterpret_cast<Packed*>(args_.residual_out + begin + place(lap + u)) = out;
          const float* flat = h[0];
#pragma unroll
          for (int e = 0; e < kElements; e += 4)
            *at(lap + u, e) = Floats<4>{{flat[e], flat[e + 1], flat[e + 2], flat[e + 3]}};
#pragma unroll
          for (int e = 0; e < kElements; e++) sum[e] = fma_rn(flat[e], flat[e], sum[e]);
        }
    }
    L::halve(sum);
    float(&lanes)[kLeftLanes] = lanes_[turn & 1u];  // two: a quick warp may be one row ahead
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if (lane < 4) {
#pragma unroll
      for (int e = 0; e < kElements; e += 4)
        *reinterpret_cast<Floats<4>*>(lanes + L::left(static_cast<int>(threadIdx.x) / 32, lane) + e) =
            Floats<4>{{sum[e], sum[e + 1], sum[e + 2], sum[e + 3]}};
    }
    if (desk_ != nullptr) desk_->sync_workers(turn);
    else __syncthreads();
    return sum_of_left(lanes);
  }

  // Stores the normalised row, of the sum of its squares.
  __device__ __forceinline__ void put(int64_t row, float squares, bool good) const {
    const float r = inverse_root(squares, args_.width, args_.eps);
    const NormWord<T> norm(args_);
    char* out_row = args_.out + row * args_.hidden * T::kBytes;
#pragma unroll 4
    for (int lap = 0; lap < laps_; lap++) {
      float weight[4][T::kPerWord], h[kElements];
      load_weight(lap, weight);
#pragma unroll
      for (int e = 0; e < kElements; e += 4) *reinterpret_cast<Floats<4>*>(h + e) = *at(lap, e);
      Packed out;
#pragma unroll
      for (int w = 0; w < 4; w++) out.word[w] = norm(h + w * T::kPerWord, r, weight[w]);
      *reinterpret_cast<Packed*>(out_row + place(lap)) = good ? out : poison<4>();
    }
  }

 private:
  // Four of this thread's floats of a lap, element e on; only this thread comes here.
  __device__ __forceinline__ Floats<4>* at(int lap, int e) const {
    return row_ + (lap * (kElements / 4) + e / 4) * kOwnThreads<T>;
  }
  __device__ __forceinline__ void load_weight(int lap, float (&weight)[4][T::kPerWord]) const {
    if constexpr (kWide && T::kPerWord != 1) {
      const float* from = reinterpret_cast<const float*>(args_.weight) + (column_ + lap * L::kPacks) * kElements;
#pragma unroll
      for (int e = 0; e < kElements; e++) weight[e / T::kPerWord][e % T::kPerWord] = from[e];
    } else {
      Packed words = {{word_of_ones<T>(), word_of_ones<T>(), word_of_ones<T>(), word_of_ones<T>()}};
      if (args_.weight != nullptr) words = *reinterpret_cast<const Packed*>(args_.weight + place(lap));
#pragma unroll
      for (int w = 0; w < 4; w++)
#pragma unroll
        for (int i = 0; i < T::kPerWord; i++) weight[w][i] = T::get(words.word[w], i);
    }
  }

  const NormArgs& args_;
  float (&lanes_)[2][kLeftLanes];
  Desk* desk_;
  Floats<4>* row_;
  int column_, laps_;
};

}  // namespace gpu
}  // namespace detinfer
