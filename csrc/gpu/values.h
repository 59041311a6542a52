// Elements as 32-bit words: one fp32 or two 16-bit values. What the ranks' words give, and loads and stores of packs
// that may be unaligned or run past the end.
#pragma once

#include "../all_reduce.h"

namespace detinfer {
namespace gpu {

struct Float32 {
  static constexpr int kBytes = 4, kPerWord = 1;
  static __device__ __forceinline__ float get(uint32_t word, int) { return __uint_as_float(word); }
  static __device__ __forceinline__ uint32_t put(const float (&v)[1]) { return to_float32(v[0]); }
};
struct BFloat16 {
  static constexpr int kBytes = 2, kPerWord = 2;
  static __device__ __forceinline__ float get(uint32_t word, int i) {
    return __uint_as_float(i == 0 ? word << 16 : word & 0xffff0000u);
  }
  static __device__ __forceinline__ uint32_t put(const float (&v)[2]) { return to_bfloat16(v[0], v[1]); }
};
struct Float16 {
  static constexpr int kBytes = 2, kPerWord = 2;
  static __device__ __forceinline__ float get(uint32_t word, int i) {
    return from_float16(static_cast<uint16_t>(i == 0 ? word : word >> 16));
  }
  static __device__ __forceinline__ uint32_t put(const float (&v)[2]) { return to_float16(v[0], v[1]); }
};
// Bytes that nobody computes with.
struct Bytes {
  static constexpr int kBytes = 1, kPerWord = 4;
};

// Rounded to the storage type and widened again.
template <class T> static __device__ __forceinline__ float rounded(float value) {
  if constexpr (T::kPerWord == 1) return value;
  else {
    const float pair[2] = {value, value};
    return T::get(T::put(pair), 0);
  }
}

// One reduction for every path: SUM and AVG in the order of the contract, MAX and MIN. The same for all threads.
struct Reduce {
  int32_t op;     // ReduceOp
  int32_t order;  // RankOrder
};

template <int N, class Term> static __device__ __forceinline__ float reduce(Reduce how, const Term& term) {
  if (how.op == static_cast<int32_t>(ReduceOp::kSum) && how.order == static_cast<int32_t>(RankOrder::kLinear))
    return rank_order<N, float>(term);
  if (how.op <= static_cast<int32_t>(ReduceOp::kAvg)) {
    const float sum = how.order == static_cast<int32_t>(RankOrder::kLinear) ? rank_order<N, float>(term)
                                                                            : rank_tree<N, float>(term);
    return how.op == static_cast<int32_t>(ReduceOp::kSum) ? sum : div_rn(sum, static_cast<float>(N));
  }
  float found = term(0);
#pragma unroll
  for (int r = 1; r < N; r++)
    found = how.op == static_cast<int32_t>(ReduceOp::kMax) ? greater_of(found, term(r)) : lesser_of(found, term(r));
  return found;
}

// K words that lie side by side.
template <int K> struct alignas(4 * K) Pack {
  uint32_t word[K];
};

// `valid` bytes (a multiple of the element's) from `at`; the rest of the pack is 0. Aligned: to the whole pack.
template <class T, int K>
static __device__ __forceinline__ Pack<K> load_pack(const char* at, int64_t valid, bool aligned) {
  if (aligned && valid >= 4 * K) return *reinterpret_cast<const Pack<K>*>(at);
  Pack<K> pack;
#pragma unroll
  for (int i = 0; i < K; i++) {
    uint32_t word = 0;
#pragma unroll
    for (int j = 0; j < 4; j += T::kBytes) {
      if (4 * i + j >= valid) continue;
      const char* element = at + 4 * i + j;
      if constexpr (T::kBytes == 4) word = *reinterpret_cast<const uint32_t*>(element);
      else if constexpr (T::kBytes == 2) word |= static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(element)) << 8 * j;
      else word |= static_cast<uint32_t>(*reinterpret_cast<const uint8_t*>(element)) << 8 * j;
    }
    pack.word[i] = word;
  }
  return pack;
}

template <class T, int K>
static __device__ __forceinline__ void store_pack(char* at, const Pack<K>& pack, int64_t valid, bool aligned) {
  if (aligned && valid >= 4 * K) {
    *reinterpret_cast<Pack<K>*>(at) = pack;
    return;
  }
#pragma unroll
  for (int i = 0; i < K; i++) {
#pragma unroll
    for (int j = 0; j < 4; j += T::kBytes) {
      if (4 * i + j >= valid) continue;
      char* element = at + 4 * i + j;
      if constexpr (T::kBytes == 4) *reinterpret_cast<uint32_t*>(element) = pack.word[i];
      else if constexpr (T::kBytes == 2) *reinterpret_cast<uint16_t*>(element) = static_cast<uint16_t>(pack.word[i] >> 8 * j);
      else *reinterpret_cast<uint8_t*>(element) = static_cast<uint8_t>(pack.word[i] >> 8 * j);
    }
  }
}

template <int K> static __device__ __forceinline__ Pack<K> poison() {
  Pack<K> pack;
#pragma unroll
  for (int i = 0; i < K; i++) pack.word[i] = 0xffffffffu;
  return pack;
}

// The pack whose elements are result(term), term(r) being rank r's element.
template <class T, int K, class Rank, class Result>
static __device__ __forceinline__ Pack<K> each_element(const Rank& pack_of, const Result& result) {
  Pack<K> out;
#pragma unroll
  for (int w = 0; w < K; w++) {
    float value[T::kPerWord];
#pragma unroll
    for (int i = 0; i < T::kPerWord; i++) value[i] = result([&](int r) { return T::get(pack_of(r).word[w], i); });
    out.word[w] = T::put(value);
  }
  return out;
}

// SUM in rank_order of one pack of every rank.
template <class T, int N, int K, class Rank> static __device__ __forceinline__ Pack<K> sum_pack(const Rank& pack_of) {
  return each_element<T, K>(pack_of, [](const auto& term) { return rank_order<N, float>(term); });
}

// The reduction of one pack of every rank. One decision for the whole pack: the sum has no branch inside.
template <class T, int N, int K, class Rank>
static __device__ __forceinline__ Pack<K> reduce_pack(Reduce how, const Rank& pack_of) {
  if (how.op == static_cast<int32_t>(ReduceOp::kSum) && how.order == static_cast<int32_t>(RankOrder::kLinear))
    return sum_pack<T, N, K>(pack_of);
  return each_element<T, K>(pack_of, [&](const auto& term) { return reduce<N>(how, term); });
}

// Where byte `at` of rank r's part lies in an all_gather's output.
template <int N> static __device__ __forceinline__ int64_t gathered(int64_t at, int r, int64_t inner, int64_t bytes) {
  if (inner == bytes) return r * bytes + at;
  const int64_t outer = at / inner;
  return (outer * N + r) * inner + (at - outer * inner);
}

// A pack into the output; in pieces of one byte where a pack may cross from one stretch of `inner` bytes to the next.
template <int N, int K>
static __device__ __forceinline__ void store_gathered(char* out, const Pack<K>& pack, int64_t at, int r, int64_t inner,
                                                      int64_t bytes, bool aligned) {
  if (aligned || inner == bytes) {
    store_pack<Bytes, K>(out + gathered<N>(at, r, inner, bytes), pack, bytes - at, aligned);
    return;
  }
  for (int j = 0; j < 4 * K && at + j < bytes; j++)
    out[gathered<N>(at + j, r, inner, bytes)] = static_cast<char>(pack.word[j / 4] >> 8 * (j % 4));
}

}  // namespace gpu
}  // namespace detinfer
