// A GPU made of the CPU, for tests: as much of HIP as csrc's collectives use. A block is a thread of the CPU, and its
// threads are fibers of that, which change places where a GPU's threads wait: at barriers, exchanges and polls. Ranks are
// threads of the test, each with blocks of its own. It shows what the kernels compute and how they wait; x86's order of
// memory is stronger than a GPU's, so it says nothing of fences.
#pragma once
#include <sched.h>
#include <time.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __shared__ static thread_local
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __HIP_MEMORY_SCOPE_SYSTEM 0
#define __HIP_MEMORY_SCOPE_AGENT 0
#define __hip_atomic_store(at, value, order, scope) __atomic_store_n(at, value, order)
#define __hip_atomic_load(at, order, scope) __atomic_load_n(at, order)
#define __builtin_amdgcn_fence(...) __atomic_thread_fence(__ATOMIC_SEQ_CST)
#define __builtin_amdgcn_wave_barrier() fibers::sync_warp()
#define __builtin_amdgcn_s_sleep(n) fibers::spin()

struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
using hipError_t = int;
static constexpr int hipSuccess = 0, hipNone = 1, hipInvalid = 2;
using hipStream_t = void*;
struct hipIpcMemHandle_t {
  char bytes[64];
};
struct hipFuncAttributes {};
enum { hipDeviceMallocUncached, hipMemcpyHostToDevice, hipHostMallocMapped, hipIpcMemLazyEnablePeerAccess, hipDeviceAttributeMultiprocessorCount };
inline const char* hipGetErrorString(int code) { return code == hipInvalid ? "invalid argument" : "not on fibers"; }
inline int hipMalloc(void** at, size_t bytes) {
  *at = aligned_alloc(512, (bytes + 511) / 512 * 512);
  return *at == nullptr;
}
inline int hipExtMallocWithFlags(void** at, size_t bytes, int) { return hipMalloc(at, bytes); }
inline int hipHostMalloc(void** at, size_t bytes, int) { return hipMalloc(at, bytes); }
inline int hipFree(void* at) { return free(at), 0; }
inline int hipHostFree(void* at) { return free(at), 0; }
inline int hipMemset(void* at, int byte, size_t bytes) { return memset(at, byte, bytes), 0; }
inline int hipMemcpy(void* to, const void* from, size_t bytes, int) { return memcpy(to, from, bytes), 0; }
inline int hipDeviceSynchronize() { return 0; }
inline thread_local int hipLastError = hipSuccess;  // of a launch
inline int hipGetLastError() { return std::exchange(hipLastError, hipSuccess); }
inline int hipHostGetDevicePointer(void** device, void* host, int) { return *device = host, 0; }
inline int hipIpcGetMemHandle(hipIpcMemHandle_t*, void*) { return hipNone; }
inline int hipIpcOpenMemHandle(void**, hipIpcMemHandle_t, int) { return hipNone; }
inline int hipIpcCloseMemHandle(void*) { return hipNone; }
inline int hipDeviceCanAccessPeer(int* can, int, int) { return *can = 1, 0; }
inline int hipGetDevice(int* device) { return *device = 0, 0; }
inline int hipSetDevice(int) { return 0; }
inline int hipDeviceGetAttribute(int* count, int, int) { return *count = 132, 0; }
template <class Kernel> int hipOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) { return *blocks = 8, 0; }
inline int hipFuncGetAttributes(hipFuncAttributes*, const void*) { return 0; }

extern "C" void fibers_switch(void** from, void* to);

namespace fibers {

struct Index {
  unsigned x;
};
struct Warp {
  int waiting = 0;
  unsigned turn = 0;
  float value[32];
  bool here[32];
};
// Blocks that are launched together; each writes where what the others reach begins.
struct Group {
  std::atomic<char*> begin[16] = {};
  std::atomic<bool> refused{false};
};
struct Block {
  int threads = 0, live = 0, spins = 0, waiting = 0;
  unsigned turn = 0;
  std::vector<void*> stack;  // of each fiber that does not run, and whether it has ended
  std::vector<char> ended, room;
  std::vector<Warp> warps;
  void* scheduler = nullptr;
  const std::function<void()>* body = nullptr;
  Group* group = nullptr;
  int group_size = 1, in_group = 0;
};
extern thread_local Block block;
extern thread_local Index tid, bid, threads_of_block, blocks;

inline void give_way() {
  const unsigned me = tid.x;
  fibers_switch(&block.stack[me], block.scheduler);
}
inline void spin() {
  block.spins++;
  give_way();
}
inline void barrier(int& waiting, unsigned& turn, int all) {
  const unsigned before = turn;
  if (++waiting == all) {
    waiting = 0;
    turn++;
  }
  while (turn == before) give_way();
}
inline void sync_warp() {
  Warp& warp = block.warps[tid.x / 32];
  barrier(warp.waiting, warp.turn, 32);
}
inline char* room() {
  char* at = block.room.data();
  return at + (16 - reinterpret_cast<uintptr_t>(at) % 16) % 16;
}
void run(const std::function<void()>& body, int index, int count, int threads, int shared_bytes);

// The first thing that a kernel does is to say what it is built for: __launch_bounds__(most, ...). True: not this launch.
inline bool over_bounds(int most, int = 1) {
  const bool over = block.threads > most;
  if (over) block.group->refused = true;
  return over;
}
// Dynamic shared memory that a kernel may be launched with: what was set last, and 48 KiB where nothing was.
inline std::mutex set_guard;
inline std::map<const void*, int> set_bytes;
inline int set_shared(const void* kernel, int bytes) {
  const std::lock_guard<std::mutex> held(set_guard);
  if (bytes > 0) set_bytes[kernel] = bytes;
  return bytes > 227 << 10 ? hipInvalid : 0;
}
inline bool over_shared(const void* kernel, int bytes) {
  const std::lock_guard<std::mutex> held(set_guard);
  const auto found = set_bytes.find(kernel);
  return bytes > (found == set_bytes.end() ? 48 << 10 : found->second);
}

// Groups of blocks one after another: block b of a rank waits for block b of other ranks alone.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int group, int count, int threads, int shared_bytes, Arguments... arguments) {
  if (threads > 1024 || over_shared(reinterpret_cast<const void*>(kernel), shared_bytes)) {
    hipLastError = hipInvalid;
    return;
  }
  const std::function<void()> body = [=] { kernel(arguments...); };
  for (int first = 0; first < count; first += group) {
    Group together;
    std::vector<std::thread> running;
    for (int i = 0; i < group; i++)
      running.emplace_back([&, i] {
        block.group = &together;
        block.group_size = group;
        block.in_group = i;
        run(body, first + i, count, threads, shared_bytes);
      });
    for (auto& each : running) each.join();
    if (together.refused) {
      hipLastError = hipInvalid;
      return;
    }
  }
}

// Where `at`, of this block, lies in block `other` of its group.
inline char* of_block(void* at, int other) {
  return block.group->begin[other].load() + (static_cast<char*>(at) - block.group->begin[block.in_group].load());
}

}  // namespace fibers

#define threadIdx fibers::tid
#define blockIdx fibers::bid
#define blockDim fibers::threads_of_block
#define gridDim fibers::blocks
inline void __syncthreads() { fibers::barrier(fibers::block.waiting, fibers::block.turn, fibers::block.threads); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline float __shfl_xor(float value, int mask, int) {
  fibers::Warp& warp = fibers::block.warps[threadIdx.x / 32];
  warp.value[threadIdx.x % 32] = value;
  fibers::sync_warp();
  const float other = warp.value[threadIdx.x % 32 ^ mask];
  fibers::sync_warp();
  return other;
}
inline int __all(bool here) {
  fibers::Warp& warp = fibers::block.warps[threadIdx.x / 32];
  warp.here[threadIdx.x % 32] = here;
  fibers::sync_warp();
  int all = 1;
  for (bool each : warp.here) all &= each;
  fibers::sync_warp();
  return all;
}
inline unsigned atomicExch(unsigned* at, unsigned value) { return __atomic_exchange_n(at, value, __ATOMIC_SEQ_CST); }
inline unsigned atomicAdd(unsigned* at, unsigned value) { return __atomic_fetch_add(at, value, __ATOMIC_SEQ_CST); }
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint64_t wall_clock64() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<uint64_t>(now.tv_sec) * 100000000u + static_cast<uint64_t>(now.tv_nsec) / 10;
}
