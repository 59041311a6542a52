// Path `push` of bytes: data and flag in one word, so that nothing has to be ordered and nobody waits for a barrier. Sums
// go by blanks.h, in half the words; bytes that may be anything cannot.
//
// A packet is two 64-bit words, each four bytes of data and the number of the exchange (the epoch); each word is
// written and read whole. A block owns a channel: a region of every rank's buffer with two banks, used in turn, each
// with room for every source's packets and a header that carries the hash of the call. The epoch counts the calls of
// this channel and lives on the device, so that a captured graph may be replayed.
//
// Why no old packet is taken for a new one, and why no packet is overwritten before it was read:
// docs/concepts/memory_ordering.md.
#pragma once

#include "blanks.h"

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
  // Reads nothing but its arguments: what can be worked out while the kernel before still runs. Then open().
  __device__ PacketChannel(const Link& link, const Packets& packets)
      : link_(link), source_bytes_((packets.capacity + 1) * static_cast<uint32_t>(sizeof(Words))), room_(packets.offset) {
    room_ += static_cast<uint64_t>(blockIdx.x) * (2u * N) * source_bytes_;
  }
  __device__ __forceinline__ void open() {
    epoch_ = link_.counters[blockIdx.x] + 1;
#if DETINFER_MUTANT == 5  // one bank: a fast rank overwrites what a slow one has not read
    const uint32_t bank = 0;
#else
    const uint32_t bank = epoch_ & 1u;
#endif
    if ((epoch_ & 0x7fffffffu) <= 1) {
      char* other = link_.buffer[link_.rank] + room_ + (bank ^ 1u) * (N * source_bytes_);
      wipe(reinterpret_cast<Words*>(other), N * source_bytes_ / sizeof(Words), epoch_ - 1);
    }
    room_ += bank * (N * source_bytes_);
    here_ = link_.buffer[link_.rank] + room_;
    const int t = static_cast<int>(threadIdx.x);
    if (t < N && t != link_.rank) put(t, 0, link_.hash, link_.hash);
  }

  __device__ __forceinline__ void send(int peer, int packet, const Pack<2>& data) const {
    put(peer, packet + 1, data.word[0], data.word[1]);
  }

  // All ranks' packets number packet, packet + 32, ..., `count` of them but no more than U; this rank's are `own`.
  // All threads of a warp call this together, with nothing to read too. False: the wait failed or a peer makes another
  // call.
  template <int U>
  __device__ __forceinline__ bool receive(int packet, int count, const Pack<2> (&own)[U], Pack<2> (&got)[U][N]) {
    if (!good_) return false;
    const int source = static_cast<int>(threadIdx.x & 31u) % N;  // whose header this lane checks
    const bool check = !checked_ && source != link_.rank;
    const char* const header_at = here_ + source * source_bytes_;
    const char* at[N - 1];
#pragma unroll
    for (int o = 0; o < N - 1; o++) at[o] = here_ + other(o) * source_bytes_ + (packet + 1) * static_cast<int>(sizeof(Words));
    Words header = {}, word[U][N - 1];
    Patience patience(link_);
    bool there;
    do {
      int missing = source;
      if (check) header = load_relaxed(reinterpret_cast<const Words*>(header_at));
#pragma unroll
      for (int u = 0; u < U; u++) {
        if (u >= count) continue;
#pragma unroll
        for (int o = 0; o < N - 1; o++) word[u][o] = load_relaxed(reinterpret_cast<const Words*>(at[o]) + 32 * u);
      }
      there = !check || has_epoch(header);
#pragma unroll
      for (int u = 0; u < U; u++) {
        if (u >= count) continue;
#pragma unroll
        for (int o = 0; o < N - 1; o++) {
          if (has_epoch(word[u][o])) continue;
          there = false;
          missing = other(o);
        }
      }
      if (!there && patience.over(missing, epoch_, 0)) good_ = false;
    } while (!there && good_);
    if (!checked_) {
      if (good_ && check && static_cast<uint32_t>(header.low) != link_.hash) {
        look(link_, kOver, source, epoch_, static_cast<uint32_t>(header.low));
        good_ = false;
      }
      good_ = every_lane(good_);
      checked_ = true;
    }
#pragma unroll
    for (int u = 0; u < U; u++)
#pragma unroll
      for (int r = 0; r < N; r++) {
        const Words& before = word[u][r < N - 1 ? r : 0];  // where r is a rank before this one
        const Words& behind = word[u][r > 0 ? r - 1 : 0];  // ... behind it
        const bool earlier = r < link_.rank;
        got[u][r].word[0] = r == link_.rank ? own[u].word[0] : static_cast<uint32_t>(earlier ? before.low : behind.low);
        got[u][r].word[1] = r == link_.rank ? own[u].word[1] : static_cast<uint32_t>(earlier ? before.high : behind.high);
      }
    return good_;
  }

  // Ends the call; all threads of the block.
  __device__ __forceinline__ void close() const {
    __syncthreads();  // every thread has read the counter
    if (threadIdx.x == 0) link_.counters[blockIdx.x] = epoch_;
  }

 private:
  // The o-th of the other ranks.
  __device__ __forceinline__ int other(int o) const { return o + (o >= link_.rank ? 1 : 0); }
  __device__ __forceinline__ bool has_epoch(const Words& word) const {
    return static_cast<uint32_t>(word.low >> 32) == epoch_ && static_cast<uint32_t>(word.high >> 32) == epoch_;
  }
  __device__ __forceinline__ void put(int peer, int index, uint32_t first, uint32_t second) const {
    const uint64_t flag = static_cast<uint64_t>(epoch_) << 32;
    char* place = link_.buffer[peer] + room_ + link_.rank * source_bytes_;
    store_relaxed(reinterpret_cast<Words*>(place) + index, Words{flag | first, flag | second});
  }

  const Link& link_;
  const uint32_t source_bytes_;
  uint64_t room_;  // offset of this channel, then of the bank of this call, in every rank's buffer
  const char* here_ = nullptr;  // that bank in this rank's own buffer
  uint32_t epoch_ = 0;
  bool good_ = true, checked_ = false;
};

// all_gather. The first packet is read before the channel, which has to read its counter.
template <int N>
__global__ void __launch_bounds__(512, N <= 4 ? 2 : 1)
    push_gather(DETINFER_PARAMETER Link link, DETINFER_PARAMETER Packets packets, DETINFER_PARAMETER PushArgs args) {
  const int64_t all = (args.bytes + kPacketBytes - 1) / kPacketBytes;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * args.per_channel;
  const int64_t last = first + args.per_channel < all ? first + args.per_channel : all;
  PacketChannel<N> channel(link, packets);
  wait_for_previous_kernel();
  Pack<2> own = {};
  if (first + threadIdx.x < last) own = unit_of<Bytes, 2>(args, link.rank, first + threadIdx.x);
  channel.open();
  for (int64_t i = first + threadIdx.x; i < last; i += blockDim.x) {
    const Pack<2> data = i < first + blockDim.x ? own : unit_of<Bytes, 2>(args, link.rank, i);
#pragma unroll
    for (int step = 1; step < N; step++) channel.send(after<N>(link.rank, step), static_cast<int>(i - first), data);
  }
  for (int64_t base = first; base < last; base += blockDim.x) {
    const int64_t i = base + threadIdx.x, at = i * kPacketBytes;
    const bool active = i < last;
    if (base != first && active) own = unit_of<Bytes, 2>(args, link.rank, i);
    Pack<2> got[1][N];
    const bool good = channel.template receive<1>(static_cast<int>(i - first), active ? 1 : 0, {own}, got);
    if (!active) continue;
#pragma unroll
    for (int r = 0; r < N; r++)
      store_gathered<N, 2>(args.out, good ? got[0][r] : poison<2>(), at, r, args.inner, args.bytes,
                           args.out_aligned);
  }
  channel.close();
}

}  // namespace gpu
}  // namespace detinfer
