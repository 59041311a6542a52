// One product cut into tasks: weight panels (and row blocks where panels are few) spread over threads; each task packs
// its panels in blocks of k, small enough for the caches, and runs the tiles over them.
#pragma once

#include "matmul_dot.h"
#include "matmul_store.h"
#include "matmul_tile.h"

namespace detinfer {
namespace {

constexpr int64_t kPackedK = 384;         // k in a packed block, at most
constexpr int64_t kGroup = 4;             // panels that share one pass over the rows
constexpr int64_t kPackedRows = 1 << 22;  // floats of packed rows at a time, at most: 16 MiB
constexpr int64_t kTaskCycles = 12000;    // a thread is not woken for less

// Rows cut into panels of at most kTileRows, as equal as possible.
struct RowCut {
  int64_t panels, base, longer;
  explicit RowCut(int64_t rows)
      : panels(quotient_up(rows, kTileRows)), base(rows / panels), longer(rows % panels) {}
  int64_t start(int64_t i) const { return i * base + least(i, longer); }
  int rows(int64_t i) const { return static_cast<int>(base + (i < longer)); }
};

template <DType T> struct Job {
  const Problem<T>& p;
  int64_t row0 = 0;         // first row of the chunk
  RowCut cut;               // the chunk's rows
  float* packed = nullptr;  // [k][rows] for each row panel; pairs if `dot`
  int64_t splits = 1;       // row blocks that are tasks of their own
  bool dot = false;
  int field_a = 512;  // least exponent field of the packed rows
  int failed = 0;

  Job(const Problem<T>& problem, int64_t rows) : p(problem), cut(rows) {}

  int64_t depth() const { return dot ? quotient_up(p.k, 2) : p.k; }
  // Packing writes up to kLanes floats past a panel's end: hence the gap.
  float* panel_of_rows(int64_t i) const { return packed + cut.start(i) * depth() + i * kLanes; }
  static int64_t packed_size(int64_t rows, int64_t depth) {
    return rows * depth + (quotient_up(rows, kTileRows) + 1) * kLanes;
  }
  int64_t panels() const { return quotient_up(p.n, kPanel); }
  void fail_memory() { __atomic_store_n(&failed, 1, __ATOMIC_RELAXED); }
};

inline void keep_least(int* least_field, int field) {
  int seen = __atomic_load_n(least_field, __ATOMIC_RELAXED);
  while (field < seen &&
         !__atomic_compare_exchange_n(least_field, &seen, field, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

template <DType T> void pack_rows(int64_t begin, int64_t end, void* context) {
  Job<T>& job = *static_cast<Job<T>*>(context);
  const Problem<T>& p = job.p;
  for (int64_t i = begin; i < end; i++) {
    const int rows = job.cut.rows(i);
    const auto* a = p.a + (job.row0 + job.cut.start(i)) * p.a_m;
#ifdef DETINFER_LEVEL_avx512_bf16
    if constexpr (T == kBFloat16) {
      if (job.dot) {
        Exponents exponents;
        pack_pairs(a, p.a_m, p.a_k, rows, p.k, kPadA, job.panel_of_rows(i), rows, exponents);
        keep_least(&job.field_a, exponents.field());
        continue;
      }
    }
#endif
    pack_lanes<T>(a, p.a_m, p.a_k, rows, p.k, job.panel_of_rows(i), rows, 0);
  }
}

// Scratch of a task. A pass cuts k into blocks of `block`.
struct Pass {
  float* weights;  // [kGroup][block][kPanel]
  float* sums;     // [kGroup][rows of the task][kPanel]
  float* wide;     // an fp32 copy of one weight block and of one row block: where pairs cannot be used
  int64_t block;
};

template <DType T>
void pack_weights(const Problem<T>& p, int64_t panel, int64_t k0, int64_t k, float* out) {
  for (int half = 0; half < 2; half++) {
    const int64_t column = panel * kPanel + half * kLanes;
    const int64_t lanes = least(p.n - column, kLanes);
    if (lanes <= 0) {
      for (int64_t i = 0; i < k; i++) store(out + i * kPanel + kLanes, F{});
      return;
    }
    pack_lanes<T>(p.b + column * p.b_n + k0 * p.b_k, p.b_n, p.b_k, static_cast<int>(lanes), k, out + half * kLanes,
                  kPanel, kPanel * p.b_n);
  }
}

// Panels [panel, panel + count) times row panels [row_begin, row_end).
template <DType T>
void run_group(Job<T>& job, const Pass& pass, int64_t panel, int64_t count, int64_t row_begin, int64_t row_end) {
  const Problem<T>& p = job.p;
  const int64_t first_row = job.cut.start(row_begin);
  const int64_t rows_here = job.cut.start(row_end) - first_row;
  int64_t k0 = 0;
  do {
    const int64_t k = least(pass.block, p.k - k0);
    for (int64_t g = 0; g < count; g++)
      pack_weights<T>(p, panel + g, k0, k, pass.weights + g * pass.block * kPanel);
    for (int64_t i = row_begin; i < row_end; i++) {
      const int rows = job.cut.rows(i);
      for (int64_t g = 0; g < count; g++) {
        float* sums = pass.sums + (g * rows_here + job.cut.start(i) - first_row) * kPanel;
        run_tile(rows, k, job.panel_of_rows(i) + k0 * rows, pass.weights + g * pass.block * kPanel, sums, k0 > 0);
        if (k0 + k < p.k) continue;
        const int64_t column = (panel + g) * kPanel;
        store_tile<T>(p, sums, job.row0 + job.cut.start(i), rows, column,
                      static_cast<int>(least(p.n - column, kPanel)));
      }
    }
    k0 += k;
  } while (k0 < p.k);
}

#ifdef DETINFER_LEVEL_avx512_bf16
inline void pack_weight_pairs(const Problem<kBFloat16>& p, int64_t panel, int64_t k0, int64_t k, float* out,
                              Exponents& exponents) {
  for (int half = 0; half < 2; half++) {
    const int64_t column = panel * kPanel + half * kLanes;
    const int64_t lanes = least(p.n - column, kLanes);
    if (lanes <= 0) {
      for (int64_t i = 0; i < quotient_up(k, 2); i++) store(out + i * kPanel + kLanes, F{});
      return;
    }
    pack_pairs(p.b + column * p.b_n + k0 * p.b_k, p.b_n, p.b_k, static_cast<int>(lanes), k, kPadB,
               out + half * kLanes, kPanel, exponents);
  }
}

// run_group() on pairs. A panel whose exponents forbid vdpbf16ps goes on with FMAs from that block of k to the end: the
// sums so far are exact in both, the later ones need not be.
inline void run_dot_group(Job<kBFloat16>& job, const Pass& pass, int64_t panel, int64_t count, int64_t row_begin,
                          int64_t row_end) {
  const Problem<kBFloat16>& p = job.p;
  const int64_t first_row = job.cut.start(row_begin);
  const int64_t rows_here = job.cut.start(row_end) - first_row;
  Exponents exponents[kGroup];
  int64_t k0 = 0;
  do {
    const int64_t k = least(pass.block, p.k - k0);
    for (int64_t g = 0; g < count; g++)
      pack_weight_pairs(p, panel + g, k0, k, pass.weights + g * pass.block * kPanel, exponents[g]);
    for (int64_t g = 0; g < count; g++) {
      const float* weights = pass.weights + g * pass.block * kPanel;
      const bool exact = dot_is_exact(job.field_a, exponents[g].field());
      float* wide_rows = pass.wide + pass.block * kPanel;
      if (!exact) widen_pairs(weights, kPanel, k, pass.wide);
      for (int64_t i = row_begin; i < row_end; i++) {
        const int rows = job.cut.rows(i);
        const float* a = job.panel_of_rows(i) + k0 / 2 * rows;
        float* sums = pass.sums + (g * rows_here + job.cut.start(i) - first_row) * kPanel;
        if (exact) {
          run_dot_tile(rows, quotient_up(k, 2), a, weights, sums, k0 > 0);
        } else {
          widen_pairs(a, rows, k, wide_rows);
          run_tile(rows, k, wide_rows, pass.wide, sums, k0 > 0);
        }
        if (k0 + k < p.k) continue;
        const int64_t column = (panel + g) * kPanel;
        store_tile<kBFloat16>(p, sums, job.row0 + job.cut.start(i), rows, column,
                              static_cast<int>(least(p.n - column, kPanel)));
      }
    }
    k0 += k;
  } while (k0 < p.k);
}
#endif

// Tasks [begin, end) of splits x panels.
template <DType T> void run_tasks(int64_t begin, int64_t end, void* context) {
  Job<T>& job = *static_cast<Job<T>*>(context);
  const int64_t blocks = most(1, quotient_up(job.p.k, kPackedK));
  Pass pass;
  pass.block = quotient_up(quotient_up(job.p.k, blocks), kBlock<T>) * kBlock<T>;
  const int64_t rows_most = quotient_up(job.cut.panels, job.splits) * kTileRows;
  const int64_t weights_size = kGroup * pass.block * kPanel;
  const int64_t sums_size = kGroup * rows_most * kPanel;
  const int64_t wide_size = job.dot ? pass.block * (kPanel + kTileRows) : 0;
  static thread_local Scratch scratch;
  pass.weights = scratch.get(weights_size + sums_size + wide_size);
  if (pass.weights == nullptr) return job.fail_memory();
  pass.sums = pass.weights + weights_size;
  pass.wide = pass.sums + sums_size;
  const int64_t panels = job.panels();
  while (begin < end) {
    const int64_t split = begin / panels, panel = begin % panels;
    const int64_t left = least(end - begin, panels - panel);
    const int64_t count = quotient_up(left, quotient_up(left, kGroup));
    const int64_t row_begin = job.cut.panels * split / job.splits;
    const int64_t row_end = job.cut.panels * (split + 1) / job.splits;
#ifdef DETINFER_LEVEL_avx512_bf16
    if constexpr (T == kBFloat16) {
      if (job.dot) {
        run_dot_group(job, pass, panel, count, row_begin, row_end);
        begin += count;
        continue;
      }
    }
#endif
    run_group<T>(job, pass, panel, count, row_begin, row_end);
    begin += count;
  }
}

template <DType T> int blocks(const Problem<T>& p, bool dot) {
  static thread_local Scratch scratch;
  const int64_t depth = dot ? quotient_up(p.k, 2) : p.k;
  const int64_t chunk = most(kTileRows, least(p.m, kPackedRows / most(1, depth)));
  for (int64_t row0 = 0; row0 < p.m; row0 += chunk) {
    const int64_t rows = least(chunk, p.m - row0);
    Job<T> job(p, rows);
    job.row0 = row0;
    job.dot = dot;
    job.packed = scratch.get(Job<T>::packed_size(rows, depth));
    if (job.packed == nullptr) return fail(kOutOfMemory, "matmul: no memory for packed rows");
    parallel_for(0, job.cut.panels, most(1, 4 * kTaskCycles / (p.k * kTileRows + 1)), pack_rows<T>, &job);
    const int64_t workers = threads();
    if (job.panels() < 4 * workers) job.splits = least(job.cut.panels, quotient_up(4 * workers, job.panels()));
    const int64_t cycles = p.k * (rows / job.splits + 16) + 1;
    parallel_for(0, job.panels() * job.splits, most(1, kTaskCycles / cycles), run_tasks<T>, &job);
    if (job.failed) return fail(kOutOfMemory, "matmul: no memory for packed weights");
  }
  return kOk;
}

}  // namespace
}  // namespace detinfer
