// Path `push` of sums: data alone, into places that are blank until something arrives. Nobody waits for a barrier.
//
// Blank is a word of ones bits: one NaN, or two. A rank sends another NaN in its place, which changes no sum: the result is
// the same NaN. A word that is not blank has therefore arrived; each is written and read whole, so nothing has to be
// ordered for that. A block owns a channel: a region of every rank's buffer with four banks, used in turn. In each call a
// rank blanks, in its own memory, the bank of the call before. The block's last warp, the helper, tells the peers so and
// sees what they tell, long before a bank's turn comes again. A header in each bank carries the hash of the call. The
// epoch counts the calls of a channel and lives on the device, so that a captured graph may be replayed.
//
// Why no old word is taken for a new one, and why no word is blanked or overwritten before it was read:
// docs/concepts/memory_ordering.md.
#pragma once

#include "link.h"
#include "values.h"

namespace detinfer {
namespace gpu {

static constexpr uint32_t kBlank = 0xffffffffu, kOtherNan = 0x7fffffffu;
static constexpr uint32_t kBlankBanks = 4;
static constexpr int kHelpers = 32;              // threads of a block that push no data: the last
static constexpr int kMostPushBytes = 16 << 20;  // of a channel: offsets in it are 32-bit

// Offsets in a rank's buffer.
struct Blanks {
  uint64_t data;      // [channel][bank][source][capacity]
  uint64_t headers;   // [channel][bank][source] Words: hash and epoch, twice
  uint64_t cleared;   // [channel][source] uint64: the epoch up to which the source has blanked what it read
  uint32_t capacity;  // bytes of one source in a bank, a multiple of 16
};

template <int W> static __device__ __forceinline__ void store_words(char* at, const Pack<W>& pack) {
  const auto word = [&](int i) { return static_cast<uint64_t>(pack.word[i + 1]) << 32 | pack.word[i]; };
  if constexpr (W == 4) store_relaxed(reinterpret_cast<Words*>(at), Words{word(0), word(2)});
  else store_relaxed(reinterpret_cast<uint64_t*>(at), word(0));
}
template <int W> static __device__ __forceinline__ Pack<W> load_words(const char* at) {
  if constexpr (W == 4) {
    const Words words = load_relaxed(reinterpret_cast<const Words*>(at));
    return {{static_cast<uint32_t>(words.low), static_cast<uint32_t>(words.low >> 32), static_cast<uint32_t>(words.high),
             static_cast<uint32_t>(words.high >> 32)}};
  } else {
    const uint64_t word = load_relaxed(reinterpret_cast<const uint64_t*>(at));
    return {{static_cast<uint32_t>(word), static_cast<uint32_t>(word >> 32)}};
  }
}

// One block's channel in one call, for units of W words. All of a warp's threads call every function together.
template <int N, int W> class BlankChannel {
 public:
  static constexpr int kUnitBytes = 4 * W;

  // Reads nothing but its arguments: what can be worked out while the kernel before still runs. Then open().
  __device__ BlankChannel(const Link& link, const Blanks& blanks) : link_(link), blanks_(blanks) {
    room_ = blanks.data + static_cast<uint64_t>(blockIdx.x) * (kBlankBanks * N) * blanks.capacity;
  }
  static __device__ __forceinline__ int workers() { return static_cast<int>(blockDim.x) - kHelpers; }
  static __device__ __forceinline__ bool helps() { return static_cast<int>(threadIdx.x) >= workers(); }

  __device__ __forceinline__ void open() {
    const int t = static_cast<int>(threadIdx.x);
    if (helps() && t - workers() < N) told_ = load_relaxed(cleared(link_.rank, t - workers()));
    const Progress before = progress()[blockIdx.x];
    epoch_ = before.epoch + 1;
    extent_ = before.extent;
#if DETINFER_MUTANT == 5  // two banks: a fast rank's data is blanked
    bank_ = epoch_ % 2;
#else
    bank_ = epoch_ % kBlankBanks;
#endif
    here_ = room_ + bank_ * (N * blanks_.capacity);
    if (t < N && t != link_.rank) {
      const uint64_t flag = static_cast<uint64_t>(epoch_) << 32 | link_.hash;
      store_relaxed(header(t, link_.rank), Words{flag, flag});
    }
  }

  __device__ __forceinline__ void send(int peer, int unit, const Pack<W>& data) const {
    Pack<W> shown;
#pragma unroll
    for (int w = 0; w < W; w++) shown.word[w] = data.word[w] == kBlank ? kOtherNan : data.word[w];
    store_words<W>(link_.buffer[peer] + here_ + link_.rank * blanks_.capacity + unit * kUnitBytes, shown);
  }

  // After everything was sent: workers blank what the call before has read; the helper watches and tells.
  __device__ __forceinline__ void tidy() const {
    if (helps()) {
      settle();
      return;
    }
#if DETINFER_MUTANT != 7  // old words are taken for new ones
    const uint32_t other = (bank_ + (DETINFER_MUTANT == 5 ? 1 : kBlankBanks - 1)) % (DETINFER_MUTANT == 5 ? 2 : kBlankBanks);
    char* bank = link_.buffer[link_.rank] + room_ + other * (N * blanks_.capacity);
    const Pack<4> blank = {{kBlank, kBlank, kBlank, kBlank}};
#pragma unroll
    for (int step = 1; step < N; step++) {
      char* part = bank + after<N>(link_.rank, step) * blanks_.capacity;
      for (uint32_t at = threadIdx.x * 16; at < extent_; at += workers() * 16) store_words<4>(part + at, blank);
    }
#endif
  }

  // All ranks' units number unit, unit + 32, ..., `count` of them but no more than U; this rank's are `own`.
  // False: the wait failed or a peer makes another call.
  template <int U>
  __device__ __forceinline__ bool receive(int unit, int count, const Pack<W> (&own)[U], Pack<W> (&got)[U][N]) {
    if (!good_) return false;
    const int source = static_cast<int>(threadIdx.x & 31u) % N;  // whose header this lane checks
    const bool check = !checked_ && source != link_.rank;
    const char* at[N - 1];
#pragma unroll
    for (int o = 0; o < N - 1; o++)
      at[o] = link_.buffer[link_.rank] + here_ + other(o) * blanks_.capacity + unit * kUnitBytes;
    Words found = {};
    Pack<W> word[U][N - 1];
    Patience patience(link_);
    bool there;
    do {
      int missing = source;
      if (check) found = load_relaxed(header(link_.rank, source));
#pragma unroll
      for (int u = 0; u < U; u++) {
        if (u >= count) continue;
#pragma unroll
        for (int o = 0; o < N - 1; o++) word[u][o] = load_words<W>(at[o] + 32 * kUnitBytes * u);
      }
      there = !check || (has_epoch(found.low) && has_epoch(found.high));
#pragma unroll
      for (int u = 0; u < U; u++) {
        if (u >= count) continue;
#pragma unroll
        for (int o = 0; o < N - 1; o++) {
          bool all = true;
#pragma unroll
          for (int w = 0; w < W; w++) all = all && word[u][o].word[w] != kBlank;
          if (all) continue;
          there = false;
          missing = other(o);
        }
      }
      if (!there && patience.over(missing, epoch_, 0)) good_ = false;
    } while (!there && good_);
    if (!checked_) {
      if (good_ && check && static_cast<uint32_t>(found.low) != link_.hash) {
        look(link_, kOver, source, epoch_, static_cast<uint32_t>(found.low));
        good_ = false;
      }
      good_ = every_lane(good_);
      checked_ = true;
    }
#pragma unroll
    for (int u = 0; u < U; u++)
#pragma unroll
      for (int r = 0; r < N; r++) {
        const Pack<W>& before = word[u][r < N - 1 ? r : 0];  // where r is a rank before this one
        const Pack<W>& behind = word[u][r > 0 ? r - 1 : 0];  // ... behind it
#pragma unroll
        for (int w = 0; w < W; w++)
          got[u][r].word[w] = r == link_.rank ? own[u].word[w] : r < link_.rank ? before.word[w] : behind.word[w];
      }
    return good_;
  }

  // Ends the call, in which a source had `units` at most; all threads of the block.
  __device__ __forceinline__ void close(int64_t units) const {
    __syncthreads();  // every thread has read the progress
    if (threadIdx.x == 0) progress()[blockIdx.x] = Progress{epoch_, static_cast<uint32_t>(units) * kUnitBytes};
  }

 private:
  // The o-th of the other ranks.
  __device__ __forceinline__ int other(int o) const { return o + (o >= link_.rank ? 1 : 0); }
  __device__ __forceinline__ bool has_epoch(uint64_t word) const { return static_cast<uint32_t>(word >> 32) == epoch_; }
  __device__ __forceinline__ Progress* progress() const { return reinterpret_cast<Progress*>(link_.counters); }
  __device__ __forceinline__ Words* header(int rank, int source) const {
    return reinterpret_cast<Words*>(link_.buffer[rank] + blanks_.headers) + (blockIdx.x * kBlankBanks + bank_) * N + source;
  }
  __device__ __forceinline__ uint64_t* cleared(int rank, int source) const {
    return reinterpret_cast<uint64_t*>(link_.buffer[rank] + blanks_.cleared) + blockIdx.x * N + source;
  }
  // The helper: every peer has told epoch - 1, so it has blanked the bank of epoch - 3, which is written from here in the
  // next call; and this rank's kernels before this one have blanked the bank of epoch - 2. One fence for both.
  __device__ __forceinline__ void settle() const {
    const int t = static_cast<int>(threadIdx.x) - workers();
    if (t >= N || t == link_.rank) return;
    uint64_t told = told_;
    Patience patience(link_);
    while (static_cast<int32_t>(static_cast<uint32_t>(told) - (epoch_ - 1)) < 0) {
      if (patience.over(t, epoch_, 0)) return;
      told = load_relaxed(cleared(link_.rank, t));
    }
#if DETINFER_MUTANT != 8  // told before it is blank
    fence_both();
#endif
    store_relaxed(cleared(t, link_.rank), epoch_);
  }

  const Link& link_;
  const Blanks& blanks_;
  uint64_t room_;  // offset of this channel's banks in every rank's buffer
  uint64_t here_ = 0;  // ... of the bank of this call
  uint64_t told_ = 0;
  uint32_t epoch_ = 0, extent_ = 0, bank_ = 0;
  bool good_ = true, checked_ = false;
};

// What a reducing or gathering kernel moves. A part is what one destination gets.
struct PushArgs {
  const char* in;
  char* out;
  int64_t bytes;        // of a part
  int64_t in_stride;    // bytes from one destination's part to the next; 0: all get the same part
  int64_t inner;        // all_gather: bytes of a rank that lie side by side in `out`
  int32_t per_channel;  // units or packets
  bool in_aligned, out_aligned;
  Reduce how;
};

static constexpr int kPushWords = 4;  // of a unit of all_reduce and reduce_scatter
static constexpr int kPushThreads = 512;

// Unit i, of W words, of the part for rank `to`.
template <class T, int W> static __device__ __forceinline__ Pack<W> unit_of(const PushArgs& args, int to, int64_t i) {
  const int64_t at = i * (4 * W);
  return load_pack<T, W>(args.in + to * args.in_stride + at, args.bytes - at, args.in_aligned);
}

// all_reduce and reduce_scatter. Here and below the first unit is read before the channel, which has to read its progress.
template <class T, int N>
__global__ void __launch_bounds__(kPushThreads + kHelpers, N <= 4 ? 2 : 1)
    push_reduce(DETINFER_PARAMETER Link link, DETINFER_PARAMETER Blanks blanks, DETINFER_PARAMETER PushArgs args) {
  constexpr int W = kPushWords, kBytes = 4 * W;
  const int64_t all = (args.bytes + kBytes - 1) / kBytes;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * args.per_channel;
  const int64_t last = first + args.per_channel < all ? first + args.per_channel : all;
  BlankChannel<N, W> channel(link, blanks);
  const int workers = channel.workers();
  const int64_t begin = channel.helps() ? last : first + threadIdx.x;
  wait_for_previous_kernel();
  Pack<W> own = {};
  if (begin < last) own = unit_of<T, W>(args, link.rank, begin);
  channel.open();
  for (int64_t i = begin; i < last; i += workers) {
    Pack<W> data = own;
    if (i != begin && args.in_stride == 0) data = unit_of<T, W>(args, link.rank, i);
#pragma unroll
    for (int step = 1; step < N; step++) {
      const int peer = after<N>(link.rank, step);
      if (args.in_stride != 0) data = unit_of<T, W>(args, peer, i);
      channel.send(peer, static_cast<int>(i - first), data);
    }
  }
  channel.tidy();
  if (!channel.helps())
    for (int64_t base = first; base < last; base += workers) {
      const int64_t i = base + threadIdx.x, at = i * kBytes;
      const bool active = i < last;
      if (base != first && active) own = unit_of<T, W>(args, link.rank, i);
      Pack<W> got[1][N];
      const bool good = channel.template receive<1>(static_cast<int>(i - first), active ? 1 : 0, {own}, got);
      if (!active) continue;
#if DETINFER_MUTANT == 6  // every rank starts at itself
      const int turn = link.rank;
#else
      const int turn = 0;
#endif
      const Pack<W> sum = reduce_pack<T, N, W>(args.how, [&](int r) {
        if (turn != 0) r = after<N>(r, turn);
        return got[0][r];
      });
      store_pack<T, W>(args.out + at, good ? sum : poison<W>(), args.bytes - at, args.out_aligned);
    }
  channel.close(last - first);
}

// The same of an all_reduce of sums in rank_order, of whole and aligned units, one a thread: what a small model's step
// calls, without the code for all else, which takes longer to fetch than to run.
template <class T, int N>
__global__ void __launch_bounds__(kPushThreads + kHelpers, N <= 4 ? 2 : 1)
    push_sum(DETINFER_PARAMETER Link link, DETINFER_PARAMETER Blanks blanks, DETINFER_PARAMETER PushArgs args) {
  constexpr int W = kPushWords;
  BlankChannel<N, W> channel(link, blanks);
  const int unit = static_cast<int>(threadIdx.x);
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * args.per_channel + unit) * (4 * W);
  const bool active = unit < args.per_channel && !channel.helps() && at < args.bytes;
  wait_for_previous_kernel();
  Pack<W> own = {};
  if (active) own = *reinterpret_cast<const Pack<W>*>(args.in + at);
  channel.open();
#pragma unroll
  for (int step = 1; step < N; step++)
    if (active) channel.send(after<N>(link.rank, step), unit, own);
  channel.tidy();
  if (!channel.helps()) {
    Pack<W> got[1][N];
    const bool good = channel.template receive<1>(unit, active ? 1 : 0, {own}, got);
    if (active)
      *reinterpret_cast<Pack<W>*>(args.out + at) = good ? sum_pack<T, N, W>([&](int r) { return got[0][r]; }) : poison<W>();
  }
  channel.close(args.per_channel);
}

}  // namespace gpu
}  // namespace detinfer
