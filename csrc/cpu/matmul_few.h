// Few rows: weights go from memory through registers into the FMAs, never to scratch.
#pragma once

#include "matmul_blocks.h"

namespace detinfer {
namespace {

template <DType T> struct FewJob {
  const Problem<T>& p;
  const float* rows;  // [k][m]
  int width;          // panels of a task
  Share tasks;
};

// Columns [column, column + 32 * tiles) of R rows.
template <DType T, int R> void few_columns(const FewJob<T>& job, int64_t column, int tiles) {
  const Problem<T>& p = job.p;
  float sums[4 * R * kPanel];
  const auto* b = p.b + column * p.b_n;
  if (p.b_k == 1) {
    constexpr int P = R > 1 && R <= 4 ? 2 : 1;
    for (int lane = 0; lane < tiles * kPanel; lane += P * kLanes)
      few<T, R, P>(p.k, job.rows, b + lane * p.b_n, p.b_n, P * kLanes * p.b_n,
                   sums + lane / kPanel * R * kPanel + lane % kPanel);
  } else {
    if (R == 1 && tiles == 4) direct<T, R, R == 1 ? 8 : 2>(p.k, job.rows, b, p.b_k, sums);
    else
      for (int i = 0; i < tiles; i++) direct<T, R, 2>(p.k, job.rows, b + i * kPanel, p.b_k, sums + i * R * kPanel);
  }
  for (int i = 0; i < tiles; i++) store_tile<T>(p, sums + i * R * kPanel, 0, R, column + i * kPanel, kPanel);
}

template <DType T, int R = kFewRows> void few_rows(const FewJob<T>& job, int64_t column, int tiles) {
  if constexpr (R > 1) {
    if (job.p.m != R) return few_rows<T, R - 1>(job, column, tiles);
  }
  few_columns<T, R>(job, column, tiles);
}

template <DType T> void run_few(int64_t begin, int64_t end, void* context) {
  FewJob<T>& job = *static_cast<FewJob<T>*>(context);
  const int64_t panels = job.p.n / kPanel;
  for (int64_t worker = begin; worker < end; worker++) {
    for (int64_t i = job.tasks.take(worker); i >= 0; i = job.tasks.take(worker)) {
      const int64_t stop = least(panels, (i + 1) * job.width);
      for (int64_t panel = i * job.width; panel < stop;) {
        const int tiles = stop - panel == job.width ? job.width : 1;
        few_rows<T>(job, panel * kPanel, tiles);
        panel += tiles;
      }
    }
  }
}

// Whole panels of p.n through run_few(); the columns that are left through blocks().
template <DType T> int few_product(const Problem<T>& p) {
  const int64_t panels = p.n / kPanel;
  static thread_local Scratch scratch;
  if (panels > 0) {
    const int width = p.b_k != 1 && p.m == 1 ? 4 : 1;
    const int64_t tasks = quotient_up(panels, width);
    const int workers = workers_for(tasks, 16 * p.k * panels, threads());
    FewJob<T> job{p, nullptr, width, Share(tasks, workers)};
    if (T == kFloat32 && p.m == 1 && p.a_k == 1) {
      job.rows = reinterpret_cast<const float*>(p.a);
    } else {
      float* rows = scratch.get(p.m * p.k + kLanes);  // packing writes whole vectors
      if (rows == nullptr) return fail(kOutOfMemory, "matmul: no memory for packed rows");
      pack_lanes<T>(p.a, p.a_m, p.a_k, static_cast<int>(p.m), p.k, rows, p.m);
      job.rows = rows;
    }
    parallel_for(0, workers, 1, run_few<T>, &job);
  }
  if (p.n % kPanel == 0) return kOk;
  Problem<T> rest = p;
  rest.n = p.n % kPanel;
  rest.b += panels * kPanel * p.b_n;
  rest.out += panels * kPanel * p.out_n;
  if (p.c != nullptr) rest.c += panels * kPanel * p.c_n;
  return blocks<T>(rest, false);
}

}  // namespace
}  // namespace detinfer
