// What every kernel between GPUs gets: where the ranks' buffers lie, what this call is, and how it may fail.
//
// Each wait is bounded. A wait that runs out of time, or a peer that makes another call, records one Fault where the
// host sees it and sets `failed`; from then on no kernel of the communicator waits, and every output that would have
// held data from a failed wait is filled with ones bits (NaN). No failure returns numbers.
#pragma once

#include "../order.h"

namespace detinfer {
namespace gpu {

enum FaultCode : uint32_t { kNoFault = 0, kTimeout = 1, kMismatch = 2 };

// In host memory that the device sees. detinfer/collectives/cuda_native.py has the same fields.
struct Fault {
  uint32_t code;
  uint32_t peer;      // the rank waited for
  uint32_t sequence;  // number of this exchange on its channel
  uint32_t channel;
  uint32_t expected;  // this rank's call, hashed
  uint32_t found;     // the peer's
  uint64_t call;      // what this rank was doing: collective in the low 8 bits, dtype in the next 8, elements above
};

struct Link {
  char* buffer[kMostRanks];  // every rank's shared buffer, as this process sees it; [rank] is its own
  uint32_t* counters;        // exchanges done so far, one a channel of this path
  uint32_t* failed;
  Fault* fault;
  uint64_t call;
  uint64_t time_limit_ns;
  uint32_t hash;  // of everything that the ranks of a call must agree on
  int32_t rank;
};

static __device__ __noinline__ void report(const Link& link, FaultCode code, int peer, uint32_t sequence, uint32_t found) {
  if (atomicExch(link.failed, 1u) != 0) return;
  link.fault->peer = static_cast<uint32_t>(peer);
  link.fault->sequence = sequence;
  link.fault->channel = blockIdx.x;
  link.fault->expected = link.hash;
  link.fault->found = found;
  link.fault->call = link.call;
  fence_system();
  *static_cast<volatile uint32_t*>(&link.fault->code) = code;
  fence_system();
}

// Looks at the clock for a wait that began at `since` (0: now). Gives when it began, or kOver: the wait has to end.
static constexpr uint64_t kOver = ~0ull;
static __device__ __noinline__ uint64_t look(const Link& link, uint64_t since, int peer, uint32_t sequence, uint32_t found) {
  if (load_flag(link.failed) != 0) return kOver;
  const uint64_t now = now_ns();
  if (since == 0) return now;
  if (now - since < link.time_limit_ns) return since;
  report(link, kTimeout, peer, sequence, found);
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
