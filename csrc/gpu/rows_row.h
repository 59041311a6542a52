// A row held by the threads of a warp or of a block: which elements a thread has, row_sum's order over them, extremes.
//
// A thread loads packs of kPack neighbouring elements; all threads of the row load kRound elements in a round. Round k
// belongs to slot k mod kSlots, so that a thread's element e of slot s is one of row_sum's 1024 lanes, its elements come
// in ascending order, and the chains run in registers. The lane's number, from its highest bit down: slot; bits 4 and 3
// of the thread; the warp; bits 2 to 0 of the thread; the element in the pack. The halving goes down these bits: in
// registers, between threads, once through shared memory, between threads. Rows of at most one warp need no shared memory.
#pragma once

#include "../rows_gpu.h"
#include "rows_math.h"
#include "values.h"

namespace detinfer {
namespace gpu {

// kHold: packs of a row that a thread keeps; 0: it reads the row again for every pass. kAligned: all rows of all tensors
// start on the boundaries of packs and end with a whole one.
template <class Type, int kGroup_, int kWarps_, int kPack_, int kHold_, bool kAligned_> struct RowShape {
  using T = Type;
  static constexpr int kGroup = kGroup_, kWarps = kWarps_, kPack = kPack_, kHold = kHold_;
  static constexpr bool kAligned = kAligned_;
  static constexpr int kThreads = kWarps == 1 ? 128 : 32 * kWarps;  // of a block
  static constexpr int kRows = kWarps == 1 ? kThreads / kGroup : 1;  // of a block
  static constexpr int kRound = kGroup * kWarps * kPack;
  static constexpr int kAllSlots = kRowLanes / kRound;
  static constexpr int kSlots = kHold != 0 && kHold < kAllSlots ? kHold : kAllSlots;
  static constexpr bool kFewValues = kWarps == 1 && kHold != 0 && kHold * kPack <= 8;  // of a thread
  static constexpr int kAtOnce = kHold != 0 ? kHold : (32 / kPack > kSlots ? 32 / kPack : kSlots);
  static_assert(kWarps == 1 || kGroup == 32, "a row of several warps has all of their threads");
  static_assert(kRound <= kRowLanes && kAtOnce % kSlots == 0, "a round is at most one lane an element");
};

// `left` elements from `at`, widened; those past the end are `fill`. A pack of more than 16 bytes is several loads.
template <class T, int kPack, bool kAligned>
static __device__ __forceinline__ void load_values(float (&v)[kPack], const char* at, int64_t left, float fill) {
  constexpr int kWords = kPack * T::kBytes / 4 < 4 ? kPack * T::kBytes / 4 : 4, kEach = kWords * T::kPerWord;
#pragma unroll
  for (int part = 0; part < kPack; part += kEach) {
    Pack<kWords> pack;
    if constexpr (kAligned) pack = *reinterpret_cast<const Pack<kWords>*>(at + part * T::kBytes);
    else pack = load_pack<T, kWords>(at + part * T::kBytes, (left - part) * T::kBytes, false);
#pragma unroll
    for (int e = 0; e < kEach; e++) {
      v[part + e] = T::get(pack.word[e / T::kPerWord], e % T::kPerWord);
      if (!kAligned && part + e >= left) v[part + e] = fill;
    }
  }
}

template <class T, int kPack, bool kAligned>
static __device__ __forceinline__ void store_values(char* at, const float (&v)[kPack], int64_t left) {
  constexpr int kWords = kPack * T::kBytes / 4 < 4 ? kPack * T::kBytes / 4 : 4, kEach = kWords * T::kPerWord;
#pragma unroll
  for (int part = 0; part < kPack; part += kEach) {
    Pack<kWords> pack;
#pragma unroll
    for (int w = 0; w < kWords; w++) {
      float words[T::kPerWord];
#pragma unroll
      for (int i = 0; i < T::kPerWord; i++) words[i] = v[part + w * T::kPerWord + i];
      pack.word[w] = T::put(words);
    }
    if constexpr (kAligned) *reinterpret_cast<Pack<kWords>*>(at + part * T::kBytes) = pack;
    else store_pack<T, kWords>(at + part * T::kBytes, pack, (left - part) * T::kBytes, false);
  }
}

// The place of a thread in its row, and what the row's threads find together.
template <class Shape> class Row {
 public:
  static constexpr int kPack = Shape::kPack, kSlots = Shape::kSlots, kWarps = Shape::kWarps;
  struct Shared {  // of a block; one for each sum and each extreme of a row
    float lanes[kWarps == 1 ? 1 : kWarps * 32 * (kPack / 4 > 1 ? kPack / 4 : 1)];
  };
  using Lanes = float[kSlots][kPack];

  __device__ __forceinline__ Row(int64_t rows, int64_t n) : n_(n) {
    const int thread = static_cast<int>(threadIdx.x), j = thread & 31;
    row_ = kWarps == 1 ? static_cast<int64_t>(blockIdx.x) * Shape::kRows + thread / Shape::kGroup : blockIdx.x;
    const int position = kWarps == 1 ? thread % Shape::kGroup : ((j >> 3) * kWarps + thread / 32) * 8 + (j & 7);
    first_ = position * kPack;
    const int64_t left = row_ < rows ? n - first_ : 0;
    packs_ = left <= 0 ? 0 : static_cast<int>((left + Shape::kRound - 1) / Shape::kRound);
  }
  __device__ __forceinline__ int64_t row() const { return row_; }
  __device__ __forceinline__ bool leads() const { return first_ == 0 && packs_ > 0; }  // one thread of the row
  __device__ __forceinline__ int packs() const { return packs_; }  // of this thread
  __device__ __forceinline__ int64_t element(int k) const { return first_ + static_cast<int64_t>(k) * Shape::kRound; }
  __device__ __forceinline__ int64_t left(int k) const { return n_ - element(k); }

  static __device__ __forceinline__ void clear(Lanes& lane) {
#pragma unroll
    for (int s = 0; s < kSlots; s++)
#pragma unroll
      for (int e = 0; e < kPack; e++) lane[s][e] = -0.0f;
  }

  // The halving of the lanes: row_sum, in every thread of the row. All threads of the block call it.
  static __device__ __forceinline__ float halve(Lanes& lane, Shared& shared) {
#pragma unroll
    for (int half = kSlots / 2; half >= 1; half /= 2)
#pragma unroll
      for (int s = 0; s < half; s++)
#pragma unroll
        for (int e = 0; e < kPack; e++) lane[s][e] = add_rn(lane[s][e], lane[s + half][e]);
    float(&v)[kPack] = lane[0];
    const int thread = static_cast<int>(threadIdx.x);
    int count = kPack;  // values that are left here: a step between threads leaves each with half of them
#pragma unroll
    for (int mask = Shape::kGroup / 2; mask >= 1; mask /= 2) {
      if (kWarps > 1 && mask == 4) across_warps(v, count, shared);
      if (count == 1) {
        v[0] = add_rn(v[0], from_lane_xor(v[0], mask));
        continue;
      }
      const bool upper = (thread & mask) != 0;
      count /= 2;
#pragma unroll
      for (int i = 0; i < kPack / 2; i++) {
        if (i >= count) continue;
        const float kept = upper ? v[i + count] : v[i], given = upper ? v[i] : v[i + count];
        v[i] = add_rn(kept, from_lane_xor(given, mask));
      }
    }
    // The elements of a pack, now in different threads: the highest bit was dealt out first.
#pragma unroll
    for (int mask = Shape::kGroup / 2, elements = kPack; elements > 1; mask /= 2, elements /= 2)
      v[0] = add_rn(v[0], from_lane_xor(v[0], mask));
    return v[0];
  }

  // join(a, b) over the values of all threads of the row, for joins that have no order.
  template <class Join> static __device__ __forceinline__ float together(float value, Shared& shared, const Join& join) {
#pragma unroll
    for (int mask = Shape::kGroup / 2; mask >= 1; mask /= 2) value = join(value, from_lane_xor(value, mask));
    if constexpr (kWarps > 1) {
      const int thread = static_cast<int>(threadIdx.x);
      if ((thread & 31) == 0) shared.lanes[thread / 32] = value;
      __syncthreads();
      value = shared.lanes[0];
#pragma unroll
      for (int w = 1; w < kWarps; w++) value = join(value, shared.lanes[w]);
    }
    return value;
  }

 private:
  static __device__ __forceinline__ void across_warps(float (&v)[kPack], int count, Shared& shared) {
    const int thread = static_cast<int>(threadIdx.x), j = thread & 31;
#pragma unroll
    for (int i = 0; i < kPack; i++)
      if (i < count) shared.lanes[thread * count + i] = v[i];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kPack; i++) {
      if (i >= count) continue;
      float of[kWarps];
#pragma unroll
      for (int w = 0; w < kWarps; w++) of[w] = shared.lanes[(w * 32 + j) * count + i];
#pragma unroll
      for (int half = kWarps / 2; half >= 1; half /= 2)
#pragma unroll
        for (int w = 0; w < kWarps / 2; w++)
          if (w < half) of[w] = add_rn(of[w], of[w + half]);
      v[i] = of[0];
    }
  }

  int64_t n_, row_;
  int first_, packs_;
};

// Values of a row, kPack at a time: get(k, v) computes pack k of this thread; those of a held row are computed once.
template <class Shape, class Get> class Values {
 public:
  static constexpr int kPack = Shape::kPack, kAtOnce = Shape::kAtOnce;

  __device__ __forceinline__ Values(const Row<Shape>& row, const Get& get) : row_(row), get_(get) {
    if constexpr (Shape::kHold != 0) {
#pragma unroll
      for (int k = 0; k < kAtOnce; k++)
        if (k < row_.packs()) get_(k, held_[k]);
    }
  }

  // use(k, slot, values) for every pack in ascending order; it may change the values of a held row.
  template <class Use> __device__ __forceinline__ void each(const Use& use) {
    if constexpr (Shape::kHold != 0) {
#pragma unroll
      for (int k = 0; k < kAtOnce; k++)
        if (k < row_.packs()) use(k, k % Shape::kSlots, held_[k]);
    } else {
      for (int start = 0; start < row_.packs(); start += kAtOnce) {
        float v[kAtOnce][kPack];
#pragma unroll
        for (int k = 0; k < kAtOnce; k++)
          if (start + k < row_.packs()) get_(start + k, v[k]);
#pragma unroll
        for (int k = 0; k < kAtOnce; k++)
          if (start + k < row_.packs()) use(start + k, k % Shape::kSlots, v[k]);
      }
    }
  }

 private:
  const Row<Shape>& row_;
  const Get& get_;
  float held_[kAtOnce][kPack];
};

}  // namespace gpu
}  // namespace detinfer
