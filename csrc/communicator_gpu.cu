// A communicator between GPUs: its memory, its faults, and the exported C functions.
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <new>

#include "gpu/comm.h"

namespace detinfer {
namespace gpu {
namespace {

thread_local char last_error_text[512] = "";

uint64_t mixed(uint64_t hash, uint64_t value) {  // splitmix64's finish
  uint64_t z = (hash ^ value) + 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// Everything that the ranks of a call have to agree on.
uint32_t hash_of(const GpuCall& call) {
  uint64_t hash = 0;
  for (int32_t field : {call.collective, call.path, call.dtype, call.op, call.order, call.blocks, call.tile_bytes}) hash = mixed(hash, static_cast<uint32_t>(field));
  hash = mixed(mixed(hash, static_cast<uint64_t>(call.count)), static_cast<uint64_t>(call.inner));
  if (call.collective == static_cast<int32_t>(GpuCollective::kAllReduceRmsNorm)) {
    uint64_t eps;
    static_assert(sizeof eps == sizeof call.eps, "eps is a double");
    std::memcpy(&eps, &call.eps, sizeof eps);
    for (int32_t field : {call.weight_dtype, call.weight_mode, call.residual_mode}) hash = mixed(hash, static_cast<uint32_t>(field));
    hash = mixed(mixed(hash, eps), static_cast<uint64_t>(call.width));
  }
  return static_cast<uint32_t>(hash ^ hash >> 32);
}

int check_config(const GpuConfig& config) {
  if (config.ranks < 2 || config.ranks > kMostRanks || config.rank < 0 || config.rank >= config.ranks)
    return refuse(kBadArgument, "rank %d of %d: 2 to %d ranks are supported", config.rank, config.ranks, kMostRanks);
  if (config.push_channels < 1 || config.push_channels > kMostChannels || config.tile_channels < 1 || config.tile_channels > kMostChannels)
    return refuse(kBadArgument, "channels must be 1 to %d", kMostChannels);
  if (config.push_bytes < 64 || config.push_bytes > kMostPushBytes || config.push_bytes % 16 != 0 || config.push_threads < 32 || config.push_threads > kPushThreads || config.push_threads % 32 != 0)
    return refuse(kBadArgument, "push_bytes must be a multiple of %d up to %d, push_threads of 32 up to %d", 16, kMostPushBytes, kPushThreads);
  if (config.tile_bytes < 512 || config.tile_bytes % 512 != 0 || config.part_bytes / config.ranks < 512 ||
      config.least_tile_bytes < 512 || config.least_tile_bytes > config.tile_bytes || config.least_tile_bytes % 512 != 0 ||
      config.least_tile_bytes > config.part_bytes)
    return refuse(kBadArgument, "tile_bytes and least_tile_bytes must be multiples of 512, part_bytes at least 512 a rank");
  if (config.tile_threads < 32 || config.tile_threads > kTileThreads || config.tile_threads % 32 != 0)
    return refuse(kBadArgument, "tile_threads must be a multiple of 32 up to %d", kTileThreads);
  if (config.row_blocks < 1 || config.row_blocks > kMostRowBlocks || (config.row_blocks & (config.row_blocks - 1)) != 0)
    return refuse(kBadArgument, "row_blocks must be 1, 2, 4 or 8");
  return kOk;
}

// A communicator that starts late finds flags of neither past nor future, as it would after so many calls, and hears that
// all has been blanked so far.
int late(void* buffer, const GpuConfig& config, const Regions& regions) {
  if (const int status = checked(fill(buffer, 0x40, regions.announced), "clearing the communicator's buffer")) return status;
  const uint64_t told = config.first_sequence;
  for (int i = 0; i < config.push_channels * config.ranks; i++) {
    char* at = static_cast<char*>(buffer) + regions.blanks.cleared + i * sizeof told;
    if (const int status = checked(copy_in(at, &told, sizeof told), "clearing the communicator's buffer")) return status;
  }
  return kOk;
}

Ring ring_at(uint64_t& end, const GpuConfig& config, uint32_t slot_bytes) {
  Ring ring = {};
  ring.slot_bytes = slot_bytes;
  ring.slots = end;
  end += static_cast<uint64_t>(config.tile_channels) * kDepth * config.ranks * slot_bytes;
  ring.flags = end;
  end += static_cast<uint64_t>(config.tile_channels) * kDepth * kMostRanks * sizeof(uint64_t);
  end = (end + 511) / 512 * 512;
  return ring;
}

}  // namespace

int refuse(Status status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(last_error_text, sizeof last_error_text, format, arguments);
  va_end(arguments);
  return status;
}

int checked(Code code, const char* doing) {
  if (code == kNoError) return kOk;
  (void)last_error();  // not sticky: said here, and not again by somebody else's next call
  return refuse(kNotSupported, "%s: %s", doing, sentence_of(code));
}

Regions regions_of(const GpuConfig& config) {
  Regions regions = {};
  uint64_t end = 0;
  const uint64_t places = static_cast<uint64_t>(config.push_channels) * config.ranks;
  regions.blanks.capacity = static_cast<uint32_t>(config.push_bytes);
  regions.blanks.data = end;
  end += places * kBlankBanks * config.push_bytes;
  regions.blanks.headers = end;
  end += places * kBlankBanks * sizeof(Words);
  regions.blanks.cleared = end;
  end = (end + places * sizeof(uint64_t) + 511) / 512 * 512;
  regions.packets.offset = end;
  regions.packets.capacity = static_cast<uint32_t>(config.push_bytes / kPacketBytes);
  end += static_cast<uint64_t>(config.push_channels) * 2 * config.ranks * (regions.packets.capacity + 1) * sizeof(Words);
  end = (end + 511) / 512 * 512;
  const uint32_t part = static_cast<uint32_t>(config.part_bytes / config.ranks / 16 * 16);
  regions.tiles = ring_at(end, config, static_cast<uint32_t>(config.tile_bytes));
  regions.parts = ring_at(end, config, part);
  regions.sums = ring_at(end, config, part);
  regions.announced = end;
  end += kMostRanks * sizeof(Words);
  regions.bytes = end;
  return regions;
}

Link link_of(const Comm& comm, uint32_t* counters, const GpuCall& call) {
  Link link = {};
  for (int r = 0; r < comm.config.ranks; r++) link.buffer[r] = comm.buffer[r];
  link.counters = counters;
  link.state = comm.state;
  link.fault = comm.fault_device;
  link.call = static_cast<uint64_t>(call.count) << 16 | static_cast<uint64_t>(call.dtype & 0xff) << 8 |
              static_cast<uint64_t>(call.path & 0xf) << 4 | static_cast<uint64_t>(call.collective & 0xf);
  link.time_limit_ns = static_cast<uint64_t>(comm.config.time_limit_s * 1e9);
  link.announced = comm.regions.announced;
  link.hash = hash_of(call);
  link.rank = comm.config.rank;
  link.ranks = comm.config.ranks;
  return link;
}

}  // namespace gpu
}  // namespace detinfer

using namespace detinfer;
using namespace detinfer::gpu;

DETINFER_EXPORT int detinfer_gpu_abi() { return kGpuAbi; }
DETINFER_EXPORT const char* detinfer_gpu_error() { return last_error_text; }
DETINFER_EXPORT int detinfer_gpu_handle_bytes() { return static_cast<int>(sizeof(Handle)); }
// The mutation that this build carries for the tests of the tests; 0 in every build that ships.
DETINFER_EXPORT int detinfer_gpu_mutant() { return DETINFER_MUTANT; }

// Bytes of a rank's shared buffer; negative: the status of a wrong config.
DETINFER_EXPORT int64_t detinfer_gpu_buffer_bytes(const GpuConfig* config) {
  const int status = check_config(*config);
  return status != kOk ? -status : static_cast<int64_t>(regions_of(*config).bytes);
}

DETINFER_EXPORT int detinfer_gpu_buffer_create(const GpuConfig* config, void** buffer) {
  if (const int status = check_config(*config)) return status;
  const Regions regions = regions_of(*config);
  const uint64_t bytes = regions.bytes;
  *buffer = nullptr;
  if (allocate_shared(buffer, bytes) != kNoError) {
    (void)last_error();
    return refuse(kOutOfMemory, "no %llu bytes of device memory for the communicator", static_cast<unsigned long long>(bytes));
  }
  if (const int status = checked(fill(*buffer, 0, bytes), "clearing the communicator's buffer")) return status;
  if (config->first_sequence != 0)
    if (const int status = late(*buffer, *config, regions)) return status;
  if (const int status = checked(fill(*buffer, 0xff, regions.blanks.headers), "blanking the communicator's buffer")) return status;
  return checked(synchronize(), "clearing the communicator's buffer");
}

DETINFER_EXPORT int detinfer_gpu_buffer_free(void* buffer) { return checked(release(buffer), "freeing the communicator's buffer"); }

DETINFER_EXPORT int detinfer_gpu_handle(void* buffer, void* bytes) {
  Handle handle;
  if (const int status = checked(handle_of(&handle, buffer), "making an IPC handle")) return status;
  std::memcpy(bytes, &handle, sizeof handle);
  return kOk;
}

DETINFER_EXPORT int detinfer_gpu_open(const void* bytes, void** buffer) {
  Handle handle;
  std::memcpy(&handle, bytes, sizeof handle);
  return checked(open_handle(buffer, handle), "opening a peer's IPC handle");
}

DETINFER_EXPORT int detinfer_gpu_close(void* buffer) { return checked(close_handle(buffer), "closing a peer's IPC handle"); }

DETINFER_EXPORT int detinfer_gpu_reach(int device, int peer, int* can) {
  return checked(can_reach(can, device, peer), "asking for peer access");
}

// buffers: every rank's shared buffer, [rank] its own, all cleared. Loads every kernel.
DETINFER_EXPORT int detinfer_gpu_create(const GpuConfig* config, void* const* buffers, Comm** result) {
  if (const int status = check_config(*config)) return status;
  Comm* comm = new (std::nothrow) Comm();
  if (comm == nullptr) return refuse(kOutOfMemory, "no memory for a communicator");
  comm->config = *config;
  comm->regions = regions_of(*config);
  for (int r = 0; r < config->ranks; r++) comm->buffer[r] = static_cast<char*>(buffers[r]);
  State* initial = new (std::nothrow) State();
  int status = initial == nullptr ? refuse(kOutOfMemory, "no memory for a communicator") : static_cast<int>(kOk);
  if (status == kOk) status = checked(current_device(&comm->device), "asking for the current device");
  if (status == kOk) {
    for (uint32_t* counters : {initial->gathers, initial->tiles, initial->parts, initial->sums})
      for (int i = 0; i < kMostChannels; i++) counters[i] = config->first_sequence;
    for (Progress& progress : initial->push) progress.epoch = config->first_sequence;
    status = checked(allocate(reinterpret_cast<void**>(&comm->state), sizeof(State)), "allocating counters");
  }
  if (status == kOk) status = checked(copy_in(comm->state, initial, sizeof(State)), "clearing counters");
  if (status == kOk) status = checked(allocate_mapped(reinterpret_cast<void**>(&comm->fault), sizeof(Fault)), "allocating the fault record");
  if (status == kOk) {
    std::memset(comm->fault, 0, sizeof(Fault));
    status = checked(device_address(reinterpret_cast<void**>(&comm->fault_device), comm->fault), "mapping the fault record");
  }
  bool overlap = false;
  if (status == kOk) status = checked(can_overlap(&overlap), "asking for the device's generation");
  if (!overlap) comm->config.overlap = 0;
  bool groups = false;
  if (status == kOk) status = checked(can_group(&groups), "asking for the device's generation");
  comm->row_blocks = groups ? config->row_blocks : 1;
  while (comm->row_blocks > config->push_channels) comm->row_blocks /= 2;
  if (status == kOk) status = all_reduce(*comm, nullptr, nullptr);
  if (status == kOk) status = all_gather(*comm, nullptr, nullptr);
  if (status == kOk) status = all_reduce_rms_norm(*comm, nullptr, nullptr);
  if (status == kOk) status = checked(synchronize(), "creating a communicator");
  delete initial;
  *result = comm;
  return status;
}

// Not while a kernel of it runs. The buffers are the caller's.
DETINFER_EXPORT int detinfer_gpu_destroy(Comm* comm) {
  int status = kOk;
  if (comm->state != nullptr) status = checked(release(comm->state), "freeing counters");
  if (comm->fault != nullptr) {
    const int freed = checked(release_mapped(comm->fault), "freeing the fault record");
    if (status == kOk) status = freed;
  }
  delete comm;
  return status;
}

// Copies the fault record; its code is 0 while nothing has failed. Waits for nothing.
DETINFER_EXPORT int detinfer_gpu_fault(const Comm* comm, Fault* fault) {
  const volatile uint32_t* code = &comm->fault->code;
  if (*code == kNoFault) {
    std::memset(fault, 0, sizeof *fault);
    return kOk;
  }
  __atomic_thread_fence(__ATOMIC_ACQUIRE);
  std::memcpy(fault, comm->fault, sizeof *fault);
  return kOk;
}

// 1 where path push takes the rows of an all_reduce_rms_norm, else 0.
DETINFER_EXPORT int detinfer_gpu_push_holds_rows(const Comm* comm, const GpuCall* call) {
  return call->inner > 0 && call->inner <= kMostHidden && push_holds_rows(*comm, *call) ? 1 : 0;
}

// Puts one collective on its stream. Allocates nothing and waits for nothing.
DETINFER_EXPORT int detinfer_gpu_call(const Comm* comm, const GpuCall* call) {
  if (*static_cast<const volatile uint32_t*>(&comm->fault->code) != kNoFault)
    return refuse(kBadArgument, "the communicator has failed");
  if (call->count <= 0) return call->count == 0 ? kOk : refuse(kBadArgument, "negative count");
  const Stream on = static_cast<Stream>(call->stream);
  // Stream 0 is the current device's, and a thread of the caller's may have another one.
  const OnDevice here(comm->device);
  if (const int status = checked(here.status(), "going to the communicator's device")) return status;
  switch (static_cast<GpuCollective>(call->collective)) {
    case GpuCollective::kAllReduce: return all_reduce(*comm, call, on);
    case GpuCollective::kReduceScatter: return reduce_scatter(*comm, call, on);
    case GpuCollective::kAllGather: return all_gather(*comm, call, on);
    case GpuCollective::kAllReduceRmsNorm: return all_reduce_rms_norm(*comm, call, on);
  }
  return refuse(kBadArgument, "no collective %d", call->collective);
}
