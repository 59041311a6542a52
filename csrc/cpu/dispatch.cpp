// Chooses the instruction set at run time and exports the C ABI.
#include <cstring>

#include "../platform.h"
#include "communicator.h"
#include "kernels.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace detinfer {
namespace {

// The floating-point mode of the thread while kernels run: round to nearest, subnormals kept. A caller may have set
// another one (torch.set_flush_denormal); it has it back afterwards.
class DefaultFloatMode {
 public:
#if defined(__x86_64__)
  DefaultFloatMode() : before_(_mm_getcsr()) {
    if ((before_ & kMode) != 0) _mm_setcsr(before_ & ~kMode);
  }
  ~DefaultFloatMode() {
    if ((before_ & kMode) != 0) _mm_setcsr(before_);
  }

 private:
  static constexpr unsigned kMode = 0xe040;  // flush to zero, rounding, denormals are zero
  unsigned before_;
#elif defined(__aarch64__)
  DefaultFloatMode() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(before_));
    if ((before_ & kMode) != 0) __asm__ volatile("msr fpcr, %0" : : "r"(before_ & ~kMode));
  }
  ~DefaultFloatMode() {
    if ((before_ & kMode) != 0) __asm__ volatile("msr fpcr, %0" : : "r"(before_));
  }

 private:
  static constexpr uint64_t kMode = 0x3c80000;  // default NaN, flush to zero, rounding, fp16 flush to zero
  uint64_t before_;
#else
  DefaultFloatMode() {}
#endif
  DefaultFloatMode(const DefaultFloatMode&) = delete;
  DefaultFloatMode& operator=(const DefaultFloatMode&) = delete;
};

struct Task {
  Body body;
  void* context;
};

void run_task(int64_t begin, int64_t end, void* context) {
  const DefaultFloatMode mode;
  const Task& task = *static_cast<Task*>(context);
  task.body(begin, end, task.context);
}

thread_local char last_error[512] = "";

// torch_parallel_for of libtorch_cpu (torch/csrc/stable/c/shim.h, torch 2.10 and newer): returns 0 on success.
using TorchParallelFor = int (*)(int64_t begin, int64_t end, int64_t grain, Body body, void* context);
using TorchGetNumThreads = int (*)(uint32_t* count);
TorchParallelFor torch_parallel_for = nullptr;
TorchGetNumThreads torch_get_num_threads = nullptr;

#define DETINFER_TABLE(level) \
  Kernels { level::matmul, level::attention, level::elementwise, level::rows, level::all_reduce, level::sampling }

struct Level {
  const char* name;
  bool (*available)();
  Kernels kernels;
};

bool always() { return true; }
#ifdef DETINFER_X86
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512cd");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

// Ascending: a later level is faster; all give the same bits.
const Level kLevels[] = {
    {"baseline", always, DETINFER_TABLE(baseline)},
#ifdef DETINFER_X86
    {"avx2", has_avx2, DETINFER_TABLE(avx2)},
    {"avx512", has_avx512, DETINFER_TABLE(avx512)},
    {"avx512_bf16", has_avx512_bf16,
     {avx512_bf16::matmul, avx512::attention, avx512::elementwise, avx512::rows, avx512::all_reduce,
      avx512::sampling}},
#endif
};
const Level* current = &kLevels[0];

}  // namespace

int fail(Status status, const char* sentence) {
  std::strncpy(last_error, sentence, sizeof(last_error) - 1);
  return status;
}

void parallel_for(int64_t begin, int64_t end, int64_t grain, Body body, void* context) {
  if (begin >= end) return;
  Task task{body, context};
  if (end - begin <= grain || threads() == 1 || torch_parallel_for(begin, end, grain, run_task, &task) != 0)
    body(begin, end, context);
}

int threads() {
  uint32_t count = 1;
  if (torch_parallel_for == nullptr || torch_get_num_threads(&count) != 0) return 1;
  return static_cast<int>(count);
}

const Kernels& kernels() { return current->kernels; }

}  // namespace detinfer

using namespace detinfer;

DETINFER_EXPORT const char* detinfer_error() { return last_error; }

// Raised by one whenever a signature below or in a family file changes; native.py refuses any other.
DETINFER_EXPORT int detinfer_abi() { return 3; }

// Name of the i-th level that this build has and this CPU can run, in ascending order; null past the end.
DETINFER_EXPORT const char* detinfer_cpu_level(int i) {
  for (const Level& level : kLevels)
    if (level.available() && i-- == 0) return level.name;
  return nullptr;
}

DETINFER_EXPORT const char* detinfer_cpu_current() { return current->name; }

// Selects a level by name; null selects the highest available one.
DETINFER_EXPORT int detinfer_cpu_select(const char* name) {
  const Level* chosen = nullptr;
  for (const Level& level : kLevels)
    if (level.available() && (name == nullptr || std::strcmp(name, level.name) == 0)) chosen = &level;
  if (chosen == nullptr) return fail(kBadArgument, "this CPU or this build has no such instruction set");
  current = chosen;
  return kOk;
}

// Lends torch's threads to the library: both functions of libtorch_cpu, or null for one thread.
DETINFER_EXPORT void detinfer_set_threads(void* parallel_for_function, void* get_num_threads_function) {
  torch_get_num_threads = reinterpret_cast<TorchGetNumThreads>(get_num_threads_function);
  torch_parallel_for =
      torch_get_num_threads == nullptr ? nullptr : reinterpret_cast<TorchParallelFor>(parallel_for_function);
}

// `size`: bytes of the structs that the caller fills in; native.py compares them with its own.
#define DETINFER_ENTRY(family, Args, size) DETINFER_ENTRY_OF(family, family, Args, size, *args)
#define DETINFER_ENTRY_OF(family, kernel, Args, size, ...)                              \
  DETINFER_EXPORT int detinfer_cpu_##family##_size() { return static_cast<int>(size); } \
  DETINFER_EXPORT int detinfer_cpu_##family(const Args* args) {                         \
    if (args == nullptr) return fail(kBadArgument, #family ": no arguments were given"); \
    const DefaultFloatMode mode;                                                        \
    return kernels().kernel(__VA_ARGS__);                                               \
  }
DETINFER_ENTRY(matmul, MatmulArgs, sizeof(MatmulArgs) + sizeof(MatmulPlan))
DETINFER_ENTRY_OF(attention, attention, AttentionArgs, sizeof(AttentionArgs) + sizeof(AttentionPlan), {*args, nullptr})
DETINFER_ENTRY_OF(attention_sinks, attention, AttentionSinksArgs, sizeof(AttentionSinksArgs) + sizeof(AttentionPlan), *args)
DETINFER_ENTRY(elementwise, ElementwiseArgs, sizeof(ElementwiseArgs))
DETINFER_ENTRY(rows, RowsArgs, sizeof(RowsArgs))
DETINFER_ENTRY(all_reduce, AllReduceArgs, sizeof(AllReduceArgs))
DETINFER_ENTRY(sampling, SamplingArgs, sizeof(SamplingArgs))

DETINFER_EXPORT int detinfer_communicator_call_size() { return static_cast<int>(sizeof(CollectiveArgs)); }

// One collective, together with the other ranks; communicator.cpp opens and closes the communicator.
DETINFER_EXPORT int detinfer_communicator_call(Communicator* communicator, const CollectiveArgs* args) {
  if (communicator == nullptr || args == nullptr) return fail(kBadArgument, "collective: no arguments were given");
  const DefaultFloatMode mode;
  return collective(*communicator, *args);
}
