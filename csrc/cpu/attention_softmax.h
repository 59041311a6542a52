// The softmax of one row of attention, short of the division: that is made once for each output.
#pragma once

#include "../order.h"
#include "attention_mask.h"

namespace detinfer {
namespace {

inline float greatest(F v) {
#if DETINFER_LANES == 16
  return _mm512_reduce_max_ps((__m512)v);
#else
  float m = v[0];
  for (int i = 1; i < kLanes; i++) m = v[i] > m ? v[i] : m;
  return m;
#endif
}

// Adds the mask to the scores of the row's keys, in place; masked keys become -inf.
inline void add_mask(const MaskRow& mask, Range range, float* scores) {
  for (int64_t key = range.low; key < range.high; key += kLanes, scores += kLanes) {
    const F value = mask_values(mask, key);
    store(scores, unmasked(value) ? load(scores) + value : value);
  }
}

// p of the masked keys becomes -0, which exp never gives.
inline void mark_holes(const MaskRow& mask, Range range, float* p) {
  for (int64_t key = range.low; key < range.high; key += kLanes, p += kLanes)
    store(p, unmasked(mask_values(mask, key)) ? load(p) : broadcast(-0.0f));
}

// row_sum of the p of the unmasked keys alone: a masked key takes no lane.
inline float sum_of_unmasked(const MaskRow& mask, Range range, const float* p) {
  alignas(64) float lanes[kRowLanes + kLanes];
  for (int i = 0; i < kRowLanes + kLanes; i++) lanes[i] = -0.0f;
  int64_t found = 0;
  for (int64_t key = range.low; key < range.high; key += kLanes) {
    const I kept = unmasked(mask_values(mask, key)) & lanes_below(range.high - key);
    for (int i = 0; i < kLanes; i++)
      if (kept[i] != 0) lanes[found++ % kRowLanes] += p[key - range.low + i];
  }
  return halve(row_sum<F, kLanes>(least(found, kRowLanes), broadcast(-0.0f),
                                  [&](F sum, int64_t at, int) { return sum + load(lanes + at); }));
}

// Turns the scores of the row's keys into p = exp(score - greatest), in place, and returns their row_sum, and then the
// sink's p if there is one; what is left of the last vector becomes 0. A NaN among the scores needs no care: its p, the
// sum and so the whole row are NaN.
inline float softmax(const MaskRow& mask, Range range, float* scores, const float* sink) {
  const int64_t count = range.high - range.low;
  // Without holes a bool mask adds nothing: +0 to every score.
  if (mask.kind > kMaskBool || range.holes) add_mask(mask, range, scores);
  const int64_t whole = count / kLanes * kLanes;
  if (whole < count) {
    float* last = scores + whole;
    store(last, lanes_below(count - whole) ? load(last) : minus_infinity());
  }
  F m[4] = {minus_infinity(), minus_infinity(), minus_infinity(), minus_infinity()};
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      const F s = load(scores + i + j * kLanes);
      m[j] = s > m[j] ? s : m[j];
    }
  for (; i < count; i += kLanes) {
    const F s = load(scores + i);
    m[0] = s > m[0] ? s : m[0];
  }
  m[0] = m[0] > m[1] ? m[0] : m[1];
  m[2] = m[2] > m[3] ? m[2] : m[3];
  float peak = greatest(m[0] > m[2] ? m[0] : m[2]);
  if (sink != nullptr && *sink > peak) peak = *sink;
  const F top = splat(peak);
  for (i = 0; i < whole; i += kLanes) store(scores + i, exp(load(scores + i) - top));
  if (whole < count) store(scores + i, lanes_below(count - whole) ? exp(load(scores + i) - top) : F{});
  float sum;
  if (range.holes) {
    sum = sum_of_unmasked(mask, range, scores);
    mark_holes(mask, range, scores);
  } else {
    sum = halve(row_sum<F, kLanes>(count, broadcast(-0.0f), [=](F lanes, int64_t at, int) {
      return lanes + load(scores + at);  // what follows the last key in its vector is +0, and no p is negative
    }));
  }
  return sink == nullptr ? sum : sum + exp(splat(*sink) - top)[0];
}

}  // namespace
}  // namespace detinfer
