// row_sum, the order of every reduction along a row: written once, for any vector type.
//
// Lanes are counted from element 0: lane l takes elements l, l + 1024, l + 2048, ... ascending. Then the lanes are
// halved: lane l adds lane l + 512, then l + 256, ..., then l + 1. A missing term is -0, which changes no sum, so a row
// of n elements needs no more than the next power of two of lanes, and zeros past its end move nothing.
#pragma once

#include <cstdint>

namespace detinfer {

static constexpr int kRowLanes = 1024;

// Runs the order on vectors V of kWidth lanes. step(sum, i, count) returns `sum` with elements i, ..., i + count - 1
// taken into its first `count` lanes (a plain addition, or an FMA for sums of squares); count is kWidth except in the
// row's last vector. Returns the last kWidth lanes; the caller halves them in the same way.
template <class V, int kWidth, class Step> static inline V row_sum(int64_t n, V missing, const Step& step) {
  constexpr int kMost = kRowLanes / kWidth;
  V lanes[kMost];
  int used = 1;
  while (used < kMost && static_cast<int64_t>(used) * kWidth < n) used *= 2;
  const int64_t whole = n / kWidth;
  const int rest = static_cast<int>(n % kWidth);
  const int first = whole < used ? static_cast<int>(whole) : used;
  for (int j = 0; j < first; j++) lanes[j] = step(missing, static_cast<int64_t>(j) * kWidth, kWidth);
  for (int j = first; j < used; j++) lanes[j] = missing;
  for (int64_t block = used; block < whole; block += used) {
    const int here = whole - block < used ? static_cast<int>(whole - block) : used;
    for (int j = 0; j < here; j++) lanes[j] = step(lanes[j], (block + j) * kWidth, kWidth);
  }
  if (rest != 0) {
    V& lane = lanes[whole % used];
    lane = step(lane, whole * kWidth, rest);
  }
  for (int half = used / 2; half >= 1; half /= 2)
    for (int j = 0; j < half; j++) lanes[j] = lanes[j] + lanes[j + half];
  return lanes[0];
}

}  // namespace detinfer
