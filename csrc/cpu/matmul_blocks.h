// One product cut into tasks: weight panels (and row blocks where panels are few) spread over threads; each task packs
// its panels in blocks of k, small enough for the caches, and runs the tiles over them.
#pragma once

#include "matmul_dot.h"
#include "matmul_share.h"
#include "matmul_store.h"
#include "matmul_tile.h"

namespace detinfer {
namespace {

// k in a packed block of weights, at most. With many rows it is best to go back to the sums seldom; with few it is best
// to keep the block in the first cache, where it was just written.
constexpr int64_t kDeepBlock = 1024, kShallowBlock = 256, kManyPanels = 16;
constexpr int64_t kChunkRows = 1 << 22;  // floats of rows at a time, at most: 16 MiB
constexpr int64_t kPage = 4096 / sizeof(float);

// Rows cut into panels of at most kTileRows, as equal as possible.
struct RowCut {
  int64_t panels, base, longer;
  explicit RowCut(int64_t rows)
      : panels(quotient_up(rows, kTileRows)), base(rows / panels), longer(rows % panels) {}
  int64_t start(int64_t i) const { return i * base + least(i, longer); }
  int64_t count() const { return start(panels); }
  int rows(int64_t i) const { return static_cast<int>(base + (i < longer)); }
};

template <DType T> struct Job {
  const Problem<T>& p;
  int64_t row0;             // first row of the chunk
  RowCut cut;               // the chunk's rows
  const float* rows;        // [row][k], `ld` apart: the operand itself or an fp32 copy
  int64_t ld;
  float* packed = nullptr;  // the copy; if `dot` [k / 2][kLanes] pairs for each row panel
  int64_t splits;           // row blocks that are tasks of their own
  bool dot;
  int field_a = 512;  // least exponent field of the packed rows
  int failed = 0;
  int workers;
  Barrier packing;
  Share tasks;

  Job(const Problem<T>& problem, int64_t first_row, int64_t count, bool pairs, int threads)
      : p(problem),
        row0(first_row),
        cut(count),
        splits(threads > 1 && panels() < 4 * threads ? least(cut.panels, quotient_up(4 * threads, panels())) : 1),
        dot(pairs),
        workers(workers_for(panels() * splits, panels() * p.k * (count + 16), threads)),
        packing(in_place(problem) ? 0 : cut.panels),
        tasks(panels() * splits, workers) {}

  // The tiles broadcast one element of each row at a time, so fp32 rows are read where they lie. Rows whole pages apart
  // would share one set of the first cache, and are copied.
  static bool in_place(const Problem<T>& p) { return T == kFloat32 && p.a_k == 1 && p.a_m % kPage != 0; }

  // Gives the rows their place; false if there is no memory for a copy.
  bool place(Scratch& scratch) {
    if (in_place(p)) {
      rows = reinterpret_cast<const float*>(p.a) + row0 * p.a_m;
      ld = p.a_m;
      return true;
    }
    ld = (quotient_up(p.k, kLanes) | 1) * kLanes;  // odd, so that rows spread over the cache's sets
    rows = packed = scratch.get(dot ? cut.panels * quotient_up(p.k, 2) * kLanes : cut.count() * ld);
    return packed != nullptr;
  }

  const float* row_panel(int64_t i) const { return rows + cut.start(i) * ld; }
  float* pair_panel(int64_t i) const { return packed + i * quotient_up(p.k, 2) * kLanes; }
  int64_t panels() const { return quotient_up(p.n, kPanel); }
  void fail_memory() { __atomic_store_n(&failed, 1, __ATOMIC_RELAXED); }
};

inline void keep_least(int* least_field, int field) {
  int seen = __atomic_load_n(least_field, __ATOMIC_RELAXED);
  while (field < seen &&
         !__atomic_compare_exchange_n(least_field, &seen, field, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

template <DType T> void pack_rows(Job<T>& job, int64_t i) {
  const Problem<T>& p = job.p;
  const int rows = job.cut.rows(i);
  const auto* a = p.a + (job.row0 + job.cut.start(i)) * p.a_m;
#ifdef DETINFER_LEVEL_avx512_bf16
  if constexpr (T == kBFloat16) {
    if (job.dot) {
      Exponents exponents;
      pack_pairs(a, p.a_m, p.a_k, rows, p.k, kPadA, job.pair_panel(i), kLanes, exponents);
      keep_least(&job.field_a, exponents.field());
      return;
    }
  }
#endif
  widen_rows<T>(a, p.a_m, p.a_k, rows, p.k, job.packed + job.cut.start(i) * job.ld, job.ld);
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

// The lines that the next tile will be stored to.
template <DType T> inline void ask_for_output(const Problem<T>& p, int64_t row, int rows, int64_t column) {
  const auto* out = p.out + row * p.out_m + column;
  for (int r = 0; r < rows; r++, out += p.out_m) {
    __builtin_prefetch(out, 1);
    if (sizeof(*out) * kPanel > 64) __builtin_prefetch(out + kPanel / 2, 1);
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
      if (k0 + k == p.k && p.out_n == 1)
        ask_for_output(p, job.row0 + job.cut.start(i), job.cut.rows(i), panel * kPanel);
      run_tile(job.cut.rows(i), k, job.row_panel(i) + k0, job.ld, pass.weights, sums, k0 > 0,
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
      const float* a = job.pair_panel(i) + k0 / 2 * kLanes;
      float* sums = pass.sums + (job.cut.start(i) - first_row) * kPanel;
      if (exact) {
        run_dot_tile(rows, quotient_up(k, 2), a, pass.weights, sums, k0 > 0);
      } else {
        const auto* row = p.a + (job.row0 + job.cut.start(i)) * p.a_m + k0 * p.a_k;
        widen_rows<kBFloat16>(row, p.a_m, p.a_k, rows, k, wide_rows, pass.block);
        run_tile(rows, k, wide_rows, pass.block, pass.wide, sums, k0 > 0);
      }
      if (k0 + k == p.k) store_tile<kBFloat16>(p, sums, job.row0 + job.cut.start(i), rows, panel * kPanel, columns);
    }
    k0 += k;
  } while (k0 < p.k);
}
#endif

template <DType T> void run_tasks(Job<T>& job, int worker) {
  for (int64_t i = job.packing.take(); i >= 0; i = job.packing.take()) {
    pack_rows(job, i);
    job.packing.done();
  }
  const bool many = quotient_up(job.cut.panels, job.splits) >= kManyPanels;
  const int64_t blocks = most(1, quotient_up(job.p.k, many ? kDeepBlock : kShallowBlock));
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
  job.packing.wait();
  for (int64_t task = job.tasks.take(worker); task >= 0; task = job.tasks.take(worker)) {
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

template <DType T> void run_workers(int64_t begin, int64_t end, void* context) {
  Job<T>& job = *static_cast<Job<T>*>(context);
  for (int64_t worker = begin; worker < end; worker++) run_tasks(job, static_cast<int>(worker));
}

template <DType T> int chunks(const Problem<T>& p, bool dot, int threads) {
  static thread_local Scratch scratch;
  const int64_t chunk = most(kTileRows, least(p.m, kChunkRows / most(1, p.k)));
  for (int64_t row0 = 0; row0 < p.m; row0 += chunk) {
    Job<T> job(p, row0, least(chunk, p.m - row0), dot, threads);
    if (!job.place(scratch)) return fail(kOutOfMemory, "matmul: no memory for packed rows");
    parallel_for(0, job.workers, 1, run_workers<T>, &job);
    if (job.failed) return fail(kOutOfMemory, "matmul: no memory for packed weights");
  }
  return kOk;
}

template <DType T> struct RowShares {
  const Problem<T>& p;
  bool dot;
  int64_t count;
  int status;
};

template <DType T> void run_shares(int64_t begin, int64_t end, void* context) {
  RowShares<T>& shares = *static_cast<RowShares<T>*>(context);
  for (int64_t i = begin; i < end; i++) {
    Problem<T> p = shares.p;
    const int64_t start = p.m * i / shares.count;
    p.m = p.m * (i + 1) / shares.count - start;
    p.a += start * p.a_m;
    p.out += start * p.out_m;
    if (p.c != nullptr) p.c += start * p.c_m;
    const int status = chunks<T>(p, shares.dot, 1);
    if (status != kOk) __atomic_store_n(&shares.status, status, __ATOMIC_RELAXED);
  }
}

// A copy of the rows that one core has written and another reads costs 9% at 512 rows; from kOwnRows rows for each
// thread on it is cheaper that each copies its own rows and packs all the weights.
constexpr int64_t kOwnRows = 128;

template <DType T> int blocks(const Problem<T>& p, bool dot) {
  const int workers = threads();
  if (workers == 1 || Job<T>::in_place(p) || p.m < kOwnRows * workers) return chunks<T>(p, dot, workers);
  RowShares<T> shares{p, dot, workers, kOk};
  parallel_for(0, workers, 1, run_shares<T>, &shares);
  return shares.status;
}

}  // namespace
}  // namespace detinfer
