// Host side of a communicator: its memory, its geometry, and what the exported functions share.
#pragma once

#include "../communicator_gpu.h"
#include "packets.h"
#include "own_row.h"
#include "shared_row.h"
#include "two_shot.h"

namespace detinfer {
namespace gpu {

struct Regions {
  Blanks blanks;
  Packets packets;
  Ring tiles, parts, sums;
  uint64_t announced;
  uint64_t bytes;
};
Regions regions_of(const GpuConfig& config);

struct Comm {
  GpuConfig config;
  Regions regions;
  char* buffer[kMostRanks];
  State* state;
  Fault* fault;         // in host memory
  Fault* fault_device;  // the same, as the device sees it
  int row_blocks;       // that may share a row at most: 1 where the device has no groups of blocks
  int device;           // that it was made on
};

// Makes a device the current one of this thread while it lives.
class OnDevice {
 public:
  explicit OnDevice(int device) : status_(current_device(&before_)), moved_(status_ == kNoError && before_ != device) {
    if (moved_) status_ = use_device(device);
  }
  OnDevice(const OnDevice&) = delete;
  ~OnDevice() {
    if (moved_) (void)use_device(before_);
  }
  Code status() const { return status_; }

 private:
  int before_ = 0;
  Code status_;
  bool moved_;
};

int refuse(Status status, const char* format, ...) __attribute__((format(printf, 2, 3)));
int checked(Code code, const char* doing);

// Loads a kernel. Its blocks wait for other ranks' blocks, so all `channels` of them have to fit on the device together.
template <class Kernel> static inline int ready(Kernel kernel, int channels, int threads, int shared_bytes, const char* name) {
  int blocks = 0, count = 0;
  if (const int status = checked(load_kernel(kernel, shared_bytes), name)) return status;
  if (const int status = checked(processors(&count), name)) return status;
  if (const int status = checked(blocks_at_once(&blocks, kernel, threads, shared_bytes), name)) return status;
  if (blocks * count >= channels) return kOk;
  return refuse(kNotSupported, "%s: %d blocks of %d threads do not fit on the device together, %d do: take fewer channels",
                name, channels, threads, blocks * count);
}

// The same of kernels that are launched in groups of `group` blocks.
template <class Kernel>
static inline int ready_groups(Kernel kernel, int group, int channels, int threads, int shared_bytes, const char* name) {
  int groups = 0;
  if (const int status = checked(load_kernel(kernel, shared_bytes), name)) return status;
  if (const int status = checked(groups_at_once(&groups, kernel, group, threads, shared_bytes), name)) return status;
  if (groups * group >= channels / group * group) return kOk;
  return refuse(kNotSupported,
                "%s: %d groups of %d blocks of %d threads do not fit on the device together, %d do: take fewer channels", name, channels / group, group, threads, groups);
}

Link link_of(const Comm& comm, uint32_t* counters, const GpuCall& call);

static inline bool aligned_to(const void* at, uint64_t bytes) { return reinterpret_cast<uintptr_t>(at) % bytes == 0; }
static inline int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t clamped(int64_t value, int64_t least, int64_t most) {
  return value < least ? least : value > most ? most : value;
}

// How a call cuts its tiles: the channels that it may use, and the most bytes of one rank in a slot of `ring`.
struct TileShape {
  int64_t channels, most;
};
static inline TileShape tile_shape(const Comm& comm, const GpuCall& call, const Ring& ring) {
  const int64_t channels = comm.config.tile_channels, most = ring.slot_bytes;
  return {call.blocks > 0 ? clamped(call.blocks, 1, channels) : channels,
          call.tile_bytes > 0 ? clamped(call.tile_bytes / 16 * 16, 512, most) : most};
}

// body(integral constant N), N the number of ranks.
template <int N> struct Ranks {
  static constexpr int value = N;
};
#ifndef DETINFER_RANKS_BUILT
#define DETINFER_RANKS_BUILT 8  // 2 or 3: a build in a fraction of the time, while kernels are being written and in tests
#endif
template <class Body> static inline int with_ranks(int ranks, const Body& body) {
  switch (ranks) {
    case 2: return body(Ranks<2>{});
#if DETINFER_RANKS_BUILT >= 3
    case 3: return body(Ranks<3>{});
#endif
#if DETINFER_RANKS_BUILT >= 8
    case 4: return body(Ranks<4>{});
    case 5: return body(Ranks<5>{});
    case 6: return body(Ranks<6>{});
    case 7: return body(Ranks<7>{});
    case 8: return body(Ranks<8>{});
#endif
  }
  return refuse(kBadArgument, "%d ranks: 2 to 8 are supported", ranks);
}
template <class Body> static inline int with_dtype(int dtype, const Body& body) {
  switch (dtype) {
    case kFloat32: return body(Float32{});
    case kBFloat16: return body(BFloat16{});
    case kFloat16: return body(Float16{});
  }
  return refuse(kNotSupported, "dtype code %d has no kernel", dtype);
}

// Each loads its kernels when call is null, else runs one.
int all_reduce(const Comm& comm, const GpuCall* call, Stream stream);
int reduce_scatter(const Comm& comm, const GpuCall* call, Stream stream);
int all_gather(const Comm& comm, const GpuCall* call, Stream stream);
int all_reduce_rms_norm(const Comm& comm, const GpuCall* call, Stream stream);

// Whether push takes the rows of an all_reduce_rms_norm.
bool push_holds_rows(const Comm& comm, const GpuCall& call);

// The shape of a push of `bytes` from each rank to each, in units of `unit` bytes; also says whether it fits.
struct PushShape {
  int blocks, threads, per_channel;
  bool fits;
};
PushShape push_shape(const Comm& comm, int64_t bytes, int unit);

}  // namespace gpu
}  // namespace detinfer
