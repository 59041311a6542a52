// Ranks that run the same random collectives and check every result: under ThreadSanitizer as threads of one process,
// under AddressSanitizer as threads and as processes. test_sanitizers.py builds and runs it.
//
//   communicator_stress threads|processes RANKS SEED CALLS
//
// With DETINFER_WEAKENED all atomics are relaxed: the control that the checkers do see a race.
#include <atomic>
#if defined(DETINFER_WEAKENED)
#define memory_order_acquire memory_order_relaxed
#define memory_order_release memory_order_relaxed
#define memory_order_acq_rel memory_order_relaxed
#define memory_order_seq_cst memory_order_relaxed
#endif
#include "../../csrc/cpu/communicator.cpp"
#undef memory_order_acquire
#undef memory_order_release
#undef memory_order_acq_rel
#undef memory_order_seq_cst

#include <sys/wait.h>

#include <cmath>
#include <random>
#include <thread>
#include <vector>

#include "../../csrc/cpu/kernels.h"

namespace detinfer {

// What the library's dispatch.cpp has, for one instruction set and one thread.
int fail(Status status, const char*) { return status; }
void parallel_for(int64_t begin, int64_t end, int64_t, Body body, void* context) { body(begin, end, context); }
int threads() { return 1; }
// add + RMSNorm as far as it is looked at here: the addition. The family's own tests have the rest.
int add_rows(const RowsArgs& args) {
  for (int64_t i = 0; i < args.rows * args.n; i++)
    static_cast<float*>(args.residual_out)[i] = static_cast<const float*>(args.x)[i] + static_cast<const float*>(args.residual)[i];
  return kOk;
}
const Kernels& kernels() {
  static const Kernels table{nullptr, nullptr, nullptr, add_rows, baseline::all_reduce};
  return table;
}

namespace {

constexpr int64_t kStaging = 1024;

// Terms of many magnitudes and both signs, large on the first and the last rank: their order shows.
float value(int rank, int size, int call, int64_t i) {
  std::minstd_rand random(static_cast<unsigned>(1 + i * 8191 + call * 131 + (rank == size - 1 ? 0 : rank) * 7));
  random();
  const float large = std::ldexp(static_cast<float>(128 + random() % 128), 8);
  if (rank == 0) return large;
  if (rank == size - 1) return -large;
  return std::ldexp(static_cast<float>(random() % (1 << 22)) - (1 << 21), -24 - static_cast<int>(random() % 12));
}

float reduced(int size, bool tree, int call, int64_t i) {
  std::vector<float> level;
  for (int r = 0; r < size; r++) level.push_back(value(r, size, call, i));
  while (level.size() > 1) {
    std::vector<float> above;
    if (tree) {
      for (size_t j = 0; j + 1 < level.size(); j += 2) above.push_back(level[j] + level[j + 1]);
      if (level.size() % 2 != 0) above.push_back(level.back());
    } else {
      above.push_back(level[0] + level[1]);
      above.insert(above.end(), level.begin() + 2, level.end());
    }
    level = above;
  }
  return level[0];
}

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

// One rank's run: 0, or the number of the call that went wrong.
int run(Communicator& c, int rank, int size, unsigned seed, int calls) {
  std::minstd_rand random(seed);  // the same on every rank
  std::minstd_rand own(seed + 1000 + static_cast<unsigned>(rank));
  for (int call = 1; call <= calls; call++) {
    CollectiveArgs args = {};
    const int kind = static_cast<int>(random() % 5);
    const bool tree = random() % 2 == 0, differ = random() % 16 == 0;
    const int64_t rows = static_cast<int64_t>(random() % 4), n = static_cast<int64_t>(random() % 400);
    const int64_t count = kind == static_cast<int>(Collective::kReduceScatter) ? rows * n * size : rows * n;
    args.call.collective = kind;
    args.call.item = sizeof(float);
    args.call.order = tree;
    args.call.path = static_cast<int32_t>(random() % 2);
    args.call.weight_dtype = -1;
    args.call.weight_mode = kFp32Weight;
    args.call.count = count;
    args.call.n = n;
    args.call.eps = 1e-6;
    std::vector<float> in(static_cast<size_t>(count)), residual(in.size(), 0.5f), extra(in.size()), out, expected;
    for (int64_t i = 0; i < count; i++) in[static_cast<size_t>(i)] = value(rank, size, call, i);
    const auto sum = [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; i++) expected.push_back(reduced(size, tree, call, i));
    };
    switch (static_cast<Collective>(kind)) {
      case Collective::kBarrier: break;
      case Collective::kReduceScatter: sum(rank * count / size, (rank + 1) * count / size); break;
      case Collective::kAllGather:
        for (int r = 0; r < size; r++)
          for (int64_t i = 0; i < count; i++) expected.push_back(value(r, size, call, i));
        break;
      default: sum(0, count);
    }
    out.assign(expected.size(), -1.0f);
    if (kind == static_cast<int>(Collective::kAllReduceRmsNorm)) {
      for (float& v : expected) v = v + 0.5f;
    }
    args.in = in.data();
    args.out = out.data();
    args.residual = residual.data();
    args.residual_out = extra.data();
    if (differ) args.call.eps = rank == 0 ? 2.0 : 1.0;
    if (own() % 32 == 0) std::this_thread::sleep_for(std::chrono::microseconds(own() % 3000));
    const int status = collective(c, args);
    if (differ) {
      if (status != kMismatch || !same(out, std::vector<float>(out.size(), -1.0f))) return call;
      continue;
    }
    const bool norm = kind == static_cast<int>(Collective::kAllReduceRmsNorm);
    if (status != kOk || !same(norm ? extra : out, expected)) return call;
  }
  return 0;
}

int report(int rank, unsigned seed, int call) {
  if (call != 0) std::fprintf(stderr, "rank %d, seed %u: call %d is wrong\n", rank, seed, call);
  return call != 0;
}

int as_threads(int size, unsigned seed, int calls) {
  const size_t bytes = static_cast<size_t>(detinfer_communicator_bytes(size, kStaging));
  void* base = std::aligned_alloc(kPage, bytes);
  std::memset(base, 0, bytes);
  std::vector<std::thread> ranks;
  std::atomic<int> wrong{0};
  for (int r = 0; r < size; r++)
    ranks.emplace_back([=, &wrong] {
      Communicator* c = detinfer_communicator_open(-1, base, r, size, kStaging, 60.0);
      wrong += report(r, seed, run(*c, r, size, seed, calls));
      // No meeting before: a rank may leave while others still read what it wrote.
      detinfer_communicator_close(c);
    });
  for (std::thread& rank : ranks) rank.join();
  std::free(base);
  return wrong != 0;
}

int as_processes(int size, unsigned seed, int calls) {
  const int fd = static_cast<int>(syscall(SYS_memfd_create, "stress", 0));
  if (fd < 0 || ftruncate(fd, detinfer_communicator_bytes(size, kStaging)) != 0) return 2;
  for (int r = 0; r < size; r++) {
    if (fork() == 0) {
      Communicator* c = detinfer_communicator_open(fd, nullptr, r, size, kStaging, 60.0);
      const int wrong = report(r, seed, run(*c, r, size, seed, calls));
      detinfer_communicator_close(c);
      std::exit(wrong);
    }
  }
  int wrong = 0, status;
  while (wait(&status) > 0) wrong += status != 0;
  return wrong != 0;
}

}  // namespace
}  // namespace detinfer

int main(int argc, char** argv) {
  if (argc != 5) return 2;
  const int size = std::atoi(argv[2]), calls = std::atoi(argv[4]);
  const unsigned seed = static_cast<unsigned>(std::atoi(argv[3]));
  const bool processes = std::strcmp(argv[1], "processes") == 0;
  const int wrong = processes ? detinfer::as_processes(size, seed, calls) : detinfer::as_threads(size, seed, calls);
  if (wrong == 0) std::printf("%d ranks as %s, seed %u: %d calls are right\n", size, argv[1], seed, calls);
  return wrong;
}
