// Softmax and log_softmax of rows as long as a vocabulary: a cluster of 8 blocks takes a row.
//
// Block b has lanes 128 b, ..., 128 b + 127 of row_sum: 128 neighbours of every 1024 elements. All its threads compute
// exponentials, of the packs that they hold, into shared memory; one thread a lane then adds them in order. The upper
// three halvings run between blocks, through each other's shared memory, the others inside every block.
#pragma once

#include "rows_shapes.h"
#include "rows_softmax.h"

namespace detinfer {
namespace gpu {

static constexpr int kClusterBlocks = 8, kClusterThreads = 512, kBlockLanes = kRowLanes / kClusterBlocks;
static constexpr int64_t kMostOfCluster = 262144;

#if DETINFER_CLUSTERS

// kHold: packs of 16 bytes that a thread has. Two blocks share a multiprocessor where the packs are few.
template <class T, int kHold, bool kLog>
static __global__ void __launch_bounds__(kClusterThreads, kHold <= 10 ? 2 : 1) cluster_softmax(DETINFER_PARAMETER GpuRowsArgs p) {
  constexpr int kPack = 16 / T::kBytes, kPacks = kBlockLanes / kPack;  // of a block, of each 1024 elements
  extern __shared__ __align__(16) float terms[];  // the exponentials: 128 of each 1024 elements
  __shared__ float maxima[kClusterThreads / 32], block_max, lanes[kBlockLanes], joined[kBlockLanes];
  const int thread = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x) % kClusterBlocks;
  const int64_t row = blockIdx.x / kClusterBlocks;
  const char* x = row_of(p.x, row, p.x_row, T::kBytes);
  // Pack k of this thread: of the `chunk`-th 1024 elements.
  const int first_chunk = thread / kPacks, at = block * kBlockLanes + thread % kPacks * kPack;
  constexpr int kChunks = kClusterThreads / kPacks;
  const auto element = [&](int k) { return static_cast<int64_t>(first_chunk + k * kChunks) * kRowLanes + at; };
  const auto term_of = [&](int k) { return terms + (first_chunk + k * kChunks) * kBlockLanes + thread % kPacks * kPack; };

  constexpr int kWords = kPack / T::kPerWord;
  Pack<kWords> held[kHold];
  const auto value = [&](int k, int i) { return T::get(held[k].word[i / T::kPerWord], i % T::kPerWord); };
  float most = -__builtin_inff();
#pragma unroll
  for (int k = 0; k < kHold; k++)
    if (element(k) < p.n) held[k] = *reinterpret_cast<const Pack<kWords>*>(x + element(k) * T::kBytes);
#pragma unroll
  for (int k = 0; k < kHold; k++)
    if (element(k) < p.n) {
#pragma unroll
      for (int i = 0; i < kPack; i++) most = fmaxf(most, value(k, i));
    }
#pragma unroll
  for (int mask = 16; mask >= 1; mask /= 2) most = fmaxf(most, from_lane_xor(most, mask));
  if (thread % 32 == 0) maxima[thread / 32] = most;
  __syncthreads();
  if (thread < 32) {
    float found = maxima[thread % (kClusterThreads / 32)];
#pragma unroll
    for (int mask = 16; mask >= 1; mask /= 2) found = fmaxf(found, from_lane_xor(found, mask));
    if (thread == 0) block_max = found;
  }
  meet_begin();
  meet_end();
  most = from_block(&block_max, thread % kClusterBlocks);
#pragma unroll
  for (int mask = 4; mask >= 1; mask /= 2) most = fmaxf(most, from_lane_xor(most, mask));

#pragma unroll
  for (int k = 0; k < kHold; k++) {
    if (element(k) >= p.n) continue;
    float v[kPack], e[kPack];
#pragma unroll
    for (int i = 0; i < kPack; i++) v[i] = value(k, i);
    exponentials<kPack>(e, v, most);
    float* to = term_of(k);
#pragma unroll
    for (int i = 0; i < kPack; i += 4) *reinterpret_cast<float4*>(to + i) = make_float4(e[i], e[i + 1], e[i + 2], e[i + 3]);
  }
  __syncthreads();
  if (thread < kBlockLanes) {
    const int lane = block * kBlockLanes + thread;
    const int count = p.n <= lane ? 0 : static_cast<int>((p.n - lane + kRowLanes - 1) / kRowLanes);
    float sum = -0.0f;
    int c = 0;
    for (; c + 16 <= count; c += 16) {
      float next[16];
#pragma unroll
      for (int i = 0; i < 16; i++) next[i] = terms[(c + i) * kBlockLanes + thread];
#pragma unroll
      for (int i = 0; i < 16; i++) sum = add_rn(sum, next[i]);
    }
    for (; c < count; c++) sum = add_rn(sum, terms[c * kBlockLanes + thread]);
    lanes[thread] = sum;
  }
  meet_begin();
  meet_end();
  if (thread < kBlockLanes) {
    float of[kClusterBlocks];
#pragma unroll
    for (int b = 0; b < kClusterBlocks; b++) of[b] = from_block(&lanes[thread], b);
#pragma unroll
    for (int half = kClusterBlocks / 2; half >= 1; half /= 2)
#pragma unroll
      for (int b = 0; b < half; b++) of[b] = add_rn(of[b], of[b + half]);
    joined[thread] = of[0];
  }
  meet_begin();  // a block may end once the others have read from it
  __syncthreads();
  const int j = thread % 32;
  float sum = add_rn(add_rn(joined[j], joined[j + 64]), add_rn(joined[j + 32], joined[j + 96]));
#pragma unroll
  for (int mask = 16; mask >= 1; mask /= 2) sum = add_rn(sum, from_lane_xor(sum, mask));

  const float log_sum = kLog ? log_of_sum(sum) : 0.0f;
  const Divisor divided(kLog ? 1.0f : sum);
#pragma unroll
  for (int k = 0; k < kHold; k++) {
    if (element(k) >= p.n) continue;
    float v[kPack];
#pragma unroll
    for (int i = 0; i < kPack; i++) v[i] = kLog ? add_rn(add_rn(value(k, i), -most), -log_sum) : divided(term_of(k)[i]);
    if (T::kPerWord == 1 || p.out_dtype == kFloat32)
      store_values<Float32, kPack, true>(row_of(p.out, row, p.n, 4) + element(k) * 4, v, kPack);
    else
      store_values<T, kPack, true>(row_of(p.out, row, p.n, T::kBytes) + element(k) * T::kBytes, v, kPack);
  }
  meet_end();
}

static inline bool cluster_takes(const GpuRowsArgs& p) {
  static const bool can = [] {
    bool found = false;
    return can_overlap(&found) == kNoError && found;  // compute capability 9.0, as clusters
  }();
  return can && p.n <= kMostOfCluster && p.rows <= 0x7fffffff / kClusterBlocks && rows_are_aligned(p);
}

template <class T, int kHold, bool kLog> static int launch_softmax_cluster(const GpuRowsArgs& p, Stream stream) {
  const auto kernel = cluster_softmax<T, kHold, kLog>;
  const int bytes = static_cast<int>((p.n + kRowLanes - 1) / kRowLanes) * kBlockLanes * static_cast<int>(sizeof(float));
  return launched(launch_cluster(kernel, static_cast<int>(p.rows), kClusterBlocks, kClusterThreads, bytes, stream, p));
}

template <class T> static int run_cluster(const GpuRowsArgs& p, Stream stream) {
  if (!cluster_takes(p))
    return refuse_rows(kNotSupported, "rows: a cluster takes up to 262,144 elements a row on 16-byte boundaries, on "
                                      "compute capability 9.0 or newer");
  constexpr int kUnit = T::kBytes == 4 ? 2 : 1;  // packs of 8 elements
  const bool log = p.op == kLogSoftmax;
  if (p.n <= 65536) return log ? launch_softmax_cluster<T, 2 * kUnit, true>(p, stream) : launch_softmax_cluster<T, 2 * kUnit, false>(p, stream);
  if (p.n <= 163840) return log ? launch_softmax_cluster<T, 5 * kUnit, true>(p, stream) : launch_softmax_cluster<T, 5 * kUnit, false>(p, stream);
  return log ? launch_softmax_cluster<T, 8 * kUnit, true>(p, stream) : launch_softmax_cluster<T, 8 * kUnit, false>(p, stream);
}

#else

static inline bool cluster_takes(const GpuRowsArgs&) { return false; }
template <class T> static int run_cluster(const GpuRowsArgs&, Stream) {
  return refuse_rows(kNotSupported, "rows: this device has no clusters of blocks");
}

#endif

}  // namespace gpu
}  // namespace detinfer
