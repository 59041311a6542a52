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
