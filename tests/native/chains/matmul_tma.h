// What csrc/gpu/matmul_chains.h asks of a GPU, with a block's threads as threads of the host: barriers in shared memory, the
// memory accelerator, and sums that are stored as they are.
//
// A copy lands at once, after everything that it will overwrite became NaN; or, where `late` is set, only when somebody waits
// for it. A sleep now and then keeps threads apart.
#pragma once

#include <atomic>
#include <barrier>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__
#define __launch_bounds__(...)
#define __grid_constant__

struct Index {
  unsigned x;
};
inline thread_local Index threadIdx;
inline Index blockIdx;
struct alignas(16) float4 {
  float x, y, z, w;
};
struct GpuMatmulArgs {
  int64_t m, n, k, x_m, w_n;
  const void *x, *w;
  float* out;
};
struct CUtensorMap {  // [boxes][rows][32]
  const float* at;
  int64_t rows, boxes, row_stride;
  int box_rows, box_count;
};

inline std::unique_ptr<std::barrier<>> whole_block;
inline std::vector<std::unique_ptr<std::barrier<>>> warps;
inline void __syncthreads() { whole_block->arrive_and_wait(); }
inline void __syncwarp() { warps[threadIdx.x / 32]->arrive_and_wait(); }
inline int __shfl_sync(unsigned, int value, int) { return value; }  // for what a warp's threads have in common
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }

namespace detinfer {
namespace gpu {

struct Float32 {};
constexpr int kBoxRowBytes = 128;
constexpr uint32_t kBegin = 4112;  // where shared memory begins: not where a box may
inline bool late = false;
alignas(16) inline char raw[228 << 10];
static inline uint32_t shared_address(const void* at) { return static_cast<uint32_t>(static_cast<const char*>(at) - raw) + kBegin; }
static inline char* memory(uint32_t at) {
  if (at < kBegin || at >= kBegin + sizeof raw) std::abort();
  return raw + (at - kBegin);
}

struct Copy {
  uint32_t to;
  CUtensorMap map;
  int row, box;
};
struct Barrier {
  int count, left, phase = 0;
  int64_t bytes = 0;
  std::vector<Copy> copies;
};
inline std::map<uint32_t, Barrier> barriers;
inline std::mutex guard;
inline std::condition_variable changed;

static inline void settle(Barrier& one) {
  if (one.left < 0 || one.bytes < 0) std::abort();
  if (one.left > 0 || one.bytes > 0) return;
  one.left = one.count, one.phase ^= 1;
  changed.notify_all();
}
static inline void land(Barrier& one) {
  for (const auto& [to, map, first_row, first_box] : std::exchange(one.copies, {})) {
    for (int box = 0; box < map.box_count; box++)
      for (int r = 0; r < map.box_rows; r++) {
        const uint32_t line = to + (box * map.box_rows + r) * kBoxRowBytes;
        const int64_t row = first_row + r, from = first_box + box;
        for (int e = 0; e < 32; e++) {
          const float value = row < map.rows && from < map.boxes ? map.at[row * map.row_stride + from * 32 + e] : 0.0f;
          std::memcpy(memory(line + ((e / 4 ^ (line >> 7 & 7)) << 4) + e % 4 * 4), &value, 4);
        }
      }
    one.bytes -= int64_t{map.box_count} * map.box_rows * kBoxRowBytes;
  }
  settle(one);
}
static inline void barrier_init(uint32_t at, int arrivals) {
  const std::lock_guard<std::mutex> held(guard);
  barriers[at] = Barrier{arrivals, arrivals};
}
static inline void barrier_expect(uint32_t at, int bytes) {
  const std::lock_guard<std::mutex> held(guard);
  barriers.at(at).bytes += bytes, barriers.at(at).left--;
  settle(barriers.at(at));
}
static inline void barrier_arrive_if(bool here, uint32_t at) {
  if (!here) return;
  const std::lock_guard<std::mutex> held(guard);
  barriers.at(at).left--;
  settle(barriers.at(at));
}
static inline bool barrier_done(uint32_t at, int parity) {
  const std::lock_guard<std::mutex> held(guard);
  return barriers.at(at).phase != parity;
}
static inline void barrier_wait(uint32_t at, int parity) {
  std::unique_lock<std::mutex> held(guard);
  Barrier& one = barriers.at(at);
  while (one.phase == parity) {
    if (!one.copies.empty()) land(one);
    else if (changed.wait_for(held, std::chrono::seconds(3)) == std::cv_status::timeout) {
      std::puts("stuck");
      std::fflush(stdout);
      std::_Exit(3);
    }
  }
}
static inline void copy_boxes(uint32_t to, const CUtensorMap* map, int row, int box, uint32_t barrier) {
  if (to % 1024 != 0) std::abort();
  const std::lock_guard<std::mutex> held(guard);
  for (int i = 0; i < map->box_count * map->box_rows * kBoxRowBytes; i++) *memory(to + i) = '\xff';
  Barrier& one = barriers.at(barrier);
  one.copies.push_back({to, *map, row, box});
  if (!late) land(one);
  changed.notify_all();
}
static inline float4 read_16(uint32_t at) {
  thread_local unsigned reads = threadIdx.x * 7;
  if (++reads % 61 == 0) std::this_thread::sleep_for(std::chrono::microseconds(reads % 5 * 10));
  if (at % 16 != 0) std::abort();
  float4 found;
  std::memcpy(&found, memory(at), 16);
  return found;
}
template <class T> static inline void store_sum(const GpuMatmulArgs& p, int64_t, int64_t m, int64_t n, float sum) {
  p.out[m * p.n + n] = sum;
}

}  // namespace gpu
}  // namespace detinfer
