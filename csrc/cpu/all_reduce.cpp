// The reduction over ranks, element by element in the orders of order.h. An element's bits depend on the ranks' elements
// alone: a vector's lanes and the lanes of the last, shorter vector go through the same functions.
#include "../all_reduce.h"

#include "kernels.h"
#include "math.h"

namespace detinfer {
namespace DETINFER_LEVEL {
namespace {

template <DType T> using Element = typename Storage<T>::type;

template <bool kTree, int kRanks, class V, class Term> inline V sum_of(const Term& term) {
  if constexpr (kTree) return rank_tree<kRanks, V>(term);
  else return rank_order<kRanks, V>(term);
}

template <class V, class Term> inline V extreme(int ranks, bool greatest, const Term& term) {
  V found = term(0);
  for (int r = 1; r < ranks; r++) found = greatest ? greater(found, term(r)) : lesser(found, term(r));
  return found;
}

// Each vector of `count` elements: result(term) of term(r), rank r's vector.
template <DType T, class Result> inline void each_vector(const AllReduceArgs& args, const Result& result) {
  Element<T>* out = static_cast<Element<T>*>(args.out);
  const Element<T>* parts[kMostRanks];
  for (int r = 0; r < args.ranks; r++) parts[r] = static_cast<const Element<T>*>(args.parts[r]);
  int64_t i = 0;
  for (; i + kLanes <= args.count; i += kLanes)
    store_as<T>(out + i, result([&](int r) { return load_as<T>(parts[r] + i); }));
  if (const int rest = static_cast<int>(args.count - i); rest > 0)
    store_some<T>(out + i, result([&](int r) { return load_some<T>(parts[r] + i, rest, 0.0f); }), rest);
}

template <DType T, bool kTree, int kRanks> void sum(const AllReduceArgs& args) {
  const F ranks = broadcast(static_cast<float>(kRanks));
  if (args.op == static_cast<int32_t>(ReduceOp::kAvg))
    each_vector<T>(args, [=](const auto& term) { return div_rn(sum_of<kTree, kRanks, F>(term), ranks); });
  else
    each_vector<T>(args, [](const auto& term) { return sum_of<kTree, kRanks, F>(term); });
}

// float64 and integers, one element at a time for the compiler to vectorise. A sum runs in Sum: unsigned for integers,
// which wraps.
inline double stored(double v) {
  double nan;
  const uint64_t bits = 0x7fffffffffffffff;
  std::memcpy(&nan, &bits, sizeof nan);
  return v != v ? nan : v;
}
template <class T> inline T stored(T v) { return v; }

template <class T, class Sum, bool kTree, int kRanks> void plain_sum(const AllReduceArgs& args) {
  T* out = static_cast<T*>(args.out);
  const bool average = args.op == static_cast<int32_t>(ReduceOp::kAvg);
  for (int64_t i = 0; i < args.count; i++) {
    const Sum total = sum_of<kTree, kRanks, Sum>([&](int r) { return static_cast<Sum>(static_cast<const T*>(args.parts[r])[i]); });
    out[i] = stored(static_cast<T>(average ? total / static_cast<Sum>(kRanks) : total));
  }
}

template <class T> void plain_extreme(const AllReduceArgs& args) {
  T* out = static_cast<T*>(args.out);
  const bool greatest = args.op == static_cast<int32_t>(ReduceOp::kMax);
  for (int64_t i = 0; i < args.count; i++) {
    T found = static_cast<const T*>(args.parts[0])[i];
    for (int r = 1; r < args.ranks; r++) {
      const T next = static_cast<const T*>(args.parts[r])[i];
      found = greatest ? greater_of(found, next) : lesser_of(found, next);
    }
    out[i] = stored(found);
  }
}

template <DType T> void extremes(const AllReduceArgs& args) {
  const bool greatest = args.op == static_cast<int32_t>(ReduceOp::kMax);
  const int ranks = args.ranks;
  each_vector<T>(args, [=](const auto& term) { return extreme<F>(ranks, greatest, term); });
}

template <DType T, bool kTree> struct Sums {
  template <int kRanks> static void run(const AllReduceArgs& args) { sum<T, kTree, kRanks>(args); }
};
template <class T, class Sum, bool kTree> struct PlainSums {
  template <int kRanks> static void run(const AllReduceArgs& args) { plain_sum<T, Sum, kTree, kRanks>(args); }
};

template <class Family> void for_ranks(const AllReduceArgs& args) {
  switch (args.ranks) {
    case 2: return Family::template run<2>(args);
    case 3: return Family::template run<3>(args);
    case 4: return Family::template run<4>(args);
    case 5: return Family::template run<5>(args);
    case 6: return Family::template run<6>(args);
    case 7: return Family::template run<7>(args);
    default: return Family::template run<8>(args);
  }
}

template <DType T> void reduce(const AllReduceArgs& args) {
  if (args.op >= static_cast<int32_t>(ReduceOp::kMax)) extremes<T>(args);
  else if (args.order == static_cast<int32_t>(RankOrder::kTree)) for_ranks<Sums<T, true>>(args);
  else for_ranks<Sums<T, false>>(args);
}

template <class T, class Sum> void reduce_plain(const AllReduceArgs& args) {
  if (args.op >= static_cast<int32_t>(ReduceOp::kMax)) plain_extreme<T>(args);
  else if (args.order == static_cast<int32_t>(RankOrder::kTree)) for_ranks<PlainSums<T, Sum, true>>(args);
  else for_ranks<PlainSums<T, Sum, false>>(args);
}

}  // namespace

int all_reduce(const AllReduceArgs& args) {
  if (args.ranks < 2 || args.ranks > kMostRanks) return fail(kBadArgument, "all_reduce: between 2 and 8 ranks");
  if (args.op == static_cast<int32_t>(ReduceOp::kAvg) && args.dtype >= kInt8)
    return fail(kBadArgument, "all_reduce: AVG of integers has no rounding of its own");
  switch (args.dtype) {
    case kFloat32: reduce<kFloat32>(args); break;
    case kBFloat16: reduce<kBFloat16>(args); break;
    case kFloat16: reduce<kFloat16>(args); break;
    case kFloat64: reduce_plain<double, double>(args); break;
    case kInt8: reduce_plain<int8_t, uint8_t>(args); break;
    case kUInt8: reduce_plain<uint8_t, uint8_t>(args); break;
    case kInt16: reduce_plain<int16_t, uint16_t>(args); break;
    case kInt32: reduce_plain<int32_t, uint32_t>(args); break;
    case kInt64: reduce_plain<int64_t, uint64_t>(args); break;
    default: return fail(kBadArgument, "all_reduce: no order for this dtype");
  }
  return kOk;
}

}  // namespace DETINFER_LEVEL
}  // namespace detinfer
