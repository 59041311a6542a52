// The scheduler of fibers: a block's threads in turn, another warp first in every round, and one warp or another left out
// for a while: on a GPU a warp may fall behind the rest.
#include <sys/mman.h>

#include <mutex>

#include "hip/hip_runtime.h"
#undef threadIdx

asm(R"(
.text
.globl fibers_switch
fibers_switch:
  pushq %rbx
  pushq %rbp
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbp
  popq %rbx
  ret
)");

namespace fibers {

thread_local Block block;
thread_local Index tid, bid, threads_of_block, blocks;

static void start() {
  (*block.body)();
  block.ended[tid.x] = 1;
  block.live--;
  void* nothing;
  fibers_switch(&nothing, block.scheduler);
  abort();
}

static constexpr size_t kStack = 32 << 10;
static constexpr int kMostThreads = 1024;
static constexpr int kBehind = 24;  // rounds that a warp is left out, or none is

// Stacks of a block's fibers, kept for the next block: their pages are there already.
static std::mutex guard;
static std::vector<char*> idle;
static char* take_stacks() {
  const std::lock_guard<std::mutex> held(guard);
  if (!idle.empty()) {
    char* found = idle.back();
    idle.pop_back();
    return found;
  }
  void* mapped = mmap(nullptr, kMostThreads * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) abort();
  return static_cast<char*>(mapped);
}

void run(const std::function<void()>& body, int index, int count, int threads, int shared_bytes) {
  char* stacks = take_stacks();
  Block& b = block;
  b.threads = b.live = threads;
  b.stack.assign(threads, nullptr);
  b.ended.assign(threads, 0);
  b.warps.assign((threads + 31) / 32, Warp());
  b.room.assign(shared_bytes + 32, 0x5a);
  b.body = &body;
  bid.x = static_cast<unsigned>(index);
  threads_of_block.x = static_cast<unsigned>(threads);
  blocks.x = static_cast<unsigned>(count);
  for (int t = 0; t < threads; t++) {
    void** top = reinterpret_cast<void**>(stacks + (t + 1) * kStack);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(start);
    b.stack[t] = top - 6;
  }
  unsigned random = 12345u + static_cast<unsigned>(index);
  int left_out = -1, rounds = 0;
  while (b.live > 0) {
    b.spins = 0;
    random = random * 1664525u + 1013904223u;
    const int first = static_cast<int>((random >> 8) % static_cast<unsigned>(threads / 32)) * 32;
    if (++rounds % kBehind == 0) left_out = rounds / kBehind % 2 == 0 ? -1 : first / 32;
    for (int k = 0; k < threads; k++) {
      const int t = (first + k) % threads;
      if (b.ended[t] || t / 32 == left_out) continue;
      tid.x = static_cast<unsigned>(t);
      fibers_switch(&b.scheduler, b.stack[t]);
    }
    if (b.spins > 0) sched_yield();
  }
  const std::lock_guard<std::mutex> held(guard);
  idle.push_back(stacks);
}

}  // namespace fibers
