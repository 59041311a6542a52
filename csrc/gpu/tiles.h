// Tiles: larger pieces of data in rings of slots, each slot with a flag that is released after its data.
//
// A block owns a channel. Tile number s of a channel goes into slot s mod 8 of its ring; its flag holds s and the hash
// of the call. In its turn k a block signals tile k - 1, stores tile k, and takes in tile k - 2: what was stored in a turn
// is on its way while the block adds, so the release that follows finds it arrived. A block takes in everything before
// its call ends. That order is the only flow control there is: docs/concepts/memory_ordering.md shows that six slots
// would do.
#pragma once

#include "link.h"
#include "values.h"

namespace detinfer {
namespace gpu {

static constexpr uint32_t kDepth = 8;

struct Ring {
  uint64_t slots, flags;  // offsets in a rank's buffer
  uint32_t slot_bytes;    // of one source in one slot
};

template <int N> class TileChannel {
 public:
  __device__ TileChannel(const Link& link, const Ring& ring) : link_(link), ring_(ring) {}

  // Source's part of a slot of `rank`'s ring.
  __device__ __forceinline__ char* slot(int rank, uint32_t sequence, int source) const {
#if DETINFER_MUTANT == 4  // one slot: nothing keeps a sender from overwriting what is being read
    const uint64_t turn = 0;
#else
    const uint64_t turn = sequence % kDepth;
#endif
    return link_.buffer[rank] + ring_.slots + ((blockIdx.x * kDepth + turn) * N + source) * ring_.slot_bytes;
  }

  // After a barrier that follows the block's stores of tile `sequence`.
  __device__ __forceinline__ void signal(uint32_t sequence) const {
    const int t = static_cast<int>(threadIdx.x);
    if (t < N && t != link_.rank) store_release(flag(t, sequence, link_.rank), value(sequence));
  }

  // All threads of the block: until every other rank has signalled tile `sequence`. False: that failed.
  __device__ __forceinline__ bool wait(uint32_t sequence) const {
    const int t = static_cast<int>(threadIdx.x);
    bool good = true;
    if (t < N && t != link_.rank) {
      const uint64_t* at = flag(link_.rank, sequence, t);
      Patience patience(link_);
      uint64_t found;
      while (static_cast<uint32_t>(found = load_acquire(at)) != sequence && good)
        good = !patience.over(t, sequence, static_cast<uint32_t>(found >> 32));
      if (good && found != value(sequence)) {
        report(link_, kMismatch, t, sequence, static_cast<uint32_t>(found >> 32));
        good = false;
      }
    }
    good = __syncthreads_and(good) != 0;
    acquire_for_all();
    return good;
  }

 private:
  __device__ __forceinline__ uint64_t value(uint32_t sequence) const {
    return static_cast<uint64_t>(link_.hash) << 32 | sequence;
  }
  __device__ __forceinline__ uint64_t* flag(int rank, uint32_t sequence, int source) const {
    return reinterpret_cast<uint64_t*>(link_.buffer[rank] + ring_.flags) +
           (blockIdx.x * kDepth + sequence % kDepth) * kMostRanks + source;
  }
  const Link& link_;
  const Ring& ring_;
};

struct TileArgs {
  const char* in;
  char* out;
  int64_t bytes;       // all_reduce: of the message; reduce_scatter and all_gather: of a rank's part
  int64_t tile_bytes;  // a multiple of 16, at most slot_bytes
  int64_t inner;       // all_gather: bytes of a rank that lie side by side in `out`
  bool in_aligned, out_aligned;
  Reduce how;
};

// Tiles that block b of `blocks` has of `all`: b, b + blocks, ...
static __device__ __forceinline__ int64_t tiles_of(int64_t all, int64_t block, int64_t blocks) {
  return all > block ? (all - block + blocks - 1) / blocks : 0;
}

static constexpr int kTileThreads = 512;
static constexpr int64_t kPackBytes = 16;

// `length` bytes at `in` into this rank's part of a slot: of every peer's ring, or (pull) of its own.
template <class T, int N, bool kPull>
static __device__ __forceinline__ void send_tile(const TileChannel<N>& channel, const char* in, int64_t length, bool aligned,
                                                 int rank, uint32_t sequence) {
  constexpr int U = 4;  // loads of a thread at a time
  const int64_t step = blockDim.x * kPackBytes;
  int64_t at = threadIdx.x * kPackBytes;
  if (aligned)
    for (; at + (U - 1) * step + kPackBytes <= length; at += U * step) {
      Pack<4> pack[U];
#pragma unroll
      for (int u = 0; u < U; u++) pack[u] = *reinterpret_cast<const Pack<4>*>(in + at + u * step);
#pragma unroll
      for (int hop = kPull ? 0 : 1; hop < (kPull ? 1 : N); hop++) {
        char* slot = channel.slot(after<N>(rank, hop), sequence, rank) + at;
#pragma unroll
        for (int u = 0; u < U; u++) *reinterpret_cast<Pack<4>*>(slot + u * step) = pack[u];
      }
    }
  for (; at < length; at += step) {
    const Pack<4> pack = load_pack<T, 4>(in + at, length - at, aligned);
#pragma unroll
    for (int hop = kPull ? 0 : 1; hop < (kPull ? 1 : N); hop++)
      *reinterpret_cast<Pack<4>*>(channel.slot(after<N>(rank, hop), sequence, rank) + at) = pack;
  }
}

// `length` bytes from `in` to `to`, by all threads of the block.
template <class T>
static __device__ __forceinline__ void copy_tile(char* to, const char* in, int64_t length, bool to_aligned, bool in_aligned) {
  constexpr int U = 4;  // loads of a thread at a time
  const int64_t step = blockDim.x * kPackBytes;
  int64_t at = threadIdx.x * kPackBytes;
  if (to_aligned && in_aligned)
    for (; at + (U - 1) * step + kPackBytes <= length; at += U * step) {
      Pack<4> pack[U];
#pragma unroll
      for (int u = 0; u < U; u++) pack[u] = *reinterpret_cast<const Pack<4>*>(in + at + u * step);
#pragma unroll
      for (int u = 0; u < U; u++) *reinterpret_cast<Pack<4>*>(to + at + u * step) = pack[u];
    }
  for (; at < length; at += step)
    store_pack<T, 4>(to + at, load_pack<T, 4>(in + at, length - at, in_aligned), length - at, to_aligned);
}

// The reduction of `length` bytes at `in` (this rank's) and in the slots of the others, U packs of a thread at a time.
// take(at, pack) gets each result.
template <class T, int N, class From, class Take>
static __device__ __forceinline__ void reduce_tile(const char* in, int64_t length, bool aligned, Reduce how, int rank, bool good,
                                                   const From& from, const Take& take) {
  constexpr int U = N == 2 ? 2 : 1;
  const int64_t step = blockDim.x * kPackBytes;
  int64_t at = threadIdx.x * kPackBytes;
  if (aligned && good)
    for (; at + (U - 1) * step + kPackBytes <= length; at += U * step) {
      Pack<4> pack[U][N];
#pragma unroll
      for (int r = 0; r < N; r++) {
        const char* from_r = (r == rank ? in : from(r)) + at;
#pragma unroll
        for (int u = 0; u < U; u++) pack[u][r] = *reinterpret_cast<const Pack<4>*>(from_r + u * step);
      }
#pragma unroll
      for (int u = 0; u < U; u++) take(at + u * step, reduce_pack<T, N, 4>(how, [&](int r) { return pack[u][r]; }));
    }
  for (; at < length; at += step) {
    Pack<4> pack[N];
#pragma unroll
    for (int r = 0; r < N; r++)
      pack[r] = r == rank ? load_pack<T, 4>(in + at, length - at, aligned) : *reinterpret_cast<const Pack<4>*>(from(r) + at);
    take(at, good ? reduce_pack<T, N, 4>(how, [&](int r) { return pack[r]; }) : poison<4>());
  }
}

// The turns of a block with `mine` tiles: store(k), signal(k) a turn later, take(k, good) a turn after that. The barrier
// in wait() of a turn follows the stores of that turn, so it serves the signal of the next; the first two have their own.
template <int N, class Store, class Take>
static __device__ __forceinline__ void exchange_tiles(const TileChannel<N>& channel, uint32_t first, int64_t mine,
                                                      const Store& store, const Take& take) {
  bool good = true;
  for (int64_t k = 0; k < mine + 2; k++) {
    const uint32_t sequence = first + static_cast<uint32_t>(k);
    if (k >= 1 && k <= mine && good) {  // a rank that failed lets its peers run out of time too
      if (k < 3) __syncthreads();
      channel.signal(sequence - 1);
    }
    if (k < mine) store(k, sequence);
    if (k >= 2) {
      if (good) good = channel.wait(sequence - 2);
      take(k - 2, sequence - 2, good);
    }
  }
}

// One exchange of whole tiles: paths `push_tiles` (a rank writes its tile into every peer's ring) and `pull` (into its
// own ring, where the peers read it).
template <class T, int N, bool kPull>
__global__ void __launch_bounds__(kTileThreads, N <= 4 ? 2 : 1)
    one_shot_reduce(DETINFER_PARAMETER Link link, DETINFER_PARAMETER Ring ring, DETINFER_PARAMETER TileArgs args) {
  wait_for_previous_kernel();
  const TileChannel<N> channel(link, ring);
  const uint32_t first = link.counters[blockIdx.x] + 1;
  const int64_t mine = tiles_of((args.bytes + args.tile_bytes - 1) / args.tile_bytes, blockIdx.x, gridDim.x);
  const auto begin_of = [&](int64_t k) { return (blockIdx.x + k * gridDim.x) * args.tile_bytes; };
  const auto length_of = [&](int64_t begin) {
    return args.bytes - begin < args.tile_bytes ? args.bytes - begin : args.tile_bytes;
  };
  exchange_tiles<N>(
      channel, first, mine,
      [&](int64_t k, uint32_t sequence) {
        const int64_t begin = begin_of(k);
        send_tile<T, N, kPull>(channel, args.in + begin, length_of(begin), args.in_aligned, link.rank, sequence);
      },
      [&](int64_t k, uint32_t sequence, bool good) {
        const int64_t begin = begin_of(k), length = length_of(begin);
        reduce_tile<T, N>(
            args.in + begin, length, args.in_aligned, args.how, link.rank, good,
            [&](int r) { return channel.slot(kPull ? r : link.rank, sequence, r); },
            [&](int64_t at, const Pack<4>& pack) {
              store_pack<T, 4>(args.out + begin + at, pack, length - at, args.out_aligned);
            });
      });
  __syncthreads();
  if (threadIdx.x == 0) link.counters[blockIdx.x] = first + static_cast<uint32_t>(mine) - 1;
}

template <int N>
__global__ void __launch_bounds__(kTileThreads, N <= 4 ? 2 : 1)
    tile_gather(DETINFER_PARAMETER Link link, DETINFER_PARAMETER Ring ring, DETINFER_PARAMETER TileArgs args) {
  wait_for_previous_kernel();
  const TileChannel<N> channel(link, ring);
  const uint32_t first = link.counters[blockIdx.x] + 1;
  const int64_t mine = tiles_of((args.bytes + args.tile_bytes - 1) / args.tile_bytes, blockIdx.x, gridDim.x);
  const int64_t step = blockDim.x * kPackBytes;
  const auto begin_of = [&](int64_t k) { return (blockIdx.x + k * gridDim.x) * args.tile_bytes; };
  const auto length_of = [&](int64_t begin) {
    return args.bytes - begin < args.tile_bytes ? args.bytes - begin : args.tile_bytes;
  };
  exchange_tiles<N>(
      channel, first, mine,
      [&](int64_t k, uint32_t sequence) {
        const int64_t begin = begin_of(k);
        send_tile<Bytes, N, false>(channel, args.in + begin, length_of(begin), args.in_aligned, link.rank, sequence);
      },
      [&](int64_t k, uint32_t sequence, bool good) {
        const int64_t begin = begin_of(k), length = length_of(begin);
        for (int64_t at = threadIdx.x * kPackBytes; at < length; at += step) {
#pragma unroll
          for (int r = 0; r < N; r++) {
            Pack<4> pack;
            if (r == link.rank) pack = load_pack<Bytes, 4>(args.in + begin + at, length - at, args.in_aligned);
            else pack = good ? *reinterpret_cast<const Pack<4>*>(channel.slot(link.rank, sequence, r) + at) : poison<4>();
            store_gathered<N, 4>(args.out, pack, begin + at, r, args.inner, args.bytes, args.out_aligned);
          }
        }
      });
  __syncthreads();
  if (threadIdx.x == 0) link.counters[blockIdx.x] = first + static_cast<uint32_t>(mine) - 1;
}

}  // namespace gpu
}  // namespace detinfer
