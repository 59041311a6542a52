// Tiles: larger pieces of data in rings of slots, each slot with a flag that is released after its data.
//
// A block owns a channel. Tile number s of a channel goes into slot s mod 8 of its ring; its flag holds s and the hash
// of the call. The block's last two warps wait for others, so that nobody else does: one tells the peers what has been
// stored (a release takes as long as what it follows takes to arrive), one watches for what they tell. In its turn k each
// other warp, a worker, stores its share of tile k, then takes in its share of tile k - 2; it takes in everything before
// its call ends. That order is the only flow control there is: docs/concepts/memory_ordering.md shows that six slots would
// do.
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

  __device__ __forceinline__ uint32_t* counter() const { return link_.counters + blockIdx.x; }
  // Source's part of a slot of `rank`'s ring.
  __device__ __forceinline__ char* slot(int rank, uint32_t sequence, int source) const {
#if DETINFER_MUTANT == 4  // one slot: nothing keeps a sender from overwriting what is being read
    const uint64_t turn = 0;
#else
    const uint64_t turn = sequence % kDepth;
#endif
    return link_.buffer[rank] + ring_.slots + ((blockIdx.x * kDepth + turn) * N + source) * ring_.slot_bytes;
  }

  // One warp, which has seen that the workers have stored tile `sequence`.
  __device__ __forceinline__ void tell(uint32_t sequence) const {
    const int t = static_cast<int>(threadIdx.x) % 32;
    if (t < N && t != link_.rank) store_release(flag(t, sequence, link_.rank), value(sequence));
  }

  // One warp: until every other rank has told tile `sequence`. False: that failed.
  __device__ __forceinline__ bool watch(uint32_t sequence) const {
    const int t = static_cast<int>(threadIdx.x) % 32;
    bool good = true;
    if (t < N && t != link_.rank) {
      const uint64_t* at = flag(link_.rank, sequence, t);
      Patience patience(link_);
      uint64_t found;
      while (static_cast<uint32_t>(found = load_acquire(at)) != sequence && good)
        good = !patience.over(t, sequence, static_cast<uint32_t>(found >> 32));
      if (good && found != value(sequence)) {
        look(link_, kOver, t, sequence, static_cast<uint32_t>(found >> 32));
        good = false;
      }
    }
    return every_lane(good);
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

// What the warps of a block tell each other, in shared memory.
class Desk {
 public:
  static constexpr int kHelpers = 64;  // threads that are no workers: the last of the block
  static __device__ __forceinline__ int workers() { return static_cast<int>(blockDim.x) - kHelpers; }
  static __device__ __forceinline__ bool tells() { return static_cast<int>(threadIdx.x) / 32 == workers() / 32; }
  static __device__ __forceinline__ bool watches() { return static_cast<int>(threadIdx.x) / 32 > workers() / 32; }

  // All threads of the block, before anything else.
  __device__ __forceinline__ void clear() {
    if (threadIdx.x < kCounts) stored_[threadIdx.x] = 0;
    if (threadIdx.x == 0) seen_ = failed_ = met_ = 0;
    __syncthreads();
  }
  // A worker warp has stored its share of tile number `tile` of this call, all rings' tiles in the order of storing.
  __device__ __forceinline__ void stored(uint32_t tile) { add(&stored_[tile % kCounts]); }
  // The teller: until every worker warp has stored its share of that tile. False: something failed.
  __device__ __forceinline__ bool all_stored(uint32_t tile) const {
    const uint32_t most = (tile / kCounts + 1) * static_cast<uint32_t>(workers() / 32);
    while (static_cast<int32_t>(peek(&stored_[tile % kCounts]) - most) < 0)
      if (peek(&failed_) != 0) return false;
    fence_block();
    return true;
  }
  // The watcher: the next tile of all rings is here, or none will be.
  __device__ __forceinline__ void seen(bool good) { add(good ? &seen_ : &failed_); }
  // A worker: until `tiles` are here. False: they will not be.
  __device__ __forceinline__ bool all_seen(uint32_t tiles) const {
    bool good = true;
    while (good && static_cast<int32_t>(peek(&seen_) - tiles) < 0) good = peek(&failed_) == 0;
    fence_block();
    acquire_for_all();
    return every_lane(good);
  }
  // A barrier of the workers; turn: 0, 1, 2, ...
  __device__ __forceinline__ void sync_workers(uint32_t turn) { sync_first_warps(workers() / 32, &met_, turn); }

 private:
  // Quick warps run ahead of a slow one: a single count would take their later tiles for its earlier one. No warp is
  // ever 16 tiles ahead (docs/concepts/memory_ordering.md).
  static constexpr uint32_t kCounts = 16;
  uint32_t stored_[kCounts], seen_, failed_, met_;
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

static constexpr int kTileThreads = 512;  // workers of a block at most
static constexpr int64_t kPackBytes = 16;

// `length` bytes at `in` into this rank's part of a slot: of every peer's ring, or (pull) of its own.
template <class T, int N, bool kPull>
static __device__ __forceinline__ void send_tile(const TileChannel<N>& channel, const char* in, int64_t length, bool aligned,
                                                 int rank, uint32_t sequence) {
  constexpr int U = 4;  // loads of a thread at a time
  const int64_t step = Desk::workers() * kPackBytes;
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

// `length` bytes from `in` to `to`, by all workers of the block.
template <class T>
static __device__ __forceinline__ void copy_tile(char* to, const char* in, int64_t length, bool to_aligned, bool in_aligned) {
  constexpr int U = 4;  // loads of a thread at a time
  const int64_t step = Desk::workers() * kPackBytes;
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
  const int64_t step = Desk::workers() * kPackBytes;
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

// A block's part in the exchange of `mine` tiles, the first of which is number `first`: for workers store(k, sequence) and
// two turns later take(k, sequence, good).
template <int N, class Store, class Take>
static __device__ __forceinline__ void exchange_tiles(const TileChannel<N>& channel, Desk& desk, uint32_t first, int64_t mine,
                                                      const Store& store, const Take& take) {
  const uint32_t tiles = static_cast<uint32_t>(mine);
  if (Desk::watches()) {
    bool good = true;
    for (uint32_t k = 0; k < tiles && good; k++) desk.seen(good = channel.watch(first + k));
  } else if (Desk::tells()) {  // a rank that failed lets its peers run out of time too
    for (uint32_t k = 0; k < tiles && desk.all_stored(k); k++) channel.tell(first + k);
  } else {
    bool good = true;
    for (uint32_t k = 0; k < tiles + 2; k++) {
      if (k < tiles) {
        store(static_cast<int64_t>(k), first + k);
        desk.stored(k);
      }
      if (k < 2) continue;
      good = good && desk.all_seen(k - 1);
      take(static_cast<int64_t>(k - 2), first + k - 2, good);
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) *channel.counter() = first + tiles - 1;
}

// One exchange of whole tiles: paths `push_tiles` (a rank writes its tile into every peer's ring) and `pull` (into its
// own ring, where the peers read it).
template <class T, int N, bool kPull>
__global__ void __launch_bounds__(kTileThreads + Desk::kHelpers, N <= 4 ? 2 : 1)
    one_shot_reduce(DETINFER_PARAMETER Link link, DETINFER_PARAMETER Ring ring, DETINFER_PARAMETER TileArgs args) {
  __shared__ Desk desk;
  desk.clear();
  wait_for_previous_kernel();
  const TileChannel<N> channel(link, ring);
  const uint32_t first = link.counters[blockIdx.x] + 1;
  const int64_t mine = tiles_of((args.bytes + args.tile_bytes - 1) / args.tile_bytes, blockIdx.x, gridDim.x);
  const auto begin_of = [&](int64_t k) { return (blockIdx.x + k * gridDim.x) * args.tile_bytes; };
  const auto length_of = [&](int64_t begin) {
    return args.bytes - begin < args.tile_bytes ? args.bytes - begin : args.tile_bytes;
  };
  exchange_tiles<N>(
      channel, desk, first, mine,
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
}

template <int N>
__global__ void __launch_bounds__(kTileThreads + Desk::kHelpers, N <= 4 ? 2 : 1)
    tile_gather(DETINFER_PARAMETER Link link, DETINFER_PARAMETER Ring ring, DETINFER_PARAMETER TileArgs args) {
  __shared__ Desk desk;
  desk.clear();
  wait_for_previous_kernel();
  const TileChannel<N> channel(link, ring);
  const uint32_t first = link.counters[blockIdx.x] + 1;
  const int64_t mine = tiles_of((args.bytes + args.tile_bytes - 1) / args.tile_bytes, blockIdx.x, gridDim.x);
  const int64_t step = Desk::workers() * kPackBytes;
  const auto begin_of = [&](int64_t k) { return (blockIdx.x + k * gridDim.x) * args.tile_bytes; };
  const auto length_of = [&](int64_t begin) {
    return args.bytes - begin < args.tile_bytes ? args.bytes - begin : args.tile_bytes;
  };
  exchange_tiles<N>(
      channel, desk, first, mine,
      [&](int64_t k, uint32_t sequence) {
        const int64_t begin = begin_of(k);
        send_tile<Bytes, N, false>(channel, args.in + begin, length_of(begin), args.in_aligned, link.rank, sequence);
      },
      [&](int64_t k, uint32_t sequence, bool good) {
        const int64_t begin = begin_of(k), length = length_of(begin);
        if (good && args.inner == args.bytes) {  // every rank's part lies in one piece
#pragma unroll
          for (int r = 0; r < N; r++)
            copy_tile<Bytes>(args.out + r * args.bytes + begin,
                             r == link.rank ? args.in + begin : channel.slot(link.rank, sequence, r), length,
                             args.out_aligned, r != link.rank || args.in_aligned);
          return;
        }
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
}

}  // namespace gpu
}  // namespace detinfer
