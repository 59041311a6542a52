// One product cut into tasks: weight panels (and row blocks where panels are few) spread over threads; each task packs
// its panels in blocks of k, small enough for the caches, and runs the tiles over them.
#pragma once

#include "matmul_dot.h"
#include "matmul_store.h"
#include "matmul_tile.h"

namespace detinfer {
namespace {

constexpr int64_t kPackedK = 256;         // k in a packed block, at most: a weight block is 32 KiB
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
  float* packed = nullptr;  // [k][kLanes] for each row panel; pairs if `dot`
  int64_t splits = 1;       // row blocks that are tasks of their own
  bool dot = false;
  int field_a = 512;  // least exponent field of the packed rows
  int failed = 0;

  Job(const Problem<T>& problem, int64_t rows) : p(problem), cut(rows) {}

  int64_t depth() const { return dot ? quotient_up(p.k, 2) : p.k; }
  float* panel_of_rows(int64_t i) const { return packed + i * depth() * kLanes; }
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
        pack_pairs(a, p.a_m, p.a_k, rows, p.k, kPadA, job.panel_of_rows(i), kLanes, exponents);
        keep_least(&job.field_a, exponents.field());
        continue;
      }
    }
#endif
    pack_lanes<T>(a, p.a_m, p.a_k, rows, p.k, job.panel_of_rows(i), kLanes);
  }
}

// Scratch of a task. A pass cuts k into blocks of `block`.
struct Pass {
  float* weights;  // [block][kPanel]
  float* sums;     // [rows of the task][kPanel]
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
                  kPanel);
  }
}

// One weight panel times row panels [row_begin, row_end).
template <DType T>
void run_panel(Job<T>& job, const Pass& pass, int64_t panel, int64_t row_begin, int64_t row_end) {
  const Problem<T>& p = job.p;
  const int64_t first_row = job.cut.start(row_begin);
  const auto* weights = p.b + panel * kPanel * p.b_n;
  const int columns = static_cast<int>(least(p.n - panel * kPanel, kPanel));
  int64_t k0 = 0;
  do {
    const int64_t k = least(pass.block, p.k - k0);
    pack_weights<T>(p, panel, k0, k, pass.weights);
    // The first tile asks for the weights of the next block of k, or of the next panel.
    const auto* next = k0 + k < p.k ? weights + (k0 + k) * p.b_k : weights + kPanel * p.b_n;
    const int64_t size = sizeof(*next);
    const Ahead ahead{reinterpret_cast<const char*>(next), p.b_n * size, k * size};
    for (int64_t i = row_begin; i < row_end; i++) {
      float* sums = pass.sums + (job.cut.start(i) - first_row) * kPanel;
      run_tile(job.cut.rows(i), k, job.panel_of_rows(i) + k0 * kLanes, pass.weights, sums, k0 > 0,
               i == row_begin && p.b_k == 1 ? &ahead : nullptr);
      if (k0 + k == p.k)
        store_tile<T>(p, sums, job.row0 + job.cut.start(i), job.cut.rows(i), panel * kPanel, columns);
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

// run_panel() on pairs. A panel whose exponents forbid vdpbf16ps goes on with FMAs from that block of k to the end: the
// sums so far are exact in both, the later ones need not be.
inline void run_dot_panel(Job<kBFloat16>& job, const Pass& pass, int64_t panel, int64_t row_begin, int64_t row_end) {
  const Problem<kBFloat16>& p = job.p;
  const int64_t first_row = job.cut.start(row_begin);
  const int columns = static_cast<int>(least(p.n - panel * kPanel, kPanel));
  float* const wide_rows = pass.wide + pass.block * kPanel;
  Exponents exponents;
  int64_t k0 = 0;
  do {
    const int64_t k = least(pass.block, p.k - k0);
    pack_weight_pairs(p, panel, k0, k, pass.weights, exponents);
    const bool exact = dot_is_exact(job.field_a, exponents.field());
    if (!exact) widen_pairs(pass.weights, kPanel, k, pass.wide);
    for (int64_t i = row_begin; i < row_end; i++) {
      const int rows = job.cut.rows(i);
      const float* a = job.panel_of_rows(i) + k0 / 2 * kLanes;
      float* sums = pass.sums + (job.cut.start(i) - first_row) * kPanel;
      if (exact) {
        run_dot_tile(rows, quotient_up(k, 2), a, pass.weights, sums, k0 > 0);
      } else {
        widen_pairs(a, kLanes, k, wide_rows);
        run_tile(rows, k, wide_rows, pass.wide, sums, k0 > 0);
      }
      if (k0 + k == p.k) store_tile<kBFloat16>(p, sums, job.row0 + job.cut.start(i), rows, panel * kPanel, columns);
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
  const int64_t weights_size = pass.block * kPanel;
  const int64_t sums_size = rows_most * kPanel;
  const int64_t wide_size = job.dot ? pass.block * (kPanel + kLanes) : 0;
  static thread_local Scratch scratch;
  pass.weights = scratch.get(weights_size + sums_size + wide_size);
  if (pass.weights == nullptr) return job.fail_memory();
  pass.sums = pass.weights + weights_size;
  pass.wide = pass.sums + sums_size;
  for (int64_t task = begin; task < end; task++) {
    const int64_t split = task / job.panels(), panel = task % job.panels();
    const int64_t row_begin = job.cut.panels * split / job.splits;
    const int64_t row_end = job.cut.panels * (split + 1) / job.splits;
#ifdef DETINFER_LEVEL_avx512_bf16
    if constexpr (T == kBFloat16) {
      if (job.dot) {
        run_dot_panel(job, pass, panel, row_begin, row_end);
        continue;
      }
    }
#endif
    run_panel<T>(job, pass, panel, row_begin, row_end);
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
    job.packed = scratch.get(job.cut.panels * depth * kLanes);
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
