// What every translation unit of the CPU library shares: status codes, dtypes, threads.
//
// Each family file is compiled several times, once for each instruction set. Everything that a header defines is
// therefore `static`: a weak symbol compiled for AVX-512 must never be the one that the linker keeps for all.
// For the same reason family files use no std:: containers or algorithms.
#pragma once

#include <cstddef>
#include <cstdint>

#define DETINFER_EXPORT extern "C" __attribute__((visibility("default")))

// Marks what both the host and a GPU run. The file with no kernel in it sees plain functions.
#if defined(__CUDACC__) || defined(__HIPCC__)
#define DETINFER_HD __host__ __device__
#else
#define DETINFER_HD
#endif

// Before a template that calls what it is given: nvcc then does not warn of a functor made for one side alone.
#if defined(__NVCC__)
#define DETINFER_ANY_SIDE _Pragma("nv_exec_check_disable")
#else
#define DETINFER_ANY_SIDE
#endif

namespace detinfer {

// Returned by every exported function; detinfer_error() has the sentence of this thread's last failure.
enum Status : int { kOk = 0, kBadArgument = 1, kOutOfMemory = 2, kNotSupported = 3 };

// Storage types; all arithmetic is fp32 unless a function says otherwise. The collectives alone know those from kFloat64
// on, which they add in the type itself.
enum DType : int { kFloat32 = 0, kBFloat16, kFloat16, kFloat64, kInt8, kUInt8, kInt16, kInt32, kInt64 };

// Records a sentence for detinfer_error() and returns `status`.
int fail(Status status, const char* sentence);

// body(begin, end, context) over [begin, end) in pieces of at least `grain`, on torch's own threads when the
// library was given them (see native.py), else on this thread. How the range is cut must never change a bit.
using Body = void (*)(int64_t begin, int64_t end, void* context);
void parallel_for(int64_t begin, int64_t end, int64_t grain, Body body, void* context);

// Threads that parallel_for may use: for choosing the shape of a task, never the order of a sum.
int threads();

}  // namespace detinfer

// The rest is for GPU code, and nothing else in csrc knows CUDA from HIP.
#ifndef DETINFER_MUTANT
#define DETINFER_MUTANT 0  // tests build the GPU library with one fault each; scripts/gpu.py --mutants
#endif
#if defined(__CUDACC__) || defined(__HIP__)
#if defined(__HIP__)
#include <hip/hip_runtime.h>
#else
#include <cuda_runtime.h>
#endif

// A kernel's parameter that is read where it lies, in constant memory, also where its address is taken.
#if defined(__HIP__)
#define DETINFER_PARAMETER const
#else
#define DETINFER_PARAMETER const __grid_constant__
#endif

// Blocks that read each other's shared memory.
#if defined(__HIP__)
#define DETINFER_CLUSTERS 0
#else
#define DETINFER_CLUSTERS 1
#endif

namespace detinfer {
namespace gpu {

#if defined(__HIP__)
using Stream = hipStream_t;
using Code = hipError_t;
static constexpr Code kNoError = hipSuccess;
using Handle = hipIpcMemHandle_t;
static inline const char* sentence_of(Code code) { return hipGetErrorString(code); }
// Flags and staging are written by other GPUs while a kernel reads them: kept out of the caches.
static inline Code allocate_shared(void** at, size_t bytes) {
  return hipExtMallocWithFlags(at, bytes, hipDeviceMallocUncached);
}
static inline Code allocate(void** at, size_t bytes) { return hipMalloc(at, bytes); }
static inline Code release(void* at) { return hipFree(at); }
static inline Code fill(void* at, int byte, size_t bytes) { return hipMemset(at, byte, bytes); }
static inline Code copy_in(void* to, const void* from, size_t bytes) {
  return hipMemcpy(to, from, bytes, hipMemcpyHostToDevice);
}
static inline Code synchronize() { return hipDeviceSynchronize(); }
static inline Code last_error() { return hipGetLastError(); }
static inline Code allocate_mapped(void** at, size_t bytes) { return hipHostMalloc(at, bytes, hipHostMallocMapped); }
static inline Code release_mapped(void* at) { return hipHostFree(at); }
static inline Code device_address(void** device, void* host) { return hipHostGetDevicePointer(device, host, 0); }
static inline Code handle_of(Handle* handle, void* at) { return hipIpcGetMemHandle(handle, at); }
static inline Code open_handle(void** at, Handle handle) {
  return hipIpcOpenMemHandle(at, handle, hipIpcMemLazyEnablePeerAccess);
}
static inline Code close_handle(void* at) { return hipIpcCloseMemHandle(at); }
static inline Code can_reach(int* can, int device, int peer) { return hipDeviceCanAccessPeer(can, device, peer); }
static inline Code current_device(int* device) { return hipGetDevice(device); }
static inline Code use_device(int device) { return hipSetDevice(device); }
static inline Code processors(int* count) {
  int device = 0;
  const Code code = hipGetDevice(&device);
  return code != kNoError ? code : hipDeviceGetAttribute(count, hipDeviceAttributeMultiprocessorCount, device);
}
static inline Code can_overlap(bool* can) {  // see launch()
  *can = false;
  return hipSuccess;
}
template <class Kernel> static inline Code blocks_at_once(int* blocks, Kernel kernel, int threads, int shared_bytes) {
  return hipOccupancyMaxActiveBlocksPerMultiprocessor(blocks, kernel, threads, static_cast<size_t>(shared_bytes));
}
template <class Kernel> static inline Code load_kernel(Kernel kernel, int shared_bytes) {
  hipFuncAttributes attributes;
  (void)shared_bytes;
  return hipFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
}
static inline Code can_group(bool* can) {  // see launch_groups()
  *can = false;
  return hipSuccess;
}
template <class Kernel> static inline Code groups_at_once(int* groups, Kernel, int, int, int) {
  *groups = 0;
  return hipSuccess;
}
template <class... Parameters, class... Arguments>
static inline Code launch_groups(void (*kernel)(Parameters...), int /*group*/, int blocks, int threads, int shared_bytes,
                                 Stream stream, bool /*overlap*/, Arguments... arguments) {
  kernel<<<blocks, threads, shared_bytes, stream>>>(arguments...);
  return hipGetLastError();
}
#else
using Stream = cudaStream_t;
using Code = cudaError_t;
static constexpr Code kNoError = cudaSuccess;
using Handle = cudaIpcMemHandle_t;
static inline const char* sentence_of(Code code) { return cudaGetErrorString(code); }
static inline Code allocate_shared(void** at, size_t bytes) { return cudaMalloc(at, bytes); }
static inline Code allocate(void** at, size_t bytes) { return cudaMalloc(at, bytes); }
static inline Code release(void* at) { return cudaFree(at); }
static inline Code fill(void* at, int byte, size_t bytes) { return cudaMemset(at, byte, bytes); }
static inline Code copy_in(void* to, const void* from, size_t bytes) {
  return cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice);
}
static inline Code synchronize() { return cudaDeviceSynchronize(); }
static inline Code last_error() { return cudaGetLastError(); }
static inline Code allocate_mapped(void** at, size_t bytes) { return cudaHostAlloc(at, bytes, cudaHostAllocMapped); }
static inline Code release_mapped(void* at) { return cudaFreeHost(at); }
static inline Code device_address(void** device, void* host) { return cudaHostGetDevicePointer(device, host, 0); }
static inline Code handle_of(Handle* handle, void* at) { return cudaIpcGetMemHandle(handle, at); }
static inline Code open_handle(void** at, Handle handle) {
  return cudaIpcOpenMemHandle(at, handle, cudaIpcMemLazyEnablePeerAccess);
}
static inline Code close_handle(void* at) { return cudaIpcCloseMemHandle(at); }
static inline Code can_reach(int* can, int device, int peer) { return cudaDeviceCanAccessPeer(can, device, peer); }
static inline Code current_device(int* device) { return cudaGetDevice(device); }
static inline Code use_device(int device) { return cudaSetDevice(device); }
static inline Code processors(int* count) {
  int device = 0;
  const Code code = cudaGetDevice(&device);
  return code != kNoError ? code : cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
}
static inline Code can_overlap(bool* can) {  // see launch()
  int device = 0, major = 0;
  Code code = cudaGetDevice(&device);
  if (code == kNoError) code = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  *can = major >= 9;
  return code;
}
template <class Kernel> static inline Code blocks_at_once(int* blocks, Kernel kernel, int threads, int shared_bytes) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, kernel, threads, static_cast<size_t>(shared_bytes));
}
// A kernel is loaded on its first use otherwise, and loading may wait for the device: a peer's kernel that spins there
// would wait for this one.
template <class Kernel> static inline Code load_kernel(Kernel kernel, int shared_bytes) {
  cudaFuncAttributes attributes;
  const Code code = cudaFuncGetAttributes(&attributes, kernel);
  if (code != kNoError || shared_bytes == 0) return code;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
}
static inline Code can_group(bool* can) { return can_overlap(can); }  // see launch_groups(); the same generation
// Groups of `group` blocks that the device holds at once.
template <class Kernel> static inline Code groups_at_once(int* groups, Kernel kernel, int group, int threads, int shared_bytes) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(group));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(group), 1, 1};
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaOccupancyMaxActiveClusters(groups, kernel, &config);
}
// group: so many neighbouring blocks run at the same time and see each other's shared memory.
// overlap: the kernel may be set up while the one before it on the stream still runs; it must begin with
// wait_for_previous_kernel(), which holds it until that one is complete and its writes are visible.
template <class... Parameters, class... Arguments>
static inline Code launch_groups(void (*kernel)(Parameters...), int group, int blocks, int threads, int shared_bytes,
                                 Stream stream, bool overlap, Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  cudaLaunchAttribute attributes[2] = {};
  if (overlap) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (group > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {static_cast<unsigned>(group), 1, 1};
  }
  config.attrs = attributes;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}
// `clusters` times `blocks` blocks; a kernel's own shared memory beside the dynamic one counts too.
template <class... Parameters, class... Arguments>
static inline Code launch_cluster(void (*kernel)(Parameters...), int clusters, int blocks, int threads, int shared_bytes,
                                  Stream stream, Arguments... arguments) {
  const Code code = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (code != cudaSuccess) return code;
  return launch_groups(kernel, blocks, clusters * blocks, threads, shared_bytes, stream, false, arguments...);
}
// Where a byte of shared memory lies, as instructions name it.
static __device__ __forceinline__ uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}
#endif
template <class... Parameters, class... Arguments>
static inline Code launch(void (*kernel)(Parameters...), int blocks, int threads, int shared_bytes, Stream stream,
                          bool overlap, Arguments... arguments) {
  return launch_groups(kernel, 1, blocks, threads, shared_bytes, stream, overlap, arguments...);
}

// --- Device side: memory shared between GPUs. docs/concepts/memory_ordering.md has the argument. ---

// Two 64-bit words side by side; each is written and read whole, the pair is not.
struct alignas(16) Words {
  uint64_t low, high;
};

static __device__ __forceinline__ void store_relaxed(Words* at, Words value) {
#if defined(__HIP__)
  __hip_atomic_store(&at->low, value.low, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_SYSTEM);
  __hip_atomic_store(&at->high, value.high, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_SYSTEM);
#else
  asm volatile("st.relaxed.sys.global.v2.b64 [%0], {%1, %2};" ::"l"(at), "l"(value.low), "l"(value.high) : "memory");
#endif
}

static __device__ __forceinline__ Words load_relaxed(const Words* at) {
  Words value;
#if defined(__HIP__)
  value.low = __hip_atomic_load(&at->low, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_SYSTEM);
  value.high = __hip_atomic_load(&at->high, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_SYSTEM);
#else
  asm volatile("ld.relaxed.sys.global.v2.b64 {%0, %1}, [%2];" : "=l"(value.low), "=l"(value.high) : "l"(at) : "memory");
#endif
  return value;
}

static __device__ __forceinline__ void store_relaxed(uint64_t* at, uint64_t value) {
#if defined(__HIP__)
  __hip_atomic_store(at, value, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_SYSTEM);
#else
  asm volatile("st.relaxed.sys.global.b64 [%0], %1;" ::"l"(at), "l"(value) : "memory");
#endif
}

static __device__ __forceinline__ uint64_t load_relaxed(const uint64_t* at) {
#if defined(__HIP__)
  return __hip_atomic_load(at, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_SYSTEM);
#else
  uint64_t value;
  asm volatile("ld.relaxed.sys.global.b64 %0, [%1];" : "=l"(value) : "l"(at) : "memory");
  return value;
#endif
}

// Everything that this thread did, and what it saw through a barrier of its block, comes before the flag.
static __device__ __forceinline__ void store_release(uint64_t* at, uint64_t value) {
#if DETINFER_MUTANT == 1  // the flag may overtake the data
#if defined(__HIP__)
  __hip_atomic_store(at, value, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_SYSTEM);
#else
  asm volatile("st.relaxed.sys.global.b64 [%0], %1;" ::"l"(at), "l"(value) : "memory");
#endif
#elif defined(__HIP__)
  __hip_atomic_store(at, value, __ATOMIC_RELEASE, __HIP_MEMORY_SCOPE_SYSTEM);
#else
  asm volatile("st.release.sys.global.b64 [%0], %1;" ::"l"(at), "l"(value) : "memory");
#endif
}

// What came before the flag that is read comes before everything that follows.
static __device__ __forceinline__ uint64_t load_acquire(const uint64_t* at) {
#if defined(__HIP__)
#if DETINFER_MUTANT == 2  // caches of other GPUs' memory are kept
  return __hip_atomic_load(at, __ATOMIC_ACQUIRE, __HIP_MEMORY_SCOPE_AGENT);
#else
  return __hip_atomic_load(at, __ATOMIC_ACQUIRE, __HIP_MEMORY_SCOPE_SYSTEM);
#endif
#else
  uint64_t value;
#if DETINFER_MUTANT == 2
  asm volatile("ld.acquire.gpu.global.b64 %0, [%1];" : "=l"(value) : "l"(at) : "memory");
#else
  asm volatile("ld.acquire.sys.global.b64 %0, [%1];" : "=l"(value) : "l"(at) : "memory");
#endif
  return value;
#endif
}

// Called by every thread of a block after the barrier that follows the acquire of some of them. In PTX's model the
// barrier passes the acquire on. AMD's caches know no such thing: each wave drops what it may hold.
static __device__ __forceinline__ void acquire_for_all() {
#if defined(__HIP__) && DETINFER_MUTANT != 3
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "");
#endif
}

static __device__ __forceinline__ uint32_t load_flag(const uint32_t* at) {
#if defined(__HIP__)
  return __hip_atomic_load(at, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
#else
  uint32_t value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
#endif
}

static __device__ __forceinline__ void fence_system() { __threadfence_system(); }

// What this thread saw by relaxed loads comes before what follows, and what came before comes before its relaxed stores.
static __device__ __forceinline__ void fence_both() {
#if defined(__HIP__)
  __builtin_amdgcn_fence(__ATOMIC_ACQ_REL, "");
#else
  asm volatile("fence.acq_rel.sys;" ::: "memory");
#endif
}

// --- Device side: warps of one block that go their own ways. A warp is 32 neighbouring threads, also where a wave is 64. ---

// Every thread of the warp: what each did before comes before what all do after.
static __device__ __forceinline__ void sync_warp() {
#if defined(__HIP__)
  __builtin_amdgcn_fence(__ATOMIC_ACQ_REL, "wavefront");
  __builtin_amdgcn_wave_barrier();
#else
  __syncwarp();
#endif
}

// A count in shared memory. add(): every thread of a warp; counts the warp once, and what it did before comes before what
// a thread does that has seen the count. peek(): the count so far; then fence_block().
static __device__ __forceinline__ void add(uint32_t* count) {
  sync_warp();
  if (threadIdx.x % 32 == 0) {
    __threadfence_block();
    atomicAdd(count, 1u);
  }
}
static __device__ __forceinline__ uint32_t peek(const uint32_t* count) { return *static_cast<const volatile uint32_t*>(count); }
static __device__ __forceinline__ void fence_block() { __threadfence_block(); }

// Before sync_first_warps(), by every thread of the block.
static __device__ __forceinline__ void clear_first_warps(uint32_t* count) {
#if defined(__HIP__)
  if (threadIdx.x == 0) *count = 0;
  __syncthreads();
#endif
}

// A barrier of the block's first `warps` warps; `turn`: how often they met before, in `count`, which was 0.
static __device__ __forceinline__ void sync_first_warps(int warps, uint32_t* count, uint32_t turn) {
#if defined(__HIP__)
  add(count);
  while (static_cast<int32_t>(peek(count) - (turn + 1) * static_cast<uint32_t>(warps)) < 0) __builtin_amdgcn_s_sleep(1);
  fence_block();
#else
  asm volatile("barrier.sync 1, %0;" ::"r"(32 * warps) : "memory");
#endif
}

// A clock in nanoseconds, coarse: for time limits.
static __device__ __forceinline__ uint64_t now_ns() {
#if defined(__HIP__)
  return static_cast<uint64_t>(wall_clock64()) * 10;
#else
  uint64_t value;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(value));
  return value;
#endif
}

// The next kernel on the stream may be set up from here on (launch's `overlap`); then: not before the one before is done.
static __device__ __forceinline__ void wait_for_previous_kernel() {
#if !defined(__HIP__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#if DETINFER_CLUSTERS
// The value at `shared`, an address in this block's shared memory, in that of the cluster's block `rank`.
static __device__ __forceinline__ float from_block(const float* shared, int rank) {
  float value = 0.0f;
#if __CUDA_ARCH__ >= 900
  const uint32_t here = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(there) : "memory");
#endif
  return value;
}
#endif

// --- Device side: blocks of a group (launch_groups) give each other values through shared memory. ---

// Where the values of one exchange arrive: a count of bytes that every thread of the block can wait for.
struct Arrival {
  uint64_t barrier;
};

#if !defined(__HIP__) && __CUDA_ARCH__ >= 900
static constexpr bool kGroups = true;
// One thread; then every thread of every block of the group calls meet_begin() and, before it sends, meet_end(): what
// came before the one is seen after the other.
static __device__ __forceinline__ void make(Arrival* arrival) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(arrival)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
static __device__ __forceinline__ void meet_begin() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
static __device__ __forceinline__ void meet_end() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
// One thread, once for each exchange.
static __device__ __forceinline__ void expect(Arrival* arrival, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(arrival)), "r"(bytes) : "memory");
}
// Two floats to `at`, which counts in `arrival`; both are this block's, and those of block `block` of the group are meant.
static __device__ __forceinline__ void send_floats(float* at, float first, float second, Arrival* arrival, int block) {
  uint32_t to, counted;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(shared_address(at)), "r"(block));
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(counted) : "r"(shared_address(arrival)), "r"(block));
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(to), "f"(first),
               "f"(second), "r"(counted)
               : "memory");
}
// Until everything that was expected has arrived; `turn`: how often `arrival` was full before, modulo 2.
static __device__ __forceinline__ void await(Arrival* arrival, uint32_t turn) {
  uint32_t done = 0;
  while (done == 0)
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(shared_address(arrival)), "r"(turn)
        : "memory");
}
#else  // groups of one block: never called
static constexpr bool kGroups = false;
static __device__ __forceinline__ void make(Arrival*) {}
static __device__ __forceinline__ void meet_begin() {}
static __device__ __forceinline__ void meet_end() {}
static __device__ __forceinline__ void expect(Arrival*, uint32_t) {}
static __device__ __forceinline__ void send_floats(float*, float, float, Arrival*, int) {}
static __device__ __forceinline__ void await(Arrival*, uint32_t) {}
#endif

// --- Device side: lanes and conversions. ---

// Exchange inside groups of 32 neighbouring threads.
static __device__ __forceinline__ float from_lane_xor(float value, int mask) {
#if defined(__HIP__)
  return __shfl_xor(value, mask, 32);
#else
  return __shfl_xor_sync(0xffffffffu, value, mask, 32);
#endif
}

// True where `here` holds for every thread of the warp or wave; all of them must call it.
static __device__ __forceinline__ bool every_lane(bool here) {
#if defined(__HIP__)
  return __all(here) != 0;
#else
  return __all_sync(0xffffffffu, here) != 0;
#endif
}

#if defined(__HIP__)
static __device__ __forceinline__ uint32_t one_bfloat16(float value) {
  const uint32_t bits = __float_as_uint(value);
  return (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fffu : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}
static __device__ __forceinline__ uint32_t one_float16(float value) {
  const _Float16 half = static_cast<_Float16>(value);
  uint16_t bits;
  __builtin_memcpy(&bits, &half, sizeof bits);
  return value != value ? 0x7fffu : bits;
}
#endif

// Two values rounded to nearest even, the first in the low half; NaN becomes the canonical NaN.
static __device__ __forceinline__ uint32_t to_bfloat16(float low, float high) {
#if defined(__HIP__)
  return one_bfloat16(low) | one_bfloat16(high) << 16;
#else
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#endif
}

static __device__ __forceinline__ uint32_t to_float16(float low, float high) {
#if defined(__HIP__)
  return one_float16(low) | one_float16(high) << 16;
#else
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#endif
}

static __device__ __forceinline__ float from_float16(uint16_t bits) {
#if defined(__HIP__)
  _Float16 half;
  __builtin_memcpy(&half, &bits, sizeof half);
  return static_cast<float>(half);
#else
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
#endif
}

static __device__ __forceinline__ uint32_t to_float32(float value) {
  const uint32_t bits = __float_as_uint(value);
  return (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fffffffu : bits;
}

}  // namespace gpu
}  // namespace detinfer
#endif
