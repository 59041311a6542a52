// What every kernel between GPUs gets: where the ranks' buffers lie, what this call is, and how it may fail.
//
// Each wait is bounded. A wait that runs out of time, or a peer that makes another call, records one Fault where the
// host sees it and sets `failed`; from then on no kernel of the communicator waits, and every output that would have
// held data from a failed wait is filled with ones bits (NaN). No failure returns numbers.
//
// A call's hash goes with its data. Ranks in calls of different paths wait in different places, where neither finds the
// other's. So a rank whose wait has become long, or that has found another hash, announces to its peers which call it is
// in. Nothing of it happens in short waits. What is released and acquired: docs/concepts/memory_ordering.md.
#pragma once

#include "../order.h"

namespace detinfer {
namespace gpu {

// kMismatch: the peer's data had another hash. kAnnounced: the peer has announced another call.
enum FaultCode : uint32_t { kNoFault = 0, kTimeout = 1, kMismatch = 2, kAnnounced = 3 };

// In host memory that the device sees. detinfer/collectives/cuda_native.py has the same fields.
struct Fault {
  uint32_t code;
  uint32_t peer;      // the rank waited for
  uint32_t sequence;  // number of this exchange on its channel
  uint32_t channel;
  uint32_t expected;  // this rank's call, hashed
  uint32_t found;     // the peer's
  uint64_t call;      // what this rank was doing: collective and path, 4 bits each from the lowest; dtype, 8; elements
  uint64_t theirs;    // kAnnounced: what the peer was doing
};

// How far a channel of push_sum and its kind is.
struct Progress {
  uint32_t epoch, extent;  // calls so far; bytes of a source that the last one had
};

static constexpr int kMostChannels = 1024;

// Device memory of one rank that no other rank sees.
struct State {
  Progress push[kMostChannels];
  uint32_t gathers[kMostChannels], tiles[kMostChannels], parts[kMostChannels], sums[kMostChannels];
  uint32_t failed;  // 0, or mark_of() the call that has
};

struct Link {
  char* buffer[kMostRanks];  // every rank's shared buffer, as this process sees it; [rank] is its own
  uint32_t* counters;        // exchanges done so far, one a channel of this path
  State* state;
  Fault* fault;
  uint64_t call;
  uint64_t time_limit_ns;
  uint64_t announced;  // offset in a rank's buffer: [source] Words, see announce()
  uint32_t hash;       // of everything that the ranks of a call must agree on
  int32_t rank, ranks;
};

// Exchanges before this call, as block 0 counts them until it ends. It takes part in every call, so ranks that have made the
// same calls have counted the same.
static __device__ __forceinline__ uint32_t exchanges(const Link& link) {
  const State* state = link.state;
  return load_flag(&state->push[0].epoch) + load_flag(state->gathers) + load_flag(state->tiles) + load_flag(state->parts);
}
static __device__ __forceinline__ uint32_t mark_of(uint32_t before) { return before << 1 | 1u; }

static __device__ __forceinline__ void announce(const Link& link, int peer, uint32_t before) {
  Words* at = reinterpret_cast<Words*>(link.buffer[peer] + link.announced) + link.rank;
  store_relaxed(&at->high, link.call);
  store_release(&at->low, static_cast<uint64_t>(before) << 32 | link.hash);
}
static __device__ __forceinline__ const Words* announced(const Link& link, int peer) {
  return reinterpret_cast<const Words*>(link.buffer[link.rank] + link.announced) + peer;
}
// The hash that the peer has announced, if it is another after as many exchanges, else 0.
static __device__ __forceinline__ uint32_t other_hash(const Link& link, int peer, uint32_t before) {
  const uint64_t theirs = load_acquire(&announced(link, peer)->low);
  const uint32_t hash = static_cast<uint32_t>(theirs);
  return static_cast<uint32_t>(theirs >> 32) == before && hash != link.hash ? hash : 0;
}

static __device__ __noinline__ void report(const Link& link, FaultCode code, int peer, uint32_t sequence, uint32_t found) {
  if (atomicExch(&link.state->failed, mark_of(exchanges(link))) != 0) return;
  link.fault->peer = static_cast<uint32_t>(peer);
  link.fault->sequence = sequence;
  link.fault->channel = blockIdx.x;
  link.fault->expected = link.hash;
  link.fault->found = found;
  link.fault->call = link.call;
  if (code == kAnnounced) link.fault->theirs = load_relaxed(&announced(link, peer)->high);
  fence_system();
  *static_cast<volatile uint32_t*>(&link.fault->code) = code;
  fence_system();
}

// Looks at the clock for a wait that began at `since` (0: now; kOver: it is over, and the peer's call was another, `found`).
// Gives when it began, or kOver: the wait has to end.
//
// In block 0 the lane of a rank's number waits for that rank's first word of the call, and is who tells it and hears it. A
// call announces while nothing has failed before it: what it says of itself must not hide what the failed one has said.
static constexpr uint64_t kOver = ~0ull;
static __device__ __noinline__ uint64_t look(const Link& link, uint64_t since, int peer, uint32_t sequence, uint32_t found) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  if (blockIdx.x == 0 && lane < link.ranks && lane != link.rank) {
    const uint32_t before = exchanges(link), failed = load_flag(&link.state->failed);
    if ((since == 0 || since == kOver) && (failed == 0 || failed == mark_of(before))) announce(link, lane, before);
    if (failed == 0 && since != kOver)
      if (const uint32_t other = other_hash(link, lane, before)) {
        report(link, kAnnounced, lane, sequence, other);
        return kOver;
      }
  }
  if (load_flag(&link.state->failed) != 0) return kOver;
  if (since != kOver) {
    const uint64_t now = now_ns();
    if (since == 0) return now;
    if (now - since < link.time_limit_ns) return since;
  }
  report(link, since == kOver ? kMismatch : kTimeout, peer, sequence, found);
  return kOver;
}

// Counts the turns of a waiting loop; true when it has to end.
class Patience {
 public:
  __device__ explicit Patience(const Link& link) : link_(link) {}
  __device__ __forceinline__ bool over(int peer, uint32_t sequence, uint32_t found) {
    if ((++turns_ & 1023u) == 0) since_ = look(link_, since_, peer, sequence, found);
    return since_ == kOver;
  }

 private:
  const Link& link_;
  uint32_t turns_ = 0;
  uint64_t since_ = 0;
};

// The next of N ranks after `rank`, `step` further.
template <int N> static __device__ __forceinline__ int after(int rank, int step) {
  const int peer = rank + step;
  return peer >= N ? peer - N : peer;
}

}  // namespace gpu
}  // namespace detinfer
