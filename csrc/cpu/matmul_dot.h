// bf16 through vdpbf16ps, where its bits are those of the FMA chain.
//
// The instruction adds a pair of products to each lane: the odd element's first, then the even one's, each an FMA
// rounded to nearest even. Packed as (k + 1, k), pairs therefore give the chain of ascending k. But it takes subnormal
// operands and results for zero. None can arise if the least exponents of the non-zero elements of both operands
// are normal and their sum is at least -112: a product of 8-bit significands is then a multiple of 2^-126, and so is
// every sum of products, rounded or not. Where that does not hold, the FMA path runs instead.
#pragma once

#include "matmul_tile.h"

#ifdef DETINFER_LEVEL_avx512_bf16
#include <time.h>

namespace detinfer {
namespace {

// Pads an odd k: the product (-0) * (+0) = -0 changes no accumulator, not even -0.
constexpr uint32_t kPadA = 0x8000u;
constexpr uint32_t kPadB = 0x0000u;

// The least exponent of non-zero bf16 values, seen so far.
class Exponents {
 public:
  void add(U pairs) {
    // Zero wraps to the largest value; a subnormal keeps an exponent field of 0.
    const __m512i magnitude = _mm512_and_si512((__m512i)pairs, _mm512_set1_epi16(0x7fff));
    least_ = _mm512_min_epu16(least_, _mm512_sub_epi16(magnitude, _mm512_set1_epi16(1)));
  }
  // Biased exponent field; 512 if there was nothing but zeros.
  int field() const {
    uint16_t lanes[32];
    std::memcpy(lanes, &least_, sizeof lanes);
    int least = 0xffff;
    for (uint16_t lane : lanes) least = lane < least ? lane : least;
    return (least + 1) >> 7;
  }

 private:
  __m512i least_ = _mm512_set1_epi16(-1);
};

inline bool dot_is_exact(int field_a, int field_b) {
  return field_a > 0 && field_b > 0 && field_a - 127 + field_b - 127 >= -112;
}

// As pack_lanes, but lanes of 32-bit pairs (k in the odd half, k + 1 in the even one), quotient_up(k, 2) of them. Lanes
// past `lanes` repeat the last one or hold zeros, so that they leave the exponents alone.
inline void pack_pairs(const uint16_t* p, int64_t lane_stride, int64_t k_stride, int lanes, int64_t k, uint32_t pad,
                       float* out, int64_t step, Exponents& exponents) {
  auto put = [&](U pairs) {
    exponents.add(pairs);
    store(out, (F)pairs);
    out += step;
  };
  int64_t done = 0;
  if (k_stride == 1) {
    F t[kLanes];
    for (; done + kBlock<kBFloat16> <= k; done += kBlock<kBFloat16>) {
      if (lanes == kLanes) load_rows<kBFloat16, true>(p + done, lane_stride, lanes - 1, t);
      else load_rows<kBFloat16, false>(p + done, lane_stride, lanes - 1, t);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; i++) put((U)_mm512_ror_epi32((__m512i)t[i], 16));
    }
    if (done == k) return;
    load_rest<kBFloat16>(p + done, lane_stride, lanes - 1, k - done, t);
    for (int i = 0; done + 2 <= k; i++, done += 2) put((U)_mm512_ror_epi32((__m512i)t[i], 16));
    if (done < k) put(((U)t[(k % kBlock<kBFloat16>) / 2] << 16) | pad);
    return;
  }
  auto row = [&](int64_t i) {
    H values = {};
    if (lane_stride == 1 && lanes == kLanes) std::memcpy(&values, p + i * k_stride, sizeof values);
    else
      for (int l = 0; l < lanes; l++) values[l] = p[i * k_stride + l * lane_stride];
    return __builtin_convertvector(values, U);
  };
  for (; done + 2 <= k; done += 2) put((row(done) << 16) | row(done + 1));
  if (done < k) put((row(done) << 16) | pad);
}

// [pairs][width] back to fp32 [k][width], for the FMA path.
inline void widen_pairs(const float* pairs, int64_t width, int64_t k, float* out) {
  uint32_t word;
  for (int64_t i = 0; i < k; i++) {
    for (int64_t l = 0; l < width; l++) {
      std::memcpy(&word, pairs + i / 2 * width + l, sizeof word);
      out[i * width + l] = bits_to_float(i % 2 == 0 ? word & 0xffff0000u : word << 16);
    }
  }
}

// tile() on pairs.
template <int R> void dot_tile(int64_t pairs, const float* a, const float* b, float* c, bool resume) {
  __m512 acc[R][2];
#pragma GCC unroll 14
  for (int r = 0; r < R; r++) {
    acc[r][0] = resume ? _mm512_loadu_ps(c + r * kPanel) : _mm512_setzero_ps();
    acc[r][1] = resume ? _mm512_loadu_ps(c + r * kPanel + kLanes) : _mm512_setzero_ps();
  }
  for (; pairs > 0; pairs--, a += kLanes, b += kPanel) {
    const __m512bh low = (__m512bh)_mm512_loadu_ps(b);
    const __m512bh high = (__m512bh)_mm512_loadu_ps(b + kLanes);
#pragma GCC unroll 14
    for (int r = 0; r < R; r++) {
      const __m512bh x = (__m512bh)_mm512_set1_ps(a[r]);
      acc[r][0] = _mm512_dpbf16_ps(acc[r][0], x, low);
      acc[r][1] = _mm512_dpbf16_ps(acc[r][1], x, high);
    }
  }
#pragma GCC unroll 14
  for (int r = 0; r < R; r++) {
    _mm512_storeu_ps(c + r * kPanel, acc[r][0]);
    _mm512_storeu_ps(c + r * kPanel + kLanes, acc[r][1]);
  }
}

template <int R = kTileRows>
inline void run_dot_tile(int rows, int64_t pairs, const float* a, const float* b, float* c, bool resume) {
  if constexpr (R > 1) {
    if (rows != R) return run_dot_tile<R - 1>(rows, pairs, a, b, c, resume);
  }
  dot_tile<R>(pairs, a, b, c, resume);
}

inline int64_t nanoseconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<int64_t>(now.tv_sec) * 1000000000 + now.tv_nsec;
}

// True if one vdpbf16ps takes clearly less time than the two FMAs that it stands for. It is so on AMD Zen 4 and 5, and the
// other way round on Intel without AMX. The bits are the same either way.
inline bool dot_is_faster() {
  alignas(64) float a[64 * kLanes] = {}, b[64 * kPanel] = {}, c[8 * kPanel];
  int64_t best[2] = {INT64_MAX, INT64_MAX};
  for (int repeat = 0; repeat < 60; repeat++) {
    for (int way = 0; way < 2; way++) {
      const int64_t start = nanoseconds();
      for (int i = 0; i < 4; i++) {
        if (way == 0) tile<8>(64, a, 64, b, c, false, nullptr);
        else dot_tile<8>(32, a, b, c, false);
      }
      best[way] = least(best[way], nanoseconds() - start);
    }
  }
  return best[1] * 5 < best[0] * 4;
}

}  // namespace
}  // namespace detinfer
#endif
