// Path `two_shot` and reduce_scatter: a tile has a part for every rank. Each rank sends every part to its owner; the
// owner adds ranks 0, 1, ..., N-1, whoever it is, and for all_reduce sends the result to everybody.
//
// Two rings. In its turn k a block signals the parts of tile k - 1 and the sums of tile k - 3, stores the parts of tile k,
// reduces its own part of tile k - 2, and takes in the sums of tile k - 4.
#pragma once

#include "tiles.h"

namespace detinfer {
namespace gpu {

struct PartArgs {
  const char* in;
  char* out;
  int64_t bytes;       // all_reduce: of the message; reduce_scatter: of a rank's slice
  int64_t part_bytes;  // a multiple of 16, at most either ring's slot_bytes
  uint32_t* gather_counters;
  bool in_aligned, out_aligned;
  Reduce how;
};

template <int N, bool kScatter> class Parts {
 public:
  __device__ explicit Parts(const PartArgs& args) : args_(args) {}
  __device__ int64_t tiles() const {
    const int64_t tile = kScatter ? args_.part_bytes : N * args_.part_bytes;
    return (args_.bytes + tile - 1) / tile;
  }
  // Where part `owner` of a tile begins in the output of an all_reduce, or in every slice of a reduce_scatter.
  __device__ __forceinline__ int64_t begin(int64_t tile, int owner) const {
    return (kScatter ? tile : tile * N + owner) * args_.part_bytes;
  }
  __device__ __forceinline__ int64_t length(int64_t begin) const {
    const int64_t left = args_.bytes - begin;
    return left < args_.part_bytes ? left : args_.part_bytes;  // none, or negative: nothing to do
  }
  __device__ __forceinline__ const char* input(int64_t begin, int owner) const {
    return args_.in + begin + (kScatter ? owner * args_.bytes : 0);
  }

 private:
  const PartArgs& args_;
};

template <class T, int N, bool kScatter>
__global__ void __launch_bounds__(kTileThreads, N <= 4 ? 2 : 1) two_shot_reduce(DETINFER_PARAMETER Link link, DETINFER_PARAMETER Ring parts_ring, DETINFER_PARAMETER Ring sums_ring, DETINFER_PARAMETER PartArgs args) {
  wait_for_previous_kernel();
  const Parts<N, kScatter> parts(args);
  const TileChannel<N> to_owner(link, parts_ring), from_owner(link, sums_ring);
  const uint32_t first = link.counters[blockIdx.x] + 1;
  const uint32_t first_sum = kScatter ? 0 : args.gather_counters[blockIdx.x] + 1;
  const int64_t mine = tiles_of(parts.tiles(), blockIdx.x, gridDim.x);
  bool good = true;
  for (int64_t k = 0; k < mine + (kScatter ? 2 : 4); k++) {
    const uint32_t now = static_cast<uint32_t>(k);
    const bool parts_due = k >= 1 && k <= mine, sums_due = !kScatter && k >= 3 && k < mine + 3;
    if (good && (parts_due || sums_due)) {  // a rank that failed lets its peers run out of time too
      if (kScatter ? k < 3 : k < 5) __syncthreads();  // else a wait of the last turn was after the stores
      if (parts_due) to_owner.signal(first + now - 1);
      if (sums_due) from_owner.signal(first_sum + now - 3);
    }
    if (k < mine) {
      const int64_t tile = blockIdx.x + k * gridDim.x;
#pragma unroll
      for (int hop = 1; hop < N; hop++) {
        const int owner = after<N>(link.rank, hop);
        const int64_t begin = parts.begin(tile, owner), length = parts.length(begin);
        char* slot = to_owner.slot(owner, first + now, link.rank);
        copy_tile<T>(slot, parts.input(begin, owner), length, true, args.in_aligned);
      }
    }
    if (k >= 2 && k < mine + 2) {
      const int64_t begin = parts.begin(blockIdx.x + (k - 2) * gridDim.x, link.rank), length = parts.length(begin);
      if (good) good = to_owner.wait(first + now - 2);
      reduce_tile<T, N>(
          parts.input(begin, link.rank), length, args.in_aligned, args.how, link.rank, good,
          [&](int r) { return to_owner.slot(link.rank, first + now - 2, r); },
          [&](int64_t at, const Pack<4>& pack) {
            store_pack<T, 4>(args.out + begin + at, pack, length - at, args.out_aligned);
            if constexpr (!kScatter) {
#pragma unroll
              for (int hop = 1; hop < N; hop++)
                *reinterpret_cast<Pack<4>*>(from_owner.slot(after<N>(link.rank, hop), first_sum + now - 2, link.rank) + at) =
                    pack;
            }
          });
    }
    if (!kScatter && k >= 4) {
      if (good) good = from_owner.wait(first_sum + now - 4);
#pragma unroll
      for (int hop = 1; hop < N; hop++) {
        const int owner = after<N>(link.rank, hop);
        const int64_t begin = parts.begin(blockIdx.x + (k - 4) * gridDim.x, owner), length = parts.length(begin);
        const char* slot = from_owner.slot(link.rank, first_sum + now - 4, owner);
        if (good) copy_tile<T>(args.out + begin, slot, length, args.out_aligned, true);
        else
          for (int64_t at = threadIdx.x * kPackBytes; at < length; at += blockDim.x * kPackBytes)
            store_pack<T, 4>(args.out + begin + at, poison<4>(), length - at, args.out_aligned);
      }
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    link.counters[blockIdx.x] = first + static_cast<uint32_t>(mine) - 1;
    if (!kScatter) args.gather_counters[blockIdx.x] = first_sum + static_cast<uint32_t>(mine) - 1;
  }
}

}  // namespace gpu
}  // namespace detinfer
