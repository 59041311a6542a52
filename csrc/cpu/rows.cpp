// Sums, means, softmax and norms along rows. A row is done by one thread in the order of order.h, so nothing but the
// row's own elements reaches its bits.
#include <cstdlib>

#include "../order.h"
#include "kernels.h"
#include "math64.h"

namespace detinfer {
namespace DETINFER_LEVEL {
namespace {

template <DType T> using Element = typename Storage<T>::type;

template <DType T> inline F take(const Element<T>* p, int count, float fill) {
  return count == kLanes ? load_as<T>(p) : load_some<T>(p, count, fill);
}
template <DType T> inline void put(Element<T>* p, F v, int count) {
  if (count == kLanes) store_as<T>(p, v);
  else store_some<T>(p, v, count);
}
template <DType T> inline F rounded(F v) {
  Element<T> lanes[kLanes];
  store_as<T>(lanes, v);
  return load_as<T>(lanes);
}

void put_one(void* to, int32_t dtype, int64_t i, float value) {
  if (dtype == kFloat32) static_cast<float*>(to)[i] = canonical(value);
  else if (dtype == kBFloat16) static_cast<uint16_t*>(to)[i] = float_to_bfloat16(value);
  else static_cast<uint16_t*>(to)[i] = float_to_float16(value);
}

template <class Step> inline void each_vector(int64_t n, const Step& step) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) step(i, kLanes);
  if (i < n) step(i, static_cast<int>(n - i));
}

// row_sum of term(i, count), a vector whose lanes past `count` are -0 (or, where no sum can be -0, +0).
template <class Term> inline float sum_of(int64_t n, const Term& term) {
  return halve(row_sum<F, kLanes>(n, broadcast(-0.0f), [&](F sum, int64_t i, int count) { return sum + term(i, count); }));
}
template <class Term> inline float sum_of_squares(int64_t n, const Term& term) {
  return halve(row_sum<F, kLanes>(n, broadcast(-0.0f), [&](F sum, int64_t i, int count) {
    const F e = term(i, count);
    return fma(e, e, sum);
  }));
}

// The order-free reductions, lane by lane in any order.
template <class Term> inline float extreme(int32_t op, int64_t n, const Term& term) {
  F lanes = term(0, n < kLanes ? static_cast<int>(n) : kLanes);
  each_vector(n, [&](int64_t i, int count) { lanes = op == kMax ? greater(lanes, term(i, count)) : lesser(lanes, term(i, count)); });
  float both[2 * kLanes];
  for (int half = kLanes / 2; half >= 1; half /= 2) {
    store(both, lanes);
    store(both + kLanes, lanes);
    lanes = op == kMax ? greater(lanes, load(both + half)) : lesser(lanes, load(both + half));
  }
  return lanes[0];
}

template <DType T> void reduce_row(const RowsArgs& args, int64_t row) {
  const Element<T>* x = static_cast<const Element<T>*>(args.x) + row * args.n;
  float result;
  if (args.op == kMax || args.op == kMin) {
    const float least = args.op == kMax ? -__builtin_inff() : __builtin_inff();
    result = extreme(args.op, args.n, [=](int64_t i, int count) { return take<T>(x + i, count, least); });
  } else {
    // The sum of no terms is +0, as in torch.
    result = args.n == 0 ? 0.0f : sum_of(args.n, [=](int64_t i, int count) { return take<T>(x + i, count, -0.0f); });
    if (args.op == kMean) result = result / static_cast<float>(args.n);
  }
  put_one(args.out, args.out_dtype, row, result);
}

// `count` neighbouring columns at once: a vector holds one term of each, and row_sum runs on lanes of such vectors.
template <DType T, DType O> void reduce_columns(const RowsArgs& args, int64_t outer, int64_t column, int count) {
  const Element<T>* x = static_cast<const Element<T>*>(args.x) + outer * args.n * args.inner + column;
  Element<O>* out = static_cast<Element<O>*>(args.out) + outer * args.inner + column;
  F result;
  if (args.op == kMax || args.op == kMin) {
    result = take<T>(x, count, 0.0f);
    for (int64_t i = 1; i < args.n; i++) {
      const F v = take<T>(x + i * args.inner, count, 0.0f);
      result = args.op == kMax ? greater(result, v) : lesser(result, v);
    }
  } else {
    result = args.n == 0 ? F{} : row_sum<F, 1>(args.n, broadcast(-0.0f), [=](F sum, int64_t i, int) {
      return sum + take<T>(x + i * args.inner, count, 0.0f);
    });
    if (args.op == kMean) result = result / static_cast<float>(args.n);
  }
  put<O>(out, result, count);
}

template <DType T> float greatest(const Element<T>* x, int64_t n) {
  const float lowest = -__builtin_inff();
  F lanes = broadcast(lowest);
  // NaN is passed over here: the exponentials carry it into the sum and from there into every result of the row.
  each_vector(n, [&](int64_t i, int count) {
    const F v = take<T>(x + i, count, lowest);
    lanes = v > lanes ? v : lanes;
  });
  float most = lowest;
  for (int i = 0; i < kLanes; i++) most = lanes[i] > most ? lanes[i] : most;
  return most;
}

// The exponentials are kept in `scratch`, or in the row of `out` itself where that is fp32.
template <DType T, DType O> void softmax_row(const RowsArgs& args, int64_t row, float* scratch) {
  const int64_t n = args.n;
  const Element<T>* x = static_cast<const Element<T>*>(args.x) + row * args.n;
  Element<O>* out = static_cast<Element<O>*>(args.out) + row * n;
  float* kept = scratch;
  if constexpr (O == kFloat32) kept = out;
  const F most = broadcast(greatest<T>(x, n));
  const F sum = broadcast(sum_of(n, [=](int64_t i, int count) {
    const F e = exp(take<T>(x + i, count, -__builtin_inff()) - most);
    put<kFloat32>(kept + i, e, count);
    return e;
  }));
  each_vector(n, [=](int64_t i, int count) { put<O>(out + i, take<kFloat32>(kept + i, count, 0.0f) / sum, count); });
}

template <DType T, DType O> void log_softmax_row(const RowsArgs& args, int64_t row) {
  const int64_t n = args.n;
  const Element<T>* x = static_cast<const Element<T>*>(args.x) + row * args.n;
  Element<O>* out = static_cast<Element<O>*>(args.out) + row * n;
  const F most = broadcast(greatest<T>(x, n));
  const F sum = broadcast(
      sum_of(n, [=](int64_t i, int count) { return exp(take<T>(x + i, count, -__builtin_inff()) - most); }));
  const Pair wide = widen(sum);
  const F log_sum = narrow(log(wide.low), log(wide.high));
  each_vector(n, [=](int64_t i, int count) { put<O>(out + i, (take<T>(x + i, count, 0.0f) - most) - log_sum, count); });
}

// h(i, count) is what is normalised; its lanes past `count` are 0.
template <DType T, class Input>
void rms_norm_row(const RowsArgs& args, int64_t row, const float* weight, const Input& h) {
  const int64_t n = args.n;
  Element<T>* out = static_cast<Element<T>*>(args.out) + row * n;
  const float scalar = inverse_root(sum_of_squares(n, h), n, static_cast<float>(args.eps));
  if (args.rstd != nullptr) put_one(args.rstd, args.stat_dtype, row, scalar);
  const F r = broadcast(scalar), one = broadcast(1.0f);
  const auto round = [](F v) { return rounded<T>(v); };
  const auto apply = [=](auto finish) {
    each_vector(n, [=](int64_t i, int count) {
      const F w = weight == nullptr ? broadcast(1.0f) : take<kFloat32>(weight + i, count, 0.0f);
      put<T>(out + i, finish(h(i, count), w), count);
    });
  };
  if (weight == nullptr) apply([=](F v, F) { return mul_rn(v, r); });
  else if (args.weight_mode == kLlama) apply([=](F v, F w) { return norm_output<kLlama>(v, r, w, one, round); });
  else if (args.weight_mode == kGemma) apply([=](F v, F w) { return norm_output<kGemma>(v, r, w, one, round); });
  else apply([=](F v, F w) { return norm_output<kFp32Weight>(v, r, w, one, round); });
}

template <DType T> void rms_norm(const RowsArgs& args, int64_t row, const float* weight) {
  const int64_t n = args.n;
  const Element<T>* x = static_cast<const Element<T>*>(args.x) + row * args.n;
  const auto plain = [=](int64_t i, int count) { return take<T>(x + i, count, 0.0f); };
  if (args.residual == nullptr) return rms_norm_row<T>(args, row, weight, plain);
  const Element<T>* residual = static_cast<const Element<T>*>(args.residual) + row * n;
  Element<T>* sum_out = static_cast<Element<T>*>(args.residual_out) + row * n;
  const auto sum = [=](int64_t i, int count) { return add_rn(plain(i, count), take<T>(residual + i, count, 0.0f)); };
  each_vector(n, [=](int64_t i, int count) { put<T>(sum_out + i, sum(i, count), count); });
  if (args.residual_mode == kUnrounded) rms_norm_row<T>(args, row, weight, sum);
  else rms_norm_row<T>(args, row, weight, [=](int64_t i, int count) { return take<T>(sum_out + i, count, 0.0f); });
}

template <DType T> void layer_norm(const RowsArgs& args, int64_t row, const float* weight, const float* bias) {
  const int64_t n = args.n;
  const Element<T>* x = static_cast<const Element<T>*>(args.x) + row * args.n;
  Element<T>* out = static_cast<Element<T>*>(args.out) + row * n;
  const float mean = sum_of(n, [=](int64_t i, int count) { return take<T>(x + i, count, -0.0f); }) / static_cast<float>(n);
  // Lanes past the end are the mean itself: their deviation is 0.
  const auto deviation = [=](int64_t i, int count) { return take<T>(x + i, count, mean) - broadcast(mean); };
  const float scalar = inverse_root(sum_of_squares(n, deviation), n, static_cast<float>(args.eps));
  if (args.mean != nullptr) put_one(args.mean, args.stat_dtype, row, mean);
  if (args.rstd != nullptr) put_one(args.rstd, args.stat_dtype, row, scalar);
  each_vector(n, [=](int64_t i, int count) {
    F v = deviation(i, count) * broadcast(scalar);
    if (weight != nullptr) v = v * take<kFloat32>(weight + i, count, 0.0f);
    if (bias != nullptr) v = v + take<kFloat32>(bias + i, count, 0.0f);
    put<T>(out + i, v, count);
  });
}

struct Task {
  const RowsArgs* args;
  const float* weight;
  const float* bias;
  bool out_of_memory;
};

template <DType T, DType O> void body(int64_t begin, int64_t end, void* context) {
  Task& task = *static_cast<Task*>(context);
  const RowsArgs& args = *task.args;
  float* scratch = nullptr;
  if (args.op == kSoftmax && O != kFloat32) {
    scratch = static_cast<float*>(std::malloc(sizeof(float) * static_cast<size_t>(args.n)));
    if (scratch == nullptr) {
      __atomic_store_n(&task.out_of_memory, true, __ATOMIC_RELAXED);
      return;
    }
  }
  if (args.inner > 1) {  // a task is one vector of columns
    const int64_t across = (args.inner + kLanes - 1) / kLanes;
    for (int64_t i = begin; i < end; i++) {
      const int64_t column = i % across * kLanes, left = args.inner - column;
      reduce_columns<T, O>(args, i / across, column, left < kLanes ? static_cast<int>(left) : kLanes);
    }
    return;
  }
  for (int64_t row = begin; row < end; row++) {
    if (args.op == kSoftmax) softmax_row<T, O>(args, row, scratch);
    else if (args.op == kLogSoftmax) log_softmax_row<T, O>(args, row);
    else if (args.op == kRmsNorm) rms_norm<T>(args, row, task.weight);
    else if (args.op == kLayerNorm) layer_norm<T>(args, row, task.weight, task.bias);
    else reduce_row<T>(args, row);
  }
  std::free(scratch);
}

// `values` in fp32: itself, or a copy that the caller frees.
template <DType T> float* converted(const void* values, int64_t n) {
  float* out = static_cast<float*>(std::malloc(sizeof(float) * static_cast<size_t>(n) + 1));
  if (out == nullptr) return nullptr;
  const Element<T>* from = static_cast<const Element<T>*>(values);
  each_vector(n, [=](int64_t i, int count) { put<kFloat32>(out + i, take<T>(from + i, count, 0.0f), count); });
  return out;
}
bool as_float(const void* values, int32_t dtype, int64_t n, const float** out, float** owned) {
  *out = static_cast<const float*>(values);
  *owned = nullptr;
  if (values == nullptr || dtype == kFloat32) return true;
  *owned = dtype == kBFloat16 ? converted<kBFloat16>(values, n) : converted<kFloat16>(values, n);
  *out = *owned;
  return *owned != nullptr;
}

Body body_for(int32_t dtype, int32_t out_dtype) {
  if (dtype == kFloat32) return out_dtype == kFloat32 ? body<kFloat32, kFloat32> : nullptr;
  if (dtype == kBFloat16)
    return out_dtype == kBFloat16 ? body<kBFloat16, kBFloat16>
           : out_dtype == kFloat32 ? body<kBFloat16, kFloat32> : nullptr;
  if (dtype == kFloat16)
    return out_dtype == kFloat16 ? body<kFloat16, kFloat16>
           : out_dtype == kFloat32 ? body<kFloat16, kFloat32> : nullptr;
  return nullptr;
}

}  // namespace

int rows(const RowsArgs& args) {
  const Body run = body_for(args.dtype, args.out_dtype);
  if (run == nullptr) return fail(kBadArgument, "rows: the output's dtype is neither the input's nor fp32");
  if (args.op < kSum || args.op > kLayerNorm) return fail(kBadArgument, "rows: no such operation");
  if (args.n == 0 && (args.op == kMax || args.op == kMin)) return fail(kBadArgument, "rows: no elements to choose from");
  if (args.inner > 1 && args.op > kMin) return fail(kBadArgument, "rows: this operation runs along contiguous rows");
  Task task{&args, nullptr, nullptr, false};
  float *weight = nullptr, *bias = nullptr;
  const bool ready = as_float(args.weight, args.weight_dtype, args.n, &task.weight, &weight) &&
                     as_float(args.bias, args.weight_dtype, args.n, &task.bias, &bias);
  if (ready) {
    const bool columns = args.inner > 1;
    const int64_t tasks = columns ? args.rows / args.inner * ((args.inner + kLanes - 1) / kLanes) : args.rows;
    const int64_t grain = 16384 / (columns ? args.n * kLanes + 1 : args.n + 1) + 1;
    parallel_for(0, tasks, grain, run, &task);
  }
  std::free(weight);
  std::free(bias);
  if (!ready || task.out_of_memory) return fail(kOutOfMemory, "rows: no memory for a row of fp32");
  return kOk;
}

}  // namespace DETINFER_LEVEL
}  // namespace detinfer
