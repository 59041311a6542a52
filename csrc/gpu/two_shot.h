// Path `two_shot` and reduce_scatter: a tile has a part for every rank. Each rank sends every part to its owner; the
// owner adds ranks 0, 1, ..., N-1, whoever it is, and for all_reduce sends the result to everybody.
//
// Two rings. In its turn k a worker stores its share of the parts of tile k, reduces that of this rank's part of tile k - 2
// and stores the sums, and takes in the sums of tile k - 4.
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
__global__ void __launch_bounds__(kTileThreads + Desk::kHelpers, N <= 4 ? 2 : 1)
    two_shot_reduce(DETINFER_PARAMETER Link link, DETINFER_PARAMETER Ring parts_ring, DETINFER_PARAMETER Ring sums_ring,
                    DETINFER_PARAMETER PartArgs args) {
  __shared__ Desk desk;
  desk.clear();
  wait_for_previous_kernel();
  const Parts<N, kScatter> parts(args);
  const TileChannel<N> to_owner(link, parts_ring), from_owner(link, sums_ring);
  const uint32_t first = link.counters[blockIdx.x] + 1;
  const uint32_t first_sum = kScatter ? 0 : args.gather_counters[blockIdx.x] + 1;
  const int64_t mine = tiles_of(parts.tiles(), blockIdx.x, gridDim.x);
  const uint32_t tiles = static_cast<uint32_t>(mine);
  // What is told and seen, in this order: the parts of tile k, then, if there are sums, those of tile k - 2.
  if (Desk::watches()) {
    bool good = true;
    for (uint32_t k = 0; k < tiles + (kScatter ? 0 : 2) && good; k++) {
      if (k < tiles) desk.seen(good = to_owner.watch(first + k));
      if (!kScatter && k >= 2 && good) desk.seen(good = from_owner.watch(first_sum + k - 2));
    }
  } else if (Desk::tells()) {  // a rank that failed lets its peers run out of time too
    uint32_t stored = 0;
    for (uint32_t k = 0; k < tiles + (kScatter ? 0 : 2); k++) {
      if (k < tiles) {
        if (!desk.all_stored(stored++)) break;
        to_owner.tell(first + k);
      }
      if (!kScatter && k >= 2) {
        if (!desk.all_stored(stored++)) break;
        from_owner.tell(first_sum + k - 2);
      }
    }
  } else {
    bool good = true;
    uint32_t seen = 0, stored = 0;
    for (uint32_t k = 0; k < tiles + (kScatter ? 2 : 4); k++) {
      if (k < tiles) {
        const int64_t tile = blockIdx.x + static_cast<int64_t>(k) * gridDim.x;
#pragma unroll
        for (int hop = 1; hop < N; hop++) {
          const int owner = after<N>(link.rank, hop);
          const int64_t begin = parts.begin(tile, owner), length = parts.length(begin);
          char* slot = to_owner.slot(owner, first + k, link.rank);
          copy_tile<T>(slot, parts.input(begin, owner), length, true, args.in_aligned);
        }
        desk.stored(stored++);
      }
      if (k >= 2 && k < tiles + 2) {
        const uint32_t now = k - 2;
        const int64_t begin = parts.begin(blockIdx.x + static_cast<int64_t>(now) * gridDim.x, link.rank);
        const int64_t length = parts.length(begin);
        good = good && desk.all_seen(++seen);
        reduce_tile<T, N>(
            parts.input(begin, link.rank), length, args.in_aligned, args.how, link.rank, good,
            [&](int r) { return to_owner.slot(link.rank, first + now, r); },
            [&](int64_t at, const Pack<4>& pack) {
              store_pack<T, 4>(args.out + begin + at, pack, length - at, args.out_aligned);
              if constexpr (!kScatter) {
#pragma unroll
                for (int hop = 1; hop < N; hop++)
                  *reinterpret_cast<Pack<4>*>(from_owner.slot(after<N>(link.rank, hop), first_sum + now, link.rank) + at) =
                      pack;
              }
            });
        if constexpr (!kScatter) desk.stored(stored++);
      }
      if (!kScatter && k >= 4) {
        const uint32_t now = k - 4;
        good = good && desk.all_seen(++seen);
#pragma unroll
        for (int hop = 1; hop < N; hop++) {
          const int owner = after<N>(link.rank, hop);
          const int64_t begin = parts.begin(blockIdx.x + static_cast<int64_t>(now) * gridDim.x, owner);
          const int64_t length = parts.length(begin);
          const char* slot = from_owner.slot(link.rank, first_sum + now, owner);
          if (good) copy_tile<T>(args.out + begin, slot, length, args.out_aligned, true);
          else
            for (int64_t at = threadIdx.x * kPackBytes; at < length; at += Desk::workers() * kPackBytes)
              store_pack<T, 4>(args.out + begin + at, poison<4>(), length - at, args.out_aligned);
        }
      }
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    *to_owner.counter() = first + tiles - 1;
    if (!kScatter) args.gather_counters[blockIdx.x] = first_sum + tiles - 1;
  }
}

}  // namespace gpu
}  // namespace detinfer
