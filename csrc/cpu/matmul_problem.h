// What every part of the matmul family shares: one product with typed pointers, tile sizes, scratch memory.
#pragma once

#include <cstdlib>

#include "../matmul.h"
#include "vec.h"

namespace detinfer {
namespace {

// Tiles of kTileRows x kPanel accumulators fill the register file: the weight panel is two vectors wide, one row of
// the other operand is broadcast at a time.
#if DETINFER_LANES == 16
constexpr int kTileRows = 14;
#elif DETINFER_LANES == 8
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 4;
#endif
constexpr int kPanel = 2 * kLanes;

template <DType T> struct Problem {
  using E = typename Storage<T>::type;
  int64_t m, n, k;
  const E* a;
  int64_t a_m, a_k;
  const E* b;
  int64_t b_k, b_n;
  const E* c;
  int64_t c_m, c_n;
  E* out;
  int64_t out_m, out_n;
  float alpha, beta;
};

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t quotient_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline F splat(float value) {
#if DETINFER_LANES == 16
  return (F)_mm512_set1_ps(value);
#elif DETINFER_LANES == 8
  return (F)_mm256_set1_ps(value);
#else
  return F{value, value, value, value};
#endif
}

// Memory of this thread that grows and is kept until the thread ends: a call must not pay for fresh pages.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  // At least `count` floats on a cache line's boundary, or null; what was there is lost when it grows.
  float* get(int64_t count) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(float);
    if (bytes > bytes_) {
      std::free(data_);
      data_ = nullptr;
      bytes_ = 0;
      if (posix_memalign(&data_, 64, bytes) != 0) return data_ = nullptr, nullptr;
      bytes_ = bytes;
    }
    return static_cast<float*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace
}  // namespace detinfer
