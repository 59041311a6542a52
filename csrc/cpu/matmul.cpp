// out[m, n] = alpha * chain over k of fma(a[m, k], b[k, n], acc) + beta * c[m, n]: see ../matmul.h.
//
// Everything that is chosen below (few rows or blocks, operands swapped, FMA or vdpbf16ps, panels, threads) is a
// schedule: no choice changes the chain of any output.
#include "matmul_few.h"
#include "kernels.h"

namespace detinfer {
namespace DETINFER_LEVEL {
namespace {

#ifdef DETINFER_LEVEL_avx512_bf16
// DETINFER_CPU_DPBF16=0 or 1 holds the choice; otherwise both instructions are timed once.
bool use_dot(int32_t path) {
  if (path != kPathAuto) return path == kPathDot;
  static int choice = -1;
  int known = __atomic_load_n(&choice, __ATOMIC_RELAXED);
  if (known < 0) {
    const char* held = std::getenv("DETINFER_CPU_DPBF16");
    known = held != nullptr && (held[0] == '0' || held[0] == '1') ? held[0] == '1' : dot_is_faster();
    __atomic_store_n(&choice, known, __ATOMIC_RELAXED);
  }
  return known == 1;
}
#else
bool use_dot(int32_t) { return false; }
#endif

template <DType T> int product(const Problem<T>& p, int32_t path) {
  const bool dot = T == kBFloat16 && use_dot(path);
  // Where vdpbf16ps is the faster instruction, packing pays from fewer rows on; kPathDot is for tests of that path.
  const int64_t few_most = !dot ? kFewRows : path == kPathDot ? 0 : kFewRows / 2;
  if (p.m <= few_most && p.n >= kPanel && p.k > 0 && (p.b_k == 1 || p.b_n == 1)) return few_product<T>(p);
  return blocks<T>(p, dot);
}

template <DType T> struct Batch {
  const MatmulArgs& args;
  int status;

  Problem<T> problem(int64_t index) const {
    using E = typename Storage<T>::type;
    const MatmulPlan& plan = *args.plan;
    int64_t a = 0, b = 0, c = 0, out = 0;
    for (int d = plan.batch_dims - 1; d >= 0; d--) {
      const int64_t i = index % plan.batch[d];
      index /= plan.batch[d];
      a += i * plan.a_batch[d];
      b += i * plan.b_batch[d];
      c += i * plan.c_batch[d];
      out += i * plan.out_batch[d];
    }
    const E* addend = args.c == nullptr ? nullptr : static_cast<const E*>(args.c) + c;
    Problem<T> p{plan.m, plan.n, plan.k, static_cast<const E*>(args.a) + a, plan.a_m, plan.a_k,
                 static_cast<const E*>(args.b) + b, plan.b_k, plan.b_n, addend, plan.c_m, plan.c_n,
                 static_cast<E*>(args.out) + out, plan.out_m, plan.out_n, plan.alpha, plan.beta};
    if (p.n >= kLanes || p.n >= p.m) return p;
    // Lanes are columns; a narrow product is computed as its transpose (a * b = b * a in every FMA).
    return {p.n, p.m, p.k, p.b, p.b_n, p.b_k, p.a, p.a_k, p.a_m, p.c, p.c_n, p.c_m, p.out, p.out_n, p.out_m, p.alpha,
            p.beta};
  }
};

template <DType T> void run_batch(int64_t begin, int64_t end, void* context) {
  Batch<T>& batch = *static_cast<Batch<T>*>(context);
  for (int64_t i = begin; i < end; i++) {
    const int status = product<T>(batch.problem(i), batch.args.plan->path);
    if (status != kOk) __atomic_store_n(&batch.status, status, __ATOMIC_RELAXED);
  }
}

template <DType T> int run(const MatmulArgs& args) {
  const MatmulPlan& plan = *args.plan;
  int64_t count = 1;
  for (int d = 0; d < plan.batch_dims; d++) count *= plan.batch[d];
  if (count == 0 || plan.m == 0 || plan.n == 0) return kOk;
  Batch<T> batch{args, kOk};
  if (count < 2 * threads()) {
    run_batch<T>(0, count, &batch);  // each product is spread over the threads
  } else {
    const int64_t cycles = plan.k * (plan.n / kPanel + 1) * (plan.m + 16) + 1;
    parallel_for(0, count, most(1, kWorkerCycles / cycles), run_batch<T>, &batch);
  }
  // A worker's sentence stays in its own thread.
  return batch.status == kOk ? kOk : fail(static_cast<Status>(batch.status), "matmul: no memory for packed operands");
}

}  // namespace

int matmul(const MatmulArgs& args) {
  if (args.plan == nullptr) return fail(kBadArgument, "matmul: no plan was given");
  const MatmulPlan& plan = *args.plan;
  if (plan.batch_dims < 0 || plan.batch_dims > kMatmulBatchDims)
    return fail(kBadArgument, "matmul: too many batch dimensions");
  if (plan.m < 0 || plan.n < 0 || plan.k < 0) return fail(kBadArgument, "matmul: a size is negative");
  switch (plan.dtype) {
    case kBFloat16: return run<kBFloat16>(args);
#ifdef DETINFER_LEVEL_avx512_bf16
    default: return avx512::matmul(args);  // the other dtypes gain nothing from this level
#else
    case kFloat32: return run<kFloat32>(args);
    case kFloat16: return run<kFloat16>(args);
    default: return fail(kBadArgument, "matmul: the dtype is not fp32, bf16 or fp16");
#endif
  }
}

}  // namespace DETINFER_LEVEL
}  // namespace detinfer
