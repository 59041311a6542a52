// A row that a group of blocks shares, a pack or a few of it a thread: for few rows, of which each takes as little time as
// can be. What is left of the chunks goes to all blocks of the group, through their shared memory.
#pragma once

#include "rms_norm.h"

namespace detinfer {
namespace gpu {

static constexpr int kMostRowBlocks = 8;
static constexpr int kSmallRowThreads = 256;  // of a block: groups fit on a device however its processors are wired
static constexpr int kRowThreads = 512;       // ... if they are fewer
// What kernels are built for: 72 registers a thread, so that a processor holds three small blocks or a large one.
static constexpr int kRowBound = 896;

// How a row is cut, for packs of `elements` and blocks of no more than `most` threads.
struct RowShape {
  int blocks, threads, packs;  // of a row; of a block; of a thread: 1, 2 or 4
  int shared_bytes;
  bool fits;
};
static inline RowShape row_shape(int hidden, int elements, int blocks, int most) {
  const int laps = (hidden + kRowLanes - 1) / kRowLanes, chunks = kRowLanes / (32 * elements) / blocks;
  RowShape shape = {blocks, 0, 1, laps * kRowLanes / blocks * static_cast<int>(sizeof(float)), false};
  for (;; shape.packs *= 2) {
    shape.threads = (laps + shape.packs - 1) / shape.packs * chunks * 32;
    shape.fits = shape.threads <= most;
    if (shape.fits || shape.packs == 4) return shape;
  }
}

// In shared memory. Two of each: a quick block of a group may be one row ahead.
struct RowMeeting {
  alignas(16) float lanes[2][kLeftLanes];
  Arrival arrival[2];
  uint32_t met;
};

// kWords: of a pack. K: packs of a thread, in neighbouring laps.
template <class T, int kWords, int K> class SharedRow {
 public:
  using L = Lap<T, kWords>;
  using Packed = Pack<kWords>;
  static constexpr int kElements = L::kElements;

  // The first `workers` warps of a block call every function, once a row, in this order; all threads the first two. row: the shared memory of RowShape.
  // Reads nothing but its arguments.
  __device__ SharedRow(const NormArgs& args, char* row, RowMeeting& meeting, int workers)
      : args_(args), meeting_(meeting), packs_(args.hidden / kElements), workers_(workers) {
    clear_first_warps(&meeting.met);
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int chunks = L::kChunks / args.blocks, here = warp % chunks;
    chunk_ = static_cast<int>(blockIdx.x) % args.blocks * chunks + here;
    first_lap_ = warp / chunks * K;
    lap_threads_ = chunks * 32;
    column_ = L::pack(chunk_, lane);
    first_ = column_ + first_lap_ * L::kPacks;
    count_ = first_ < packs_ ? (packs_ - first_ + L::kPacks - 1) / L::kPacks : 0;
    row_ = reinterpret_cast<Floats<kElements>*>(row) + here * 32 + lane;
    if (grouped()) {
      if (threadIdx.x == 0)
        for (Arrival& arrival : meeting.arrival) make(&arrival);
      meet_begin();
    }
  }
  // Before the first row.
  __device__ __forceinline__ void meet() const {
    if (grouped()) meet_end();
  }
  // This thread's packs are u = 0, ..., count() - 1, at most K of them that count here.
  __device__ __forceinline__ int count() const { return count_; }
  __device__ __forceinline__ bool has(int u) const { return u < count_; }
  __device__ __forceinline__ int64_t place(int64_t row, int u) const {
    return (row * packs_ + first_) * L::kPackedBytes + u * L::kBytes;
  }

  __device__ __forceinline__ void load_residual(int64_t row) {
#pragma unroll
    for (int u = 0; u < K; u++)
      if (has(u)) residual_[u] = *reinterpret_cast<const Packed*>(args_.residual + place(row, u));
  }
  __device__ __forceinline__ void load_weight() {
#pragma unroll
    for (int u = 0; u < K; u++) {
#pragma unroll
      for (int w = 0; w < kWords; w++) weight_[u].word[w] = word_of_ones<T>();
      if (args_.weight != nullptr && has(u)) weight_[u] = *reinterpret_cast<const Packed*>(args_.weight + place(0, u));
    }
  }

  // Takes in pack u of the reduced row, rounded to T, and stores residual_out.
  __device__ __forceinline__ void add(int64_t row, int u, const Packed& sum) {
    Packed out;
#pragma unroll
    for (int w = 0; w < kWords; w++)
      out.word[w] = add_word<T>(sum.word[w], residual_[u].word[w], args_.residual_mode == kRounded, h_of(u, w));
    *reinterpret_cast<Packed*>(args_.residual_out + place(row, u)) = out;
  }

  // 1 / sqrt(mean of squares + eps). turn: 0, 1, 2, ..., row by row.
  __device__ __forceinline__ float inverse_root_of_row(uint32_t turn) {
#pragma unroll
    for (int u = 0; u < K; u++)
      if (has(u)) row_[(first_lap_ + u) * lap_threads_] = h_[u];
    float(&lanes)[kLeftLanes] = meeting_.lanes[turn & 1u];
    Arrival* arrival = &meeting_.arrival[turn & 1u];
    if (grouped() && threadIdx.x == 0) expect(arrival, sizeof lanes);
    sync_first_warps(workers_, &meeting_.met, grouped() ? turn : 2 * turn);
    if (first_lap_ == 0) leave(lanes, arrival);
    if (grouped()) await(arrival, turn / 2 & 1u);
    else sync_first_warps(workers_, &meeting_.met, 2 * turn + 1);
    return inverse_root(sum_of_left(lanes), args_.width, args_.eps);
  }

  // Stores the normalised row.
  __device__ __forceinline__ void put(int64_t row, float r, bool good) const {
    const NormWord<T> norm(args_);
#pragma unroll
    for (int u = 0; u < K; u++) {
      if (!has(u)) continue;
      Packed out;
#pragma unroll
      for (int w = 0; w < kWords; w++) {
        float weight[T::kPerWord];
#pragma unroll
        for (int i = 0; i < T::kPerWord; i++) weight[i] = T::get(weight_[u].word[w], i);
        out.word[w] = norm(h_[u].at + w * T::kPerWord, r, weight);
      }
      *reinterpret_cast<Packed*>(args_.out + place(row, u)) = good ? out : poison<kWords>();
    }
  }

 private:
  // Instructions for groups are none for a block that was launched alone.
  __device__ __forceinline__ bool grouped() const { return kGroups && args_.blocks > 1; }
  __device__ __forceinline__ float (&h_of(int u, int w))[T::kPerWord] {
    return reinterpret_cast<float(&)[T::kPerWord]>(h_[u].at[w * T::kPerWord]);
  }
  // The first warp of a chunk: the chains of its lanes over all laps, then the halvings inside it.
  __device__ __forceinline__ void leave(float (&lanes)[kLeftLanes], Arrival* arrival) const {
    constexpr int kAtATime = 4;
    float sum[kElements];
#pragma unroll
    for (int e = 0; e < kElements; e++) sum[e] = -0.0f;
    for (int lap = 0; lap * L::kPacks < packs_; lap += kAtATime) {
      Floats<kElements> h[kAtATime];
#pragma unroll
      for (int i = 0; i < kAtATime; i++)
        if (column_ + (lap + i) * L::kPacks < packs_) h[i] = row_[(lap + i) * lap_threads_];
#pragma unroll
      for (int i = 0; i < kAtATime; i++)
        if (column_ + (lap + i) * L::kPacks < packs_) {
#pragma unroll
          for (int e = 0; e < kElements; e++) sum[e] = fma_rn(h[i].at[e], h[i].at[e], sum[e]);
        }
    }
    L::halve(sum);
    const int lane = static_cast<int>(threadIdx.x) % 32, block = lane / 4;  // four threads for each block
    if (block >= args_.blocks) return;
    float* at = lanes + L::left(chunk_, lane);
#pragma unroll
    for (int e = 0; e < kElements; e += 2)
      if (grouped()) send_floats(at + e, sum[e], sum[e + 1], arrival, block);
      else *reinterpret_cast<float2*>(at + e) = float2{sum[e], sum[e + 1]};
  }

  const NormArgs& args_;
  RowMeeting& meeting_;
  Floats<kElements>* row_;  // this thread's place in a lap, in shared memory
  const int packs_, workers_;
  int chunk_, first_lap_, column_, first_, count_, lap_threads_;
  Packed weight_[K], residual_[K];
  Floats<kElements> h_[K];
};

}  // namespace gpu
}  // namespace detinfer
