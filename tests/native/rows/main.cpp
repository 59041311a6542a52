// log_of_sum of csrc/gpu/rows_math.h against log64 rounded to fp32, in the floats from one bit pattern up to another, `step`
// apart: how many there were, how many differ, and how many log64 had to decide.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#define __device__
#define __forceinline__ inline

template <class To, class From> To bits_of(From from) {
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline uint32_t __float_as_uint(float value) { return bits_of<uint32_t>(value); }
inline float __uint_as_float(uint32_t bits) { return bits_of<float>(bits); }
inline long long __double_as_longlong(double value) { return bits_of<long long>(value); }
inline double __longlong_as_double(long long bits) { return bits_of<double>(bits); }
inline float __fdividef(float a, float b) { return a / b * (1.0f + OFF * 0x1p-23f); }  // a GPU's is this far off, or less

static uint64_t decided = 0;
#include "rows_math.h"

int main(int, char** given) {
  const uint64_t from = std::strtoull(given[1], nullptr, 0), to = std::strtoull(given[2], nullptr, 0);
  const uint64_t step = std::strtoull(given[3], nullptr, 0);
  uint64_t tried = 0, differ = 0;
  for (uint64_t bits = from; bits < to; bits += step, tried++) {
    const float sum = __uint_as_float(static_cast<uint32_t>(bits));
    const float quick = detinfer::gpu::log_of_sum(sum), exact = static_cast<float>(detinfer::gpu::log64(sum));
    differ += std::memcmp(&quick, &exact, sizeof quick) != 0;
  }
  std::printf("%llu %llu %llu\n", static_cast<unsigned long long>(tried), static_cast<unsigned long long>(differ),
              static_cast<unsigned long long>(decided));
}
