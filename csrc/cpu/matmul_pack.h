// Packing: kLanes rows of an operand become vectors of fp32 whose lanes are the rows, one vector for each k.
#pragma once

#include "matmul_problem.h"

namespace detinfer {
namespace {

// bf16 is transposed as 32-bit words of two neighbouring k and split afterwards: half the shuffles.
template <DType T> constexpr int kWord = T == kBFloat16 ? 2 : 1;
// k covered by one transposed block.
template <DType T> constexpr int kBlock = kLanes * kWord<T>;

// t[i] = lane vector of word i. In: t[l] = the words of lane l.
inline void transpose(F (&t)[kLanes]) {
#if DETINFER_LANES == 4
  const F u[4] = {t[0], t[1], t[2], t[3]};
  for (int i = 0; i < 4; i++) t[i] = F{u[0][i], u[1][i], u[2][i], u[3][i]};
#elif DETINFER_LANES == 8
  __m256 u[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 2) {
    u[i] = _mm256_unpacklo_ps((__m256)t[i], (__m256)t[i + 1]);
    u[i + 1] = _mm256_unpackhi_ps((__m256)t[i], (__m256)t[i + 1]);
  }
  __m256 v[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 4) {
    v[i] = _mm256_shuffle_ps(u[i], u[i + 2], 0x44);
    v[i + 1] = _mm256_shuffle_ps(u[i], u[i + 2], 0xee);
    v[i + 2] = _mm256_shuffle_ps(u[i + 1], u[i + 3], 0x44);
    v[i + 3] = _mm256_shuffle_ps(u[i + 1], u[i + 3], 0xee);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 4; i++) {
    t[i] = (F)_mm256_permute2f128_ps(v[i], v[i + 4], 0x20);
    t[i + 4] = (F)_mm256_permute2f128_ps(v[i], v[i + 4], 0x31);
  }
#else
  // In: t[r] = [row r, words 0-7 | row r + 8, words 0-7], t[r + 8] the same of words 8-15 (see load_rows): the first
  // exchange is done by the loads, which leaves the shuffle port to the other three.
  __m512 u[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    u[i] = _mm512_unpacklo_ps((__m512)t[i], (__m512)t[i + 1]);
    u[i + 1] = _mm512_unpackhi_ps((__m512)t[i], (__m512)t[i + 1]);
  }
  // v[4 h + q + j]: words (q, q + 4) + 8 h of rows j * 4 .. j * 4 + 3 and of the rows 8 further.
  __m512 v[16];
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    v[i] = (__m512)_mm512_unpacklo_pd((__m512d)u[i], (__m512d)u[i + 2]);
    v[i + 1] = (__m512)_mm512_unpackhi_pd((__m512d)u[i], (__m512d)u[i + 2]);
    v[i + 2] = (__m512)_mm512_unpacklo_pd((__m512d)u[i + 1], (__m512d)u[i + 3]);
    v[i + 3] = (__m512)_mm512_unpackhi_pd((__m512d)u[i + 1], (__m512d)u[i + 3]);
  }
  // Blocks of four rows now: v[i] = [0-3: word q | 0-3: word q + 4 | 8-11: word q | 8-11: word q + 4],
  // v[i + 4] the same of rows 4-7 and 12-15.
  const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
  const __m512i high = _mm512_setr_epi32(4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
#pragma GCC unroll 2
  for (int h = 0; h < 16; h += 8) {
#pragma GCC unroll 4
    for (int q = 0; q < 4; q++) {
      t[h + q] = (F)_mm512_permutex2var_ps(v[h + q], low, v[h + q + 4]);
      t[h + q + 4] = (F)_mm512_permutex2var_ps(v[h + q], high, v[h + q + 4]);
    }
  }
#endif
}

// Words of kBlock consecutive k, of the rows at p, p + ld, ...; rows past `last` repeat it and are not used.
template <DType T, bool Full>
inline void load_rows(const typename Storage<T>::type* p, int64_t ld, int last, F (&t)[kLanes]) {
  auto row = [&](int r) { return p + (Full || r < last ? r : last) * ld; };
#if DETINFER_LANES == 16
#pragma GCC unroll 8
  for (int r = 0; r < 8; r++) {
    if constexpr (T == kFloat16) {
      const __m512 x = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)row(r)));
      const __m512 y = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)row(r + 8)));
      t[r] = (F)_mm512_insertf32x8(x, _mm512_castps512_ps256(y), 1);
      t[r + 8] = (F)_mm512_shuffle_f32x4(x, y, 0xee);
    } else {
      const float* x = (const float*)row(r);
      const float* y = (const float*)row(r + 8);
      t[r] = (F)_mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(x)), _mm256_loadu_ps(y), 1);
      t[r + 8] = (F)_mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(x + 8)), _mm256_loadu_ps(y + 8), 1);
    }
  }
#else
#pragma GCC unroll 8
  for (int r = 0; r < kLanes; r++) {
    if constexpr (T == kFloat16) t[r] = load_as<T>(row(r));
    else std::memcpy(&t[r], row(r), sizeof(F));
  }
#endif
  transpose(t);
}

// fp32 values of the j-th k in a word.
template <DType T> inline F part(F word, int j) {
  if constexpr (T != kBFloat16) return word;
  else return j == 0 ? (F)((U)word << 16) : (F)((U)word & 0xffff0000u);
}

// The part of `count` (< kBlock) consecutive k that is left at the end of the rows: copied first, since a vector load
// would run past the operand's last element.
template <DType T> inline void load_rest(const typename Storage<T>::type* p, int64_t ld, int last, int64_t count,
                                         F (&t)[kLanes]) {
  alignas(64) typename Storage<T>::type rows[kLanes * kBlock<T>] = {};
  for (int r = 0; r <= last; r++) std::memcpy(rows + r * kBlock<T>, p + r * ld, sizeof(rows[0]) * count);
  load_rows<T, true>(rows, kBlock<T>, kLanes - 1, t);
}

template <DType T, bool Full>
inline void pack_transposed(const typename Storage<T>::type* p, int64_t ld, int last, int64_t k, float* out,
                            int64_t step) {
  F t[kLanes];
  int64_t done = 0;
  for (; done + kBlock<T> <= k; done += kBlock<T>) {
    load_rows<T, Full>(p + done, ld, last, t);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i++)
#pragma GCC unroll 2
      for (int j = 0; j < kWord<T>; j++, out += step) store(out, part<T>(t[i], j));
  }
  if (done == k) return;
  load_rest<T>(p + done, ld, last, k - done, t);
  for (int i = 0; done < k; i++)
    for (int j = 0; j < kWord<T> && done < k; j++, done++, out += step) store(out, part<T>(t[i], j));
}

// One lane alone: its k in a row.
template <DType T> inline void widen_row(const typename Storage<T>::type* p, int64_t k, float* out) {
  int64_t done = 0;
  for (; done + kLanes <= k; done += kLanes) store(out + done, load_as<T>(p + done));
  if (done < k) {
    float rest[kLanes];
    store(rest, load_some<T>(p + done, static_cast<int>(k - done), 0.0f));
    std::memcpy(out + done, rest, sizeof(float) * (k - done));
  }
}

// Writes kLanes floats at out, out + step, ... for k = 0, 1, ...; the first `lanes` of them are the operand's, the
// others are not used. With step < kLanes each write overlaps the next, so `out` needs kLanes - step floats more at
// its end.
template <DType T>
inline void pack_lanes(const typename Storage<T>::type* p, int64_t lane_stride, int64_t k_stride, int lanes, int64_t k,
                       float* out, int64_t step) {
  if (k_stride == 1 && lanes == 1 && step == 1) {
    widen_row<T>(p, k, out);
  } else if (k_stride == 1) {
    if (lanes == kLanes) pack_transposed<T, true>(p, lane_stride, lanes - 1, k, out, step);
    else pack_transposed<T, false>(p, lane_stride, lanes - 1, k, out, step);
  } else if (lane_stride == 1 && lanes == kLanes) {
    for (int64_t i = 0; i < k; i++) store(out + i * step, load_as<T>(p + i * k_stride));
  } else {
    for (int64_t i = 0; i < k; i++) {
      typename Storage<T>::type row[kLanes] = {};
      for (int l = 0; l < lanes; l++) row[l] = p[i * k_stride + l * lane_stride];
      store(out + i * step, load_as<T>(row));
    }
  }
}

// Rows of the operand as fp32 rows `ld` floats apart, k contiguous. `ld` is at least k rounded up to whole vectors.
template <DType T>
inline void widen_rows(const typename Storage<T>::type* p, int64_t row_stride, int64_t k_stride, int64_t rows,
                       int64_t k, float* out, int64_t ld) {
  if (k_stride == 1) {
    for (int64_t r = 0; r < rows; r++) widen_row<T>(p + r * row_stride, k, out + r * ld);
  } else {
    for (int64_t i = 0; i < k; i += kLanes) {
      const int lanes = static_cast<int>(k - i < kLanes ? k - i : kLanes);
      pack_lanes<T>(p + i * k_stride, k_stride, row_stride, lanes, rows, out + i, ld);
    }
  }
}

}  // namespace
}  // namespace detinfer
