// Elementwise functions. An element's result depends on its value alone: a tail runs through the same vectors as the
// body, and the table of a 16-bit dtype holds what the vectors compute.
#include <cstdlib>

#include "kernels.h"
#include "math64.h"

namespace detinfer {
namespace DETINFER_LEVEL {
namespace {

constexpr int64_t kGrain = 16384;
constexpr int64_t kTableWorth = 16384;  // elements in one call from which a table of 65536 pays

template <D (*f)(D)> inline F in_double(F x) {
  const Pair wide = widen(x);
  return narrow(f(wide.low), f(wide.high));
}

template <int op> inline F unary(F x) {
  if constexpr (op == kSilu) return silu(x);
  else if constexpr (op == kSigmoid) return sigmoid(x);
  else if constexpr (op == kExp) return exp(x);
  else if constexpr (op == kRsqrt) return rsqrt(x);
  else if constexpr (op == kSqrt) return square_root(x);
  else if constexpr (op == kSin) return sine_or_cosine(x, 0);
  else if constexpr (op == kCos) return sine_or_cosine(x, 1);
  else if constexpr (op == kGelu) return gelu(x);
  else if constexpr (op == kGeluTanh) return in_double<gelu_tanh>(x);
  else if constexpr (op == kTanh) return in_double<tanh>(x);
  else if constexpr (op == kExp2) return in_double<exp2>(x);
  else if constexpr (op == kExpm1) return in_double<expm1>(x);
  else if constexpr (op == kLog) return in_double<log>(x);
  else if constexpr (op == kLog2) return in_double<log2>(x);
  else if constexpr (op == kLog10) return in_double<log10>(x);
  else if constexpr (op == kLog1p) return in_double<log1p>(x);
  else if constexpr (op == kErf) return in_double<erf>(x);
  else return in_double<erfc>(x);
}

// f(vector at i, of that many elements) for every vector of [begin, end).
template <class Step> inline void each_vector(int64_t begin, int64_t end, const Step& step) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) step(i, kLanes);
  if (i < end) step(i, static_cast<int>(end - i));
}

template <DType T, int op> void unary_range(int64_t begin, int64_t end, const void* from, void* to) {
  using S = typename Storage<T>::type;
  const S* x = static_cast<const S*>(from);
  S* out = static_cast<S*>(to);
  each_vector(begin, end, [=](int64_t i, int count) {
    if (count == kLanes) store_as<T>(out + i, unary<op>(load_as<T>(x + i)));
    else store_some<T>(out + i, unary<op>(load_some<T>(x + i, count, 0.0f)), count);
  });
}

using Range = void (*)(int64_t begin, int64_t end, const void* from, void* to);
struct UnaryTask {
  Range range;
  const void* x;
  void* out;
};
void unary_body(int64_t begin, int64_t end, void* context) {
  const UnaryTask& task = *static_cast<const UnaryTask*>(context);
  task.range(begin, end, task.x, task.out);
}

#define DETINFER_RANGES(T)                                                                                          \
  {unary_range<T, 0>,  unary_range<T, 1>,  unary_range<T, 2>,  unary_range<T, 3>,  unary_range<T, 4>,               \
   unary_range<T, 5>,  unary_range<T, 6>,  unary_range<T, 7>,  unary_range<T, 8>,  unary_range<T, 9>,               \
   unary_range<T, 10>, unary_range<T, 11>, unary_range<T, 12>, unary_range<T, 13>, unary_range<T, 14>,              \
   unary_range<T, 15>, unary_range<T, 16>, unary_range<T, 17>}
const Range kRanges[3][kUnaryOps] = {DETINFER_RANGES(kFloat32), DETINFER_RANGES(kBFloat16), DETINFER_RANGES(kFloat16)};
#undef DETINFER_RANGES

// Results for all 65536 values of a 16-bit dtype, made on first need and kept for the life of the process.
uint16_t* tables[3][kUnaryOps];

bool uses_table(const ElementwiseArgs& args) {
  const bool quick = args.op == kSilu || args.op == kSigmoid || args.op == kExp || args.op == kSqrt;
  return args.dtype != kFloat32 && !quick && args.count >= kTableWorth;
}

const uint16_t* table_of(const ElementwiseArgs& args) {
  uint16_t** place = &tables[args.dtype][args.op];
  uint16_t* table = __atomic_load_n(place, __ATOMIC_ACQUIRE);
  if (table != nullptr) return table;
  uint16_t* made = static_cast<uint16_t*>(std::malloc(65536 * sizeof(uint16_t)));
  if (made == nullptr) return nullptr;
  uint16_t values[256];
  for (int high = 0; high < 65536; high += 256) {
    for (int i = 0; i < 256; i++) values[i] = static_cast<uint16_t>(high + i);
    kRanges[args.dtype][args.op](0, 256, values, made + high);
  }
  uint16_t* expected = nullptr;
  if (__atomic_compare_exchange_n(place, &expected, made, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) return made;
  std::free(made);
  return expected;
}

struct LookUp {
  const uint16_t* table;
  const uint16_t* x;
  uint16_t* out;
};
void look_up(int64_t begin, int64_t end, void* context) {
  const LookUp task = *static_cast<const LookUp*>(context);
  for (int64_t i = begin; i < end; i++) task.out[i] = task.table[task.x[i]];
}

// Softplus and the functions of two operands, either of which may be the scalar a.
template <DType T, int op> void binary_body(int64_t begin, int64_t end, void* context) {
  using S = typename Storage<T>::type;
  const ElementwiseArgs& args = *static_cast<const ElementwiseArgs*>(context);
  const S* x = static_cast<const S*>(args.x);
  const S* y = static_cast<const S*>(args.y);
  S* out = static_cast<S*>(args.out);
  float a = static_cast<float>(args.a);
  const float b = static_cast<float>(args.b);
  if (op == kPow && T == kBFloat16) a = bfloat16_to_float(float_to_bfloat16(a));
  if (op == kPow && T == kFloat16) a = float16_to_float(float_to_float16(a));
  // The exponents that models use: pow's own answers, without the rest of pow.
  const bool square = y == nullptr && a == 2.0f, cubed = y == nullptr && a == 3.0f;
  each_vector(begin, end, [=](int64_t i, int count) {
    const auto take = [=](const S* p, float otherwise) {
      if (p == nullptr) return broadcast(otherwise);
      return count == kLanes ? load_as<T>(p + i) : load_some<T>(p + i, count, 1.0f);
    };
    F result;
    if constexpr (op == kSoftplus) {
      const Pair u = widen(take(x, 0.0f));
      result = narrow(softplus(u.low, a, b), softplus(u.high, a, b));
    } else if constexpr (op == kPow) {
      const F base = take(x, a), exponent = take(y, a);
      const Pair u = widen(base), v = widen(exponent);
      if (square) result = base * base;
      else if (cubed) result = narrow(cube(u.low), cube(u.high));
      else result = narrow(pow(u.low, v.low), pow(u.high, v.high));
    } else if constexpr (op == kMaximum) {
      result = greater(take(x, 0.0f), take(y, 0.0f));
    } else if constexpr (op == kMinimum) {
      result = lesser(take(x, 0.0f), take(y, 0.0f));
    } else {
      result = take(x, 0.0f) + a * take(y, b);
    }
    if (count == kLanes) store_as<T>(out + i, result);
    else store_some<T>(out + i, result, count);
  });
}

template <DType T> Body binary(int32_t op) {
  return op == kSoftplus    ? binary_body<T, kSoftplus>
         : op == kPow       ? binary_body<T, kPow>
         : op == kAddScaled ? binary_body<T, kAddScaled>
         : op == kMaximum   ? binary_body<T, kMaximum>
         : op == kMinimum   ? binary_body<T, kMinimum> : nullptr;
}

}  // namespace

int elementwise(const ElementwiseArgs& args) {
  if (args.dtype < 0 || args.dtype > 2) return fail(kBadArgument, "elementwise: no such dtype");
  const Body body = args.dtype == kFloat32    ? binary<kFloat32>(args.op)
                    : args.dtype == kBFloat16 ? binary<kBFloat16>(args.op) : binary<kFloat16>(args.op);
  if (body != nullptr) {
    parallel_for(0, args.count, kGrain, body, const_cast<ElementwiseArgs*>(&args));
  } else if (args.op < 0 || args.op >= kUnaryOps) {
    return fail(kBadArgument, "elementwise: no such operation");
  } else if (uses_table(args)) {
    LookUp task{table_of(args), static_cast<const uint16_t*>(args.x), static_cast<uint16_t*>(args.out)};
    if (task.table == nullptr) return fail(kOutOfMemory, "elementwise: no memory for a table of 128 KiB");
    parallel_for(0, args.count, kGrain, look_up, &task);
  } else {
    UnaryTask task{kRanges[args.dtype][args.op], args.x, args.out};
    parallel_for(0, args.count, kGrain, unary_body, &task);
  }
  return kOk;
}

}  // namespace DETINFER_LEVEL
}  // namespace detinfer
