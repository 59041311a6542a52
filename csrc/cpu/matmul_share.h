// Tasks shared between threads. Each worker has a range of neighbouring tasks, as in a static split, and takes from its
// front; a worker that has finished takes from the ends of the others. So a thread that the system holds up does not
// hold up the call. Which worker runs a task changes no bit.
#pragma once

#include <time.h>

#include "matmul_problem.h"

namespace detinfer {
namespace {

constexpr int kMostWorkers = 128;
constexpr int64_t kWorkerCycles = 12000;  // a thread is not woken for less

inline int workers_for(int64_t tasks, int64_t cycles, int threads) {
  const int64_t most_useful = least(tasks, 1 + cycles / kWorkerCycles);
  return static_cast<int>(most(1, least(least(threads, kMostWorkers), most_useful)));
}

class Share {
 public:
  Share(int64_t tasks, int workers) : workers_(workers) {
    for (int i = 0; i < workers; i++) spans_[i].ends = join(tasks * i / workers, tasks * (i + 1) / workers);
  }

  // The worker's next task; -1 if none is left.
  int64_t take(int worker) {
    for (int i = 0; i < workers_; i++) {
      uint64_t* ends = &spans_[(worker + i) % workers_].ends;
      uint64_t seen = __atomic_load_n(ends, __ATOMIC_RELAXED);
      while (front(seen) < back(seen)) {
        const uint64_t left = i == 0 ? join(front(seen) + 1, back(seen)) : join(front(seen), back(seen) - 1);
        if (__atomic_compare_exchange_n(ends, &seen, left, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
          return i == 0 ? front(seen) : back(seen) - 1;
      }
    }
    return -1;
  }

 private:
  static uint64_t join(int64_t front, int64_t back) {
    return static_cast<uint64_t>(front) << 32 | static_cast<uint64_t>(back);
  }
  static int64_t front(uint64_t ends) { return static_cast<int64_t>(ends >> 32); }
  static int64_t back(uint64_t ends) { return static_cast<int64_t>(ends & 0xffffffffu); }

  struct alignas(64) Span {
    uint64_t ends;
  };
  Span spans_[kMostWorkers];
  int workers_;
};

// Work that all must have done before any goes on: `take` until -1, `done` after each, then `wait`. Only tasks that
// some thread has taken are waited for, so it does not matter how many threads there are.
class Barrier {
 public:
  explicit Barrier(int64_t tasks) : tasks_(tasks) {}
  int64_t take() {
    const int64_t task = __atomic_fetch_add(&next_, 1, __ATOMIC_RELAXED);
    return task < tasks_ ? task : -1;
  }
  void done() { __atomic_fetch_add(&done_, 1, __ATOMIC_RELEASE); }
  void wait() const {
    const timespec pause = {0, 20000};
    for (int i = 0; __atomic_load_n(&done_, __ATOMIC_ACQUIRE) < tasks_; i++)
      if (i > 20000) nanosleep(&pause, nullptr);
  }

 private:
  const int64_t tasks_;
  int64_t next_ = 0;
  int64_t done_ = 0;
};

}  // namespace
}  // namespace detinfer
