// Attention on CPU: the order is in ../attention.h, and this file chooses only the schedule.
//
// A task is some query rows that read one head of K and V. Keys are packed block by block, each block is used by all
// tiles of the task; the scores of every row are kept whole, so that the greatest is exact before the first exp.
#include "attention_softmax.h"
#include "attention_tile.h"
#include "kernels.h"

namespace detinfer {
namespace DETINFER_LEVEL {
namespace {

thread_local Scratch scratch;
thread_local Scratch range_scratch;

// Scores that a task keeps (512 KiB of fp32), and the least rows that are worth packing K and V for.
constexpr int64_t kScores = 1 << 17;
constexpr int64_t kLeastRows = 24;
// Multiplications below which waking another thread costs more than it saves.
constexpr int64_t kAlone = 1 << 19;

// Elements of a cache line.
template <DType T> constexpr int kLine = 64 / sizeof(typename Storage<T>::type);

struct Row {
  int64_t head, query;
  Range range;
  float sum;
};

// Rows that go through the micro kernels together. [low, high) holds all their keys; [both_low, both_high) those that
// every row of the tile sees, if no row has holes.
struct Tile {
  int first, rows;
  int64_t low, high, both_low, both_high;
};

// Keys that a query may see as far as its place goes.
inline int64_t keys_at(const AttentionPlan& plan, int64_t query) {
  return plan.causal ? least(query + 1, plan.keys) : plan.keys;
}

// Rounded up to whole cache lines.
inline int64_t whole(int64_t floats) { return quotient_up(floats, 16) * 16; }

struct Call {
  const AttentionPlan& plan;
  const AttentionArgs& args;
  const float* sinks;  // one for each query head, or null
  int64_t group;       // query heads that read one head of K and V
  int64_t group_rows;  // query rows that read it: queries * group, heads innermost
  int64_t task_rows;
  int64_t parts;  // tasks of one head of K and V
  int64_t tasks;
  int64_t value_width;  // columns of V, rounded up to whole vectors
  Range* ranges;        // of every query of every batch row, when all heads have one mask; else null
  int64_t next;
  int status;
};

template <DType T> struct Task {
  using E = typename Storage<T>::type;
  const Call& call;
  const AttentionPlan& plan;
  const int64_t batch, kv_head, first;
  const int rows;
  int64_t low = 0, high = 0;  // keys that any row of the task sees
  int tiles = 0;
  const int64_t score_row;
  Row* row = nullptr;
  Tile* tile = nullptr;
  float *q = nullptr, *panel = nullptr, *values = nullptr, *scores = nullptr, *out = nullptr;

  Task(const Call& c, int64_t kv, int64_t start)
      : call(c), plan(c.plan), batch(kv / c.plan.kv_heads), kv_head(kv % c.plan.kv_heads), first(start),
        rows(static_cast<int>(least(c.task_rows, c.group_rows - start))), score_row(whole(c.plan.keys) + kKeys) {}

  bool allocate() {
    const int64_t row_floats = whole(quotient_up(rows * static_cast<int64_t>(sizeof(Row)), 4));
    const int64_t tile_floats = whole(quotient_up(quotient_up(rows, kRows) * static_cast<int64_t>(sizeof(Tile)), 4));
    const int64_t sizes[] = {whole(rows * plan.depth), whole(plan.depth * kKeys + kKeys),
                             whole(kValueRows * call.value_width), rows * score_row, whole(rows * call.value_width)};
    float** const places[] = {&q, &panel, &values, &scores, &out};
    int64_t total = row_floats + tile_floats;
    for (int64_t size : sizes) total += size;
    float* memory = scratch.get(total);
    if (memory == nullptr) return false;
    row = reinterpret_cast<Row*>(memory), memory += row_floats;
    tile = reinterpret_cast<Tile*>(memory), memory += tile_floats;
    for (int i = 0; i < 5; i++) *places[i] = memory, memory += sizes[i];
    return true;
  }

  float* scores_of(int r, int64_t key) const { return scores + r * score_row + (key - low); }

  MaskRow mask_of(const Row& r) const { return mask_row(plan, call.args.mask, batch, r.head, r.query); }

  Range range_of_row(const Row& r) const {
    if (call.ranges != nullptr) return call.ranges[batch * plan.queries + r.query];
    return range_of(mask_of(r), keys_at(plan, r.query));
  }

  void find_ranges() {
    low = plan.keys, high = 0;
    int64_t query = first / call.group, head = first % call.group;
    tiles = 0;
    for (int start = 0; start < rows; start += kRows) {
      Tile t = {start, static_cast<int>(least(kRows, rows - start)), plan.keys, 0, 0, plan.keys};
      for (Row* r = row + start; r < row + start + t.rows; r++) {
        r->head = kv_head * call.group + head;
        r->query = query;
        r->range = range_of_row(*r);
        if (++head == call.group) head = 0, query++;
        if (r->range.empty()) continue;
        t.low = least(t.low, r->range.low), t.high = most(t.high, r->range.high);
        t.both_low = most(t.both_low, r->range.low);
        t.both_high = r->range.holes ? 0 : least(t.both_high, r->range.high);
      }
      if (t.low >= t.high) t.both_high = 0;
      low = least(low, t.low), high = most(high, t.high);
      tile[tiles++] = t;
    }
  }

  void widen_queries() {
    const E* base = static_cast<const E*>(call.args.q) + batch * plan.q.batch;
    for (int r = 0; r < rows; r++)
      widen_row<T>(base + row[r].head * plan.q.head + row[r].query * plan.q.row, plan.depth, q + r * plan.depth);
  }

  void score_keys() {
    const E* base = static_cast<const E*>(call.args.k) + batch * plan.k.batch + kv_head * plan.k.head;
    for (int64_t block = low; block < high; block += kKeys) {
      const int64_t end = least(block + kKeys, high);
      for (int64_t key = block; key < end; key += kLanes) {
        const int lanes = static_cast<int>(least(kLanes, end - key));
        const E* keys = base + key * plan.k.row;
        if (tiles == 1 && key + kLanes < high)
          for (int r = kLanes; r < 2 * kLanes; r++)
            for (int64_t d = 0; d < plan.depth; d += kLine<T>) __builtin_prefetch(keys + r * plan.k.row + d);
        pack_lanes<T>(keys, plan.k.row, 1, lanes, plan.depth, panel + (key - block), kKeys);
      }
      for (int i = 0; i < tiles; i++) {
        const Tile& t = tile[i];
        const int64_t from = most(t.low, block), to = least(t.high, end);
        if (from >= to) continue;
        const int64_t start = (from - block) / kLanes * kLanes;
        const int64_t vectors = quotient_up(to - block - start, kLanes);
        int rows_here = t.rows;
        if (vectors == 1 && i + 1 < tiles && most(tile[i + 1].low, block) >= block + start &&
            least(tile[i + 1].high, end) <= block + start + kLanes)
          rows_here += tile[++i].rows;
        chains<kFloat32, kScoreChains>(rows_here, vectors, plan.depth, q + t.first * plan.depth, plan.depth,
                                       panel + start, kKeys, scores_of(t.first, block + start), score_row, plan.scale);
      }
    }
  }

  void weigh_keys() {
    for (int r = 0; r < rows; r++) {
      if (row[r].range.empty()) continue;
      const float* sink = call.sinks == nullptr ? nullptr : call.sinks + row[r].head;
      row[r].sum = softmax(mask_of(row[r]), row[r].range, scores_of(r, row[r].range.low), sink);
    }
  }

  // One row's part of the keys in [from, to), of a block of V that starts at key `block`.
  template <DType S>
  void add_row(int r, int64_t from, int64_t to, int64_t block, const typename Storage<S>::type* v, int64_t v_row) {
    from = most(from, row[r].range.low), to = least(to, row[r].range.high);
    if (from >= to) return;
    const float* p = scores_of(r, from);
    const int64_t vectors = call.value_width / kLanes;
    float* o = out + r * call.value_width;
    v += (from - block) * v_row;
    if (row[r].range.holes) chain_with_holes<S>(vectors, to - from, p, v, v_row, o);
    else chains<S, kOutputChains>(1, vectors, to - from, p, 0, v, v_row, o, 0);
  }

  // The part of the keys [block, end) in every row's chain; v is the block's first row, in storage type S.
  template <DType S> void add_block(int64_t block, int64_t end, const typename Storage<S>::type* v, int64_t v_row) {
    for (int i = 0; i < tiles; i++) {
      const Tile& t = tile[i];
      const int last = t.first + t.rows;
      if (t.both_low >= t.both_high) {
        for (int r = t.first; r < last; r++) add_row<S>(r, block, end, block, v, v_row);
        continue;
      }
      if (t.low < t.both_low)
        for (int r = t.first; r < last; r++) add_row<S>(r, block, least(end, t.both_low), block, v, v_row);
      const int64_t from = most(t.both_low, block), to = least(t.both_high, end);
      if (from < to)
        chains<S, kOutputChains>(t.rows, call.value_width / kLanes, to - from, scores_of(t.first, from), score_row,
                                 v + (from - block) * v_row, v_row, out + t.first * call.value_width,
                                 call.value_width);
      if (t.both_high < t.high)
        for (int r = t.first; r < last; r++) add_row<S>(r, most(block, t.both_high), end, block, v, v_row);
    }
  }

  void add_values() {
    const E* base = static_cast<const E*>(call.args.v) + batch * plan.v.batch + kv_head * plan.v.head;
    std::memset(out, 0, sizeof(float) * rows * call.value_width);
    // One tile reads V where it lies; for several it is widened once.
    const bool whole_vectors = call.value_width == plan.value_depth;
    if (whole_vectors && (T == kFloat32 || tiles == 1)) {
      for (int64_t block = low; block < high; block += kValueRows)
        add_block<T>(block, least(block + kValueRows, high), base + block * plan.v.row, plan.v.row);
      return;
    }
    for (int64_t block = low; block < high; block += kValueRows) {
      const int64_t end = least(block + kValueRows, high);
      for (int64_t key = block; key < end; key++)
        widen_row<T>(base + key * plan.v.row, plan.value_depth, values + (key - block) * call.value_width);
      add_block<kFloat32>(block, end, values, call.value_width);
    }
  }

  void store_rows() {
    E* base = static_cast<E*>(call.args.out) + batch * plan.out.batch;
    for (int r = 0; r < rows; r++) {
      E* to = base + row[r].head * plan.out.head + row[r].query * plan.out.row;
      const bool empty = row[r].range.empty();
      const F sum = splat(row[r].sum);
      for (int64_t i = 0; i < plan.value_depth; i += kLanes) {
        const F o = empty ? F{} : load(out + r * call.value_width + i) / sum;
        const int64_t left = plan.value_depth - i;
        if (left >= kLanes) store_as<T>(to + i, o);
        else store_some<T>(to + i, o, static_cast<int>(left));
      }
    }
  }
};

template <DType T> int run_task(const Call& call, int64_t index) {
  // The last rows first: with a causal mask they have the most keys.
  Task<T> task(call, index / call.parts, (call.parts - 1 - index % call.parts) * call.task_rows);
  if (!task.allocate()) return kOutOfMemory;
  task.find_ranges();
  if (task.low < task.high) {
    task.widen_queries();
    task.score_keys();
    task.weigh_keys();
    task.add_values();
  }
  task.store_rows();
  return kOk;
}

// Threads take the next task when they are done with one: rows of a causal mask differ in work.
template <DType T> void work(int64_t, int64_t, void* context) {
  Call& call = *static_cast<Call*>(context);
  for (;;) {
    const int64_t index = __atomic_fetch_add(&call.next, 1, __ATOMIC_RELAXED);
    if (index >= call.tasks) return;
    const int status = run_task<T>(call, index);
    if (status != kOk) __atomic_store_n(&call.status, status, __ATOMIC_RELAXED);
  }
}

// A mask that all heads share is looked through once and not by every task.
void find_ranges_of(int64_t begin, int64_t end, void* context) {
  Call& call = *static_cast<Call*>(context);
  for (int64_t i = begin; i < end; i++) {
    const int64_t query = i % call.plan.queries;
    const MaskRow mask = mask_row(call.plan, call.args.mask, i / call.plan.queries, 0, query);
    call.ranges[i] = range_of(mask, keys_at(call.plan, query));
  }
}

template <DType T> int run(const AttentionArgs& args, const float* sinks) {
  const AttentionPlan& plan = *args.plan;
  const int64_t pairs = plan.batch * plan.kv_heads;
  if (pairs == 0 || plan.queries == 0 || plan.value_depth == 0) return kOk;
  const int64_t group = plan.heads / plan.kv_heads;
  const int64_t rows = group * plan.queries;
  const int64_t cost = pairs * rows * plan.keys * (plan.depth + plan.value_depth);
  const int workers = cost < kAlone ? 1 : threads();
  int64_t task_rows = least(rows, most(kRows, kScores / (plan.keys + kKeys)));
  if (workers > 1 && pairs * quotient_up(rows, task_rows) < 8 * workers)
    task_rows = least(task_rows, most(kLeastRows, quotient_up(rows * pairs, 8 * workers)));
  task_rows = least(rows, quotient_up(task_rows, kRows) * kRows);
  const int64_t parts = quotient_up(rows, task_rows);
  Call call = {plan, args, sinks, group, rows, task_rows, parts, pairs * parts,
                  quotient_up(plan.value_depth, kLanes) * kLanes, nullptr, 0, kOk};
  const int64_t masks = plan.batch * plan.queries;
  if (plan.mask_kind != kMaskNone && plan.mask.head == 0 && pairs > 1) {
    call.ranges = reinterpret_cast<Range*>(range_scratch.get(quotient_up(masks * sizeof(Range), sizeof(float))));
    if (call.ranges == nullptr) return fail(kOutOfMemory, "attention: no memory for the mask's ranges");
    parallel_for(0, masks, kAlone / (plan.keys + 1) + 1, find_ranges_of, &call);
  }
  if (workers == 1) work<T>(0, 1, &call);
  else parallel_for(0, workers, 1, work<T>, &call);
  return call.status == kOk ? kOk : fail(kOutOfMemory, "attention: no memory for the scores of a few query rows");
}

}  // namespace

int attention(const AttentionSinksArgs& with_sinks) {
  const AttentionArgs& args = with_sinks.call;
  const AttentionPlan* plan = args.plan;
  if (plan == nullptr) return fail(kBadArgument, "attention: no plan was given");
  if (plan->kv_heads < 1 ? plan->heads != 0 : plan->heads % plan->kv_heads != 0)
    return fail(kBadArgument, "attention: the number of query heads is no multiple of the number of key heads");
  switch (plan->dtype) {
    case kFloat32: return run<kFloat32>(args, with_sinks.sinks);
    case kBFloat16: return run<kBFloat16>(args, with_sinks.sinks);
    case kFloat16: return run<kFloat16>(args, with_sinks.sinks);
    default: return fail(kBadArgument, "attention: unknown dtype");
  }
}

}  // namespace DETINFER_LEVEL
}  // namespace detinfer
