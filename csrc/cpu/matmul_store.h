// What happens to a finished sum: alpha, the addend, one rounding, the canonical NaN, the store.
#pragma once

#include "matmul_problem.h"

namespace detinfer {
namespace {

template <DType T> inline float element(typename Storage<T>::type value) {
  if constexpr (T == kFloat32) return value;
  else if constexpr (T == kBFloat16) return bfloat16_to_float(value);
  else return float16_to_float(value);
}

template <DType T> inline typename Storage<T>::type rounded(float value) {
  if constexpr (T == kFloat32) return detinfer::canonical(value);
  else if constexpr (T == kBFloat16) return float_to_bfloat16(value);
  else return float_to_float16(value);
}

// Columns with a stride: one value at a time, the same operations as below.
template <DType T>
void store_scattered(const Problem<T>& p, const float* sums, int64_t row, int rows, int64_t column, int columns) {
  for (int r = 0; r < rows; r++) {
    for (int n = 0; n < columns; n++) {
      float value = sums[r * kPanel + n];
      if (p.alpha != 1.0f) value = value * p.alpha;
      if (p.c != nullptr) {
        float addend = element<T>(p.c[(row + r) * p.c_m + (column + n) * p.c_n]);
        if (p.beta != 1.0f) addend = addend * p.beta;
        value = value + addend;
      }
      p.out[(row + r) * p.out_m + (column + n) * p.out_n] = rounded<T>(value);
    }
  }
}

// sums[rows][kPanel] -> out[row ..., column ...]; the first `columns` of each row are meant.
template <DType T>
void store_tile(const Problem<T>& p, const float* sums, int64_t row, int rows, int64_t column, int columns) {
  if (p.out_n != 1 || (p.c != nullptr && p.c_n > 1)) return store_scattered<T>(p, sums, row, rows, column, columns);
  for (int r = 0; r < rows; r++) {
    for (int n = 0; n < columns; n += kLanes) {
      const int count = columns - n < kLanes ? columns - n : kLanes;
      F value = load(sums + r * kPanel + n);
      if (p.alpha != 1.0f) value = value * splat(p.alpha);
      if (p.c != nullptr) {
        const typename Storage<T>::type* c = p.c + (row + r) * p.c_m + (column + n) * p.c_n;
        F addend = p.c_n == 0 ? splat(element<T>(*c)) : count == kLanes ? load_as<T>(c) : load_some<T>(c, count, 0.0f);
        if (p.beta != 1.0f) addend = addend * splat(p.beta);
        value = value + addend;
      }
      typename Storage<T>::type* out = p.out + (row + r) * p.out_m + column + n;
      if (count == kLanes) store_as<T>(out, value);
      else store_some<T>(out, value, count);
    }
  }
}

}  // namespace
}  // namespace detinfer
