// Path `push`: data and flag in one word, so that nothing has to be ordered and nobody waits for a barrier.
//
// A packet is two 64-bit words, each four bytes of data and the number of the exchange (the epoch); each word is
// written and read whole. A block owns a channel: a region of every rank's buffer with two banks, used in turn, each
// with room for every source's packets and a header that carries the hash of the call. The epoch counts the calls of
// this channel and lives on the device, so that a captured graph may be replayed.
//
// Why no old packet is taken for a new one, and why no packet is overwritten before it was read:
// docs/concepts/memory_ordering.md.
#pragma once

#include "link.h"
#include "values.h"

namespace detinfer {
namespace gpu {

struct Packets {
  uint64_t offset;    // of the first region in a rank's buffer
  uint32_t capacity;  // packets of one source in a bank, less the header
};

static constexpr int kPacketBytes = 8;  // of data

// Every 2^31 calls, the bank that is not in use loses its old epochs, so that none returns after 2^32.
static __device__ __noinline__ void wipe(Words* words, int64_t count, uint32_t epoch) {
  const uint64_t flag = static_cast<uint64_t>(epoch) << 32;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) store_relaxed(words + i, Words{flag, flag});
  fence_system();
  __syncthreads();
}

// One block's channel in one call.
template <int N> class PacketChannel {
 public:
  __device__ PacketChannel(const Link& link, const Packets& packets)
      : link_(link), epoch_(link.counters[blockIdx.x] + 1), stride_(packets.capacity + 1) {
#if DETINFER_MUTANT == 5  // one bank: a fast rank overwrites what a slow one has not read
    const uint64_t bank = 0;
#else
    const uint64_t bank = epoch_ & 1u;
#endif
    region_ = packets.offset + (blockIdx.x * 2u + bank) * N * stride_ * sizeof(Words);
    if ((epoch_ & 0x7fffffffu) <= 1) {
      const uint64_t other = packets.offset + (blockIdx.x * 2u + (bank ^ 1u)) * N * stride_ * sizeof(Words);
      wipe(reinterpret_cast<Words*>(link.buffer[link.rank] + other), N * stride_, epoch_ - 1);
    }
    const int t = static_cast<int>(threadIdx.x);
    if (t < N && t != link.rank) put(t, 0, link.hash, link.hash);
  }

  __device__ __forceinline__ void send(int peer, int64_t packet, const Pack<2>& data) const {
    put(peer, packet + 1, data.word[0], data.word[1]);
  }

  // Every other rank's packets number packet, packet + step, ..., U of them, those below `end`; got[u][rank] is left alone.
  // All threads of a warp call this together, with nothing to read too. False: the wait failed or a peer makes another
  // call.
  template <int U>
  __device__ __forceinline__ bool receive(int64_t packet, int64_t step, int64_t end, Pack<2> (&got)[U][N]) {
    if (!good_) return false;
    const int source = static_cast<int>(threadIdx.x & 31u) % N;  // whose header this lane checks
    const bool check = !checked_ && source != link_.rank;
    Words header = {}, word[U][N];
    Patience patience(link_);
    bool there;
    do {
      int missing = source;
      if (check) header = load_relaxed(at(link_.rank, source, 0));
#pragma unroll
      for (int u = 0; u < U; u++) {
        if (packet + u * step >= end) continue;
#pragma unroll
        for (int r = 0; r < N; r++)
          if (r != link_.rank) word[u][r] = load_relaxed(at(link_.rank, r, packet + u * step + 1));
      }
      there = !check || has_epoch(header);
#pragma unroll
      for (int u = 0; u < U; u++) {
        if (packet + u * step >= end) continue;
#pragma unroll
        for (int r = 0; r < N; r++) {
          if (r == link_.rank || has_epoch(word[u][r])) continue;
          there = false;
          missing = r;
        }
      }
      if (!there && patience.over(missing, epoch_, 0)) good_ = false;
    } while (!there && good_);
    if (!checked_) {
      if (good_ && check && static_cast<uint32_t>(header.low) != link_.hash) {
        report(link_, kMismatch, source, epoch_, static_cast<uint32_t>(header.low));
        good_ = false;
      }
      good_ = every_lane(good_);
      checked_ = true;
    }
#pragma unroll
    for (int u = 0; u < U; u++)
#pragma unroll
      for (int r = 0; r < N; r++) {
        got[u][r].word[0] = static_cast<uint32_t>(word[u][r].low);
        got[u][r].word[1] = static_cast<uint32_t>(word[u][r].high);
      }
    return good_;
  }

  // Ends the call; all threads of the block.
  __device__ __forceinline__ void close() const {
    __syncthreads();  // every thread has read the counter
    if (threadIdx.x == 0) link_.counters[blockIdx.x] = epoch_;
  }

 private:
  __device__ __forceinline__ Words* at(int rank, int source, int64_t index) const {
    return reinterpret_cast<Words*>(link_.buffer[rank] + region_) + source * stride_ + index;
  }
  __device__ __forceinline__ bool has_epoch(const Words& word) const {
    return static_cast<uint32_t>(word.low >> 32) == epoch_ && static_cast<uint32_t>(word.high >> 32) == epoch_;
  }
  __device__ __forceinline__ void put(int peer, int64_t index, uint32_t first, uint32_t second) const {
    const uint64_t flag = static_cast<uint64_t>(epoch_) << 32;
    store_relaxed(at(peer, link_.rank, index), Words{flag | first, flag | second});
  }

  const Link& link_;
  const uint32_t epoch_;
  const int64_t stride_;
  uint64_t region_;
  bool good_ = true, checked_ = false;
};

// What a reducing or gathering kernel moves. A part is what one destination gets.
struct PushArgs {
  const char* in;
  char* out;
  int64_t bytes;        // of a part
  int64_t in_stride;    // bytes from one destination's part to the next; 0: all get the same part
  int64_t inner;        // all_gather: bytes of a rank that lie side by side in `out`
  int32_t per_channel;  // packets
  bool in_aligned, out_aligned;
  Reduce how;
};

template <class T, int N> static __device__ __forceinline__ void push_parts(const PacketChannel<N>& channel, const PushArgs& args,
                                                                             int rank, int64_t first, int64_t last) {
  for (int64_t i = first + threadIdx.x; i < last; i += blockDim.x) {
    const int64_t at = i * kPacketBytes;
    Pack<2> data = load_pack<T, 2>(args.in + at, args.bytes - at, args.in_aligned);
#pragma unroll
    for (int step = 1; step < N; step++) {
      const int peer = after<N>(rank, step);
      if (args.in_stride != 0) data = load_pack<T, 2>(args.in + peer * args.in_stride + at, args.bytes - at, args.in_aligned);
      channel.send(peer, i - first, data);
    }
  }
}

// all_reduce and reduce_scatter.
template <class T, int N> __global__ void __launch_bounds__(512, 1) push_reduce(DETINFER_PARAMETER Link link, DETINFER_PARAMETER Packets packets, DETINFER_PARAMETER PushArgs args) {
  wait_for_previous_kernel();
  const int64_t all = (args.bytes + kPacketBytes - 1) / kPacketBytes;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * args.per_channel;
  const int64_t last = first + args.per_channel < all ? first + args.per_channel : all;
  PacketChannel<N> channel(link, packets);
  push_parts<T, N>(channel, args, link.rank, first, last);
  for (int64_t base = first; base < last; base += blockDim.x) {
    const int64_t i = base + threadIdx.x, at = i * kPacketBytes;
    const bool active = i < last;
    Pack<2> own = {}, got[1][N];
    if (active) own = load_pack<T, 2>(args.in + link.rank * args.in_stride + at, args.bytes - at, args.in_aligned);
    const bool good = channel.template receive<1>(i - first, 0, last - first, got);
    if (!active) continue;
#if DETINFER_MUTANT == 6  // every rank starts at itself
    const int turn = link.rank;
#else
    const int turn = 0;
#endif
    const Pack<2> sum = reduce_pack<T, N, 2>(args.how, [&](int r) {
      if (turn != 0) r = after<N>(r, turn);
      return r == link.rank ? own : got[0][r];
    });
    store_pack<T, 2>(args.out + at, good ? sum : poison<2>(), args.bytes - at, args.out_aligned);
  }
  channel.close();
}

template <int N> __global__ void __launch_bounds__(512, 1) push_gather(DETINFER_PARAMETER Link link, DETINFER_PARAMETER Packets packets, DETINFER_PARAMETER PushArgs args) {
  wait_for_previous_kernel();
  const int64_t all = (args.bytes + kPacketBytes - 1) / kPacketBytes;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * args.per_channel;
  const int64_t last = first + args.per_channel < all ? first + args.per_channel : all;
  PacketChannel<N> channel(link, packets);
  push_parts<Bytes, N>(channel, args, link.rank, first, last);
  for (int64_t base = first; base < last; base += blockDim.x) {
    const int64_t i = base + threadIdx.x, at = i * kPacketBytes;
    const bool active = i < last;
    Pack<2> own = {}, got[1][N];
    if (active) own = load_pack<Bytes, 2>(args.in + at, args.bytes - at, args.in_aligned);
    const bool good = channel.template receive<1>(i - first, 0, last - first, got);
    if (!active) continue;
#pragma unroll
    for (int r = 0; r < N; r++)
      store_gathered<N, 2>(args.out, !good ? poison<2>() : r == link.rank ? own : got[0][r], at, r, args.inner, args.bytes,
                           args.out_aligned);
  }
  channel.close();
}

}  // namespace gpu
}  // namespace detinfer
